"""Sampling responses: jitted prefill, insert and decode over fixed slots, and the host code that keeps them busy."""
