"""Compiles one function under `configure` and prints, as JSON, how often the compilation cache had it and had it not."""

import json

from rest_jax.run import environment

environment.configure()

import jax

seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name.split("/")[-1]))
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((4, 4))).block_until_ready()
print(json.dumps([seen.count("cache_hits"), seen.count("cache_misses")]))
