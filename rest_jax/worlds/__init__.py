"""Worlds of tools: what calls do, what the user says, whether a task is done. Host code without jax."""
