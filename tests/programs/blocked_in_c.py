"""blocked_in_c.py STOP_TIMEOUT: waits for ever in C, where neither a signal handler nor an exception can run."""

import ctypes
import sys

from rest_jax.config import DistributedConfig
from rest_jax.run.stop import StopRequest

lock = ctypes.CDLL(None).pthread_mutex_lock
mutex = ctypes.create_string_buffer(64)
stop = StopRequest(DistributedConfig(stop_timeout=int(sys.argv[1])))
with stop.watched(), stop.waiting("the mutex"):
    lock(mutex)
    print("saving", flush=True)
    lock(mutex)
print("ended", flush=True)
