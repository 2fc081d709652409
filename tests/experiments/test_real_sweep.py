"""A sweep of real runs whose worker is killed amid a trial: resumed by another, it is the unbroken one bit for bit."""

import signal
import subprocess
import sys

import pytest

from rest_jax import config as config_lib
from rest_jax.run.metrics import read_lines

SMALL = (
    "data.synthetic_size=64", "data.eval_limit=8", "rollout.prompts_per_step=2", "rollout.group_size=2",
    "rollout.max_response_tokens=32", "train.steps=4", "train.eval_every=2", "train.checkpoint_every=1",
)  # fmt: skip


def timeless(run) -> list[dict]:
    """The metrics of a run but those of the clock."""
    lines = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
def test_a_killed_sweep_is_the_unbroken_one(
    write_space, tmp_path, start, until, children, monkeypatch
):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the runs have one device, not the tests' eight
    base, folder = tmp_path / "base.yaml", tmp_path / "runs" / "some"
    words = [*SMALL, f"output={tmp_path / 'runs'}"]
    base.write_text(config_lib.dump(config_lib.load(["scale/tiny", "method/rest"], words)))
    alpha = {"curriculum.alpha_format": {"choices": [0.1, 0.7]}}
    space = write_space(overrides={}, parameters=alpha)
    first = start(base, space, kind="real")
    until(lambda: (folder / "trial-0000/checkpoints/2").is_dir() or first.poll() is not None, 400)
    assert children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(base, space, kind="real")
    out, _ = second.communicate(timeout=900)
    assert second.returncode == 0, out
    assert "trial-0000: resumes " in out and out.count("complete at step 4;") == 2, out
    # The same trial as an ordinary run that nothing interrupted.
    words = [folder / "trial-0000" / "config.yaml", f"output={tmp_path / 'alone'}"]
    subprocess.run([sys.executable, "-m", "rest_jax", "train", *map(str, words)], check=True)
    assert timeless(tmp_path / "alone" / "trial-0000") == timeless(folder / "trial-0000")
