"""`python -m rest_jax` is the command `rest-jax`."""

import sys

from rest_jax.cli import entry

sys.exit(entry())
