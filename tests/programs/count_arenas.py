"""Has 32 threads allocate at the same time, in a process that was configured; malloc says on stderr what arenas it has."""

import ctypes
import threading

from rest_jax.run import environment

environment.configure()
together = threading.Barrier(32)


def allocate() -> None:
    together.wait()
    held = [bytes(5000) for _ in range(200)]
    together.wait()
    del held


threads = [threading.Thread(target=allocate) for _ in range(together.parties)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
ctypes.CDLL(None).malloc_stats()
print("null")
