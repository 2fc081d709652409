"""Measuring a policy on held-out records."""
