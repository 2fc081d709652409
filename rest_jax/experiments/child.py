"""The process of one run: `python -m rest_jax.experiments.child WORDS...` does what `rest-jax WORDS...` does.

Its worker holds the other end of its standard input. When that is closed the process ends at once, so that a worker
that is killed takes its run along and the next worker finds the run's folder free.
"""

import os
import runpy
import threading

ORPHANED = 70  # exit code when the worker is gone


def end_with_worker() -> None:
    """Waits until standard input is closed, then ends the process."""
    # Not sys.stdin: this thread would hold its lock while the interpreter ends.
    while os.read(0, 1):
        pass
    # Not sys.exit: the main thread may be inside XLA, where no exception reaches it.
    os._exit(ORPHANED)


if __name__ == "__main__":
    threading.Thread(target=end_with_worker, daemon=True).start()
    runpy.run_module("rest_jax", run_name="__main__")
