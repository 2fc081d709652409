"""A long run: its memory, threads and open files do not grow.

REST_JAX_SOAK steps, 10,000 by default: there what grows by a megabyte stands out from what comes and goes. With
REST_JAX_SOAK_FOLDER the run and its log lie there: broken off, the same test resumes. REST_JAX_SOAK_SAVES says how many
steps lie between two checkpoints, 100 by default.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from rest_jax.run.metrics import read_lines
from tests.runs import environment, recipe

pytestmark = pytest.mark.slow
EVERY = 20  # steps between two lines of the log
MOST = 1.0  # MB in a thousand steps with ten saves; tensorstore leaks some 40 kB in each
MOST_MORE = 4  # threads in the last quarter: pools fill up as they are used


def newest_step(metrics: pathlib.Path) -> int:
    """Of the last complete line; 0 where there is none."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**14))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if len(lines) > 1 else 0


def watch(process: subprocess.Popen, run: pathlib.Path, log: pathlib.Path, steps: int) -> None:
    """Appends what the process holds to the log, until its last step: behind that it draws curves."""
    place, last = pathlib.Path(f"/proc/{process.pid}"), 0
    while process.poll() is None:
        time.sleep(1.0)
        step = newest_step(run / "metrics.jsonl")
        if step < last + EVERY or step == steps:
            continue
        last = step
        try:
            status = (place / "status").read_text().splitlines()
            held = {
                "step": step,
                "process": process.pid,
                "mb": next(int(x.split()[1]) for x in status if x.startswith("VmRSS")) / 1024,
                "threads": len(list((place / "task").iterdir())),
                "files": len(list((place / "fd").iterdir())),
            }
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            return
        with log.open("a") as file:
            file.write(json.dumps(held) + "\n")


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="needs Linux")
def test_a_long_run_holds_no_more_at_its_end(model, tmp_path, report):
    steps = int(os.environ.get("REST_JAX_SOAK", "10000"))
    folder = pathlib.Path(os.environ.get("REST_JAX_SOAK_FOLDER", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    config, log = folder / "config.yaml", folder / "soak.jsonl"
    source = folder / "model"
    if not source.exists():
        source.symlink_to(model)  # of a session that is over, it is made anew, with equal weights
    elif source.is_symlink() and source.resolve() != model.resolve():
        source.unlink()
        source.symlink_to(model)
    every = int(os.environ.get("REST_JAX_SOAK_SAVES", "100"))
    train = {"steps": steps, "checkpoint_every": every, "eval_every": 500, "keep_checkpoints": 2}
    data = {"max_prompt_tokens": 128}
    config.write_text(yaml.safe_dump(recipe(source, folder, seed=1, data=data, train=train)))
    with (folder / "out.txt").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "rest_jax", "train", str(config)],
            env=environment(),
            stdout=out,
            stderr=out,
        )
        watch(process, folder / "tiny", log, steps)
        assert process.wait() == 0, (folder / "out.txt").read_text()[-2000:]
    lines = read_lines(log)
    longest = max(
        (
            [line for line in lines if line["process"] == pid]
            for pid in {x["process"] for x in lines}
        ),
        key=len,
    )
    # Programs are compiled, and caches filled, in the first part.
    held = longest[len(longest) // 4 :]
    first, last = held[0], held[-1]
    slope, _ = np.polyfit([x["step"] for x in held], [x["mb"] for x in held], 1)
    report(
        f"{steps} steps; of one process, steps {first['step']} to {last['step']}: {first['mb']:.0f} to {last['mb']:.0f} MB, "
        f"{1000 * slope:+.2f} MB in a thousand steps; threads {first['threads']} to {last['threads']}, "
        f"files {first['files']} to {last['files']}"
    )
    threads, files = ([x[name] for x in held] for name in ("threads", "files"))
    # A save has threads and files of its own for a moment, so that the smallest count is the one to compare.
    for held, more in ((threads, MOST_MORE), (files, 0)):
        quarter = len(held) // 4
        assert min(held[-quarter:]) <= min(held[:quarter]) + more
    assert 1000 * slope < MOST * max(1, 100 / every)
