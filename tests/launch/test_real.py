"""launch/real.sh: its stages in order, none of them twice, the same prompts for both methods, and nothing after a stop."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from rest_jax import config
from tests.conftest import REPOSITORY

EVALUATED = ["before", "sft", "grpo", "rest"]


@pytest.fixture
def start(tmp_path):
    """Starts the script in a folder with weights and dialogues, and a rest-jax that only notes its words."""
    fake = tmp_path / "bin" / "rest-jax"
    fake.parent.mkdir()
    shutil.copy(REPOSITORY / "tests" / "programs" / "fake_rest_jax.sh", fake)
    fake.chmod(0o755)
    (tmp_path / "models/smollm2").mkdir(parents=True)
    (tmp_path / "sgd/train").mkdir(parents=True)
    (tmp_path / "sgd/train/dialogues_001.json").touch()

    def begin(*words: str, seconds: float = 0) -> subprocess.Popen:
        environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
        environment |= {"LOG": str(tmp_path / "log"), "SECONDS_EACH": str(seconds), "CODE": "0"}
        return subprocess.Popen(
            [str(REPOSITORY / "launch/real.sh"), *words], cwd=tmp_path, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return begin


def said(tmp_path: pathlib.Path) -> list[list[str]]:
    path = tmp_path / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_the_stages(start, tmp_path):
    assert start("sgd").wait(60) == 0
    stages = said(tmp_path)
    assert [words[0] for words in stages] == [
        *("data", "evaluate", "sft", "evaluate", "train", "evaluate", "train", "evaluate"),
        *("report", "evaluate", "evaluate", "evaluate", "evaluate"),
    ]
    runs = [config.load(words[1:3], words[3:]) for words in stages if words[0] in ("sft", "train")]
    sft, *trained = runs
    assert [run.name for run in trained] == ["grpo", "rest"]
    for run in trained:
        assert run.model.source == str(sft.folder) and run.data.train == sft.data.train
        # the seed and the sizes decide which prompts a step has
        assert (run.seed, run.rollout, run.data) == (
            trained[0].seed,
            trained[0].rollout,
            trained[0].data,
        )
    prepared = stages[0]
    assert sft.data.train in prepared and "data.brief_prompt=true" in prepared
    outputs = [words[words.index("--output") + 1] for words in stages if "--output" in words]
    assert outputs == [*(f"runs/real/{name}.jsonl" for name in EVALUATED), "runs/real/report.html"]


def test_what_is_done_is_not_done_again(start, tmp_path):
    """Runs are told again, since they know themselves that they are done."""
    folder = tmp_path / "runs/real"
    folder.mkdir(parents=True)
    for name in ("sgd", *EVALUATED[:2]):
        (folder / f"{name}.jsonl").touch()
    assert start("sgd").wait(60) == 0
    stages = said(tmp_path)
    assert stages[0][0] == "sft"
    outputs = [words[words.index("--output") + 1] for words in stages if "--output" in words]
    assert outputs[:2] == ["runs/real/grpo.jsonl", "runs/real/rest.jsonl"]


def test_a_stop_is_passed_on_and_nothing_follows(start, tmp_path):
    process = start("sgd", seconds=30)
    while not said(tmp_path):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert said(tmp_path)[1:] == [["saved"]]


def test_a_folder_without_dialogues_is_refused(start, tmp_path):
    process = start("nowhere")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1
    assert "nowhere/train/dialogues_*.json: no such files" in error and said(tmp_path) == []
