"""rest_jax: ResT (entropy-reshaped token-level policy gradients) for tool-use models, in JAX."""

__version__ = "0.1.0"
