"""A run that samples a step ahead, killed or told to stop at thirty instants: started again it is the unbroken run."""

import pathlib
import random
import signal
import subprocess
import time

import pytest

from rest_jax.errors import UNFINISHED
from tests.runs import assert_same, finish, lines, recipe, start, state

INSTANTS = 30
STEPS = 4

pytestmark = pytest.mark.slow


def stale(model: pathlib.Path, output: pathlib.Path) -> dict:
    """Four steps of two updates, a checkpoint after every second one."""
    raw = recipe(
        model,
        output,
        seed=1,
        rollout={"staleness": 1, "recompute_logprobs": True, "tis_cap": 2.0},
        train={"steps": STEPS, "eval_before": False, "eval_every": 0, "checkpoint_every": 2},
    )
    raw["data"] |= {"eval": None, "max_prompt_tokens": 128}
    return raw


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> tuple[pathlib.Path, float]:
    """The folder of a run that nothing interrupted, and the seconds that it takes once its programs are compiled."""
    for name in ("cold", "warm"):
        folder = tmp_path_factory.mktemp(name)
        begun = time.monotonic()
        finish(start("train", stale(model, folder), folder))
        seconds = time.monotonic() - begun
    return folder / "tiny", seconds


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize("instant", range(INSTANTS // 2))
def test_interrupted_at_any_instant_and_restarted_is_the_unbroken_run(
    model, unbroken, tmp_path, instant, number
):
    whole, seconds = unbroken
    raw = stale(model, tmp_path)
    process = start("train", raw, tmp_path)
    # More of them late, when there are steps to lose.
    share = (instant + random.Random(instant).random()) / (INSTANTS // 2)
    try:
        process.wait(seconds * share**0.5)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    process.communicate(timeout=400)
    # A signal before the program has handlers ends it as any other.
    assert process.returncode in (0, UNFINISHED, -number)
    finish(start("train", raw, tmp_path))
    assert lines(tmp_path / "tiny") == lines(whole)
    assert_same(state(tmp_path / "tiny"), state(whole))
