"""The process of one trial: `python -m rest_jax.experiments.sweep.child CONFIG.yaml` trains as `rest-jax train CONFIG.yaml` does.

It reads its standard input, which its worker holds open, and ends at once when that is closed: a worker that is killed
takes its run along, so that the next worker finds the folder free. Nothing is lost but the steps since the last
checkpoint. Exit codes are those of the command line.
"""

import os
import sys
import threading

from rest_jax.errors import RunStopped, UserError
from rest_jax.run import machine

ORPHANED = 70  # exit code when the worker is gone


def main() -> int:
    """Runs the config named by the first argument."""
    machine.relaunch_tuned()
    machine.configure()
    threading.Thread(target=_end_with_worker, daemon=True).start()
    from rest_jax import config as config_lib

    try:
        config = config_lib.load([sys.argv[1]])
        from rest_jax import train

        return train.train(config)
    except UserError as error:
        print(f"rest-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"rest-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _end_with_worker() -> None:
    while os.read(
        0, 1
    ):  # not sys.stdin, whose lock this thread would hold while the interpreter ends
        pass
    os._exit(ORPHANED)  # the main thread may be inside XLA, where no signal reaches it


if __name__ == "__main__":
    sys.exit(main())
