"""Compiling a run for hardware that is not here, and what that says of its memory, traffic and speed."""
