"""Prints, as JSON, the environment that `configure` makes; jax is not imported."""

import json
import os
import sys

from rest_jax.run import environment

environment.configure()
assert "jax" not in sys.modules
print(json.dumps(dict(os.environ)))
