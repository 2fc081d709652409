"""One rule a file; see `rest_jax/rl/rules/__init__.py`."""
