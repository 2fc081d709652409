"""Benchmarks: `python benchmarks/run.py` measures every case against its peer, `python -m benchmarks` one call of ours."""
