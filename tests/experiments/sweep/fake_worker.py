"""`rest-jax sweep` with the fake run as the process of a trial, for tests that kill workers.

CONFIG SPACE OUTPUT STALE [STORAGE]
"""

import functools
import pathlib
import sys

from rest_jax.experiments.sweep import command, worker

FAKE = pathlib.Path(__file__).parent / "fake_trial.py"


def fake_command(config: pathlib.Path) -> list[str]:
    return [sys.executable, str(FAKE), str(config)]


if __name__ == "__main__":
    command.Worker = functools.partial(worker.Worker, command=fake_command, poll=0.02)
    config, space, output, stale, *storage = sys.argv[1:]
    command.run(
        pathlib.Path(config),
        pathlib.Path(space),
        [f"output={output}"],
        stale=float(stale),
        storage=storage[0] if storage else None,
    )
