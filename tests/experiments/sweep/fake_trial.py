"""A run without a model, for the tests of sweeps: CONFIG in, a folder as a run leaves it out; resumes, stops on SIGTERM.

The held-out reward at step s is s x the learning rate's mantissa, known in advance. `FAKE_SECONDS` a step; the file
`steps.txt` of the folder gets one line a step trained, so that a test sees which were trained twice.
"""

import os
import pathlib
import signal
import sys
import threading
import time

from rest_jax import config as config_lib
from rest_jax.run.metrics import MetricsWriter, read_lines


def reward(config: config_lib.Config, step: int) -> float:
    return step * config.curriculum.alpha_format


def main() -> None:
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(70)), daemon=True).start()
    config = config_lib.load(sys.argv[1])
    if config.curriculum.alpha_think == 9:
        sys.exit("rest-jax: error: step 1: not finite")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    folder = pathlib.Path(config.output) / config.name
    writer = MetricsWriter(folder)
    path = folder / "config.yaml"
    if path.is_file():
        assert config_lib.differences(config_lib.load(path), config) == []
    path.write_text(config_lib.dump(config))
    checkpoint = folder / "checkpoint.txt"
    start = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    writer.truncate_after(start if start else -1)
    steps = config.train.steps or 0
    if not start:
        writer.write(0, {"eval/reward": 0.0})
    for step in range(start + 1, steps + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        with (folder / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        writer.write(step, {"update/loss": 0.0})
        if step % config.train.eval_every == 0 or step == steps:
            writer.write(step, {"eval/reward": reward(config, step)})
        if step % config.train.checkpoint_every == 0 or step == steps or stopping:
            writer.sync()
            checkpoint.write_text(str(step))
        if stopping:
            break
    writer.close()
    assert read_lines(folder / "metrics.jsonl")


if __name__ == "__main__":
    main()
