"""`python -m rest_jax` is the command `rest-jax`."""

import sys

from rest_jax.cli import main

sys.exit(main())
