"""Sampling responses: one jitted prefill-and-decode over prompt groups, and the host code that feeds it."""
