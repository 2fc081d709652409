"""with_cpu_peak.py WORDS: the command line, on a CPU whose peak is published, so that a run writes its MFU."""

import runpy
import sys

from rest_jax.run import throughput

throughput.PEAK_FLOPS["^cpu$"] = {"float32": 1e12}
sys.argv = ["rest-jax", *sys.argv[1:]]
runpy.run_module("rest_jax", run_name="__main__")
