"""Prints the help of `rest-jax`, then which heavy packages that has imported."""

import sys

from rest_jax import cli

cli.main(["--help"])
heavy = {"jax", "numpy", "transformers", "pydantic", "omegaconf", "optuna"}
print("heavy:", sorted(heavy & set(sys.modules)))
