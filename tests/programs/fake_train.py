"""Behaves like `rest-jax train WORDS...` without a model: writes a run's files step by step, resumes, stops on SIGTERM.

The held-out reward at step s is s x curriculum.alpha_format, the exact rate is a tenth of it. FAKE_SECONDS is the time
of a step. `steps.txt` gets a line for each step trained, so that a test sees which were trained twice.
"""

import os
import pathlib
import signal
import sys
import threading
import time

from rest_jax import config as config_lib
from rest_jax.run.metrics import MetricsWriter


def main() -> None:
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(70)), daemon=True).start()
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    words = sys.argv[2:]
    config = config_lib.load([w for w in words if "=" not in w], [w for w in words if "=" in w])
    if config.curriculum.alpha_think == 9:
        sys.exit("rest-jax: error: step 1: not finite")
    folder = pathlib.Path(config.output) / config.name
    path, checkpoint = folder / "config.yaml", folder / "checkpoint.txt"
    if path.is_file():
        assert config_lib.differences(config_lib.load([path]), config) == []
    writer = MetricsWriter(folder)
    path.write_text(config_lib.dump(config))
    start = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    writer.truncate_after(start if start else -1)
    if not start:
        writer.write(0, held_out(config, 0))
    steps = config.train.steps or 0
    for step in range(start + 1, steps + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        with (folder / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        writer.write(step, {"update/loss": 0.0})
        if step % config.train.eval_every == 0 or step == steps:
            writer.write(step, held_out(config, step))
        if step % config.train.checkpoint_every == 0 or step == steps or stopping:
            writer.sync()
            checkpoint.write_text(str(step))
        if stopping:
            break
    writer.close()


def held_out(config: config_lib.Config, step: int) -> dict[str, float]:
    reward = step * config.curriculum.alpha_format
    return {"eval/reward": reward, "eval/exact": reward / 10}


if __name__ == "__main__":
    main()
