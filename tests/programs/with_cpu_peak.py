"""with_cpu_peak.py WORDS: the command line, on a CPU whose peak is published and that counts its memory, so that a run writes
its MFU and the memory of its devices.
"""

import runpy
import sys

from rest_jax.run import throughput

throughput.PEAK_FLOPS["^cpu$"] = {"float32": 1e12}
throughput._peak_bytes = lambda device: 2**20
sys.argv = ["rest-jax", *sys.argv[1:]]
runpy.run_module("rest_jax", run_name="__main__")
