"""launch/real.sh: its stages in order, none of them twice, the same prompts for both methods, and nothing after a stop."""

import functools
import signal
import time

import pytest

from rest_jax import config

EVALUATED = ["before", "sft", "grpo", "rest"]


@pytest.fixture
def start(stages, tmp_path):
    """Starts the script in a folder with weights and dialogues."""
    (tmp_path / "models/smollm2").mkdir(parents=True)
    (tmp_path / "sgd/train").mkdir(parents=True)
    (tmp_path / "sgd/train/dialogues_001.json").touch()
    return functools.partial(stages.start, "real.sh")


def test_the_stages(start, stages):
    assert start("sgd").wait(60) == 0
    commands = stages.said()
    assert [words[0] for words in commands] == [
        *("data", "data", "evaluate", "sft", "evaluate", "train", "evaluate", "train", "evaluate"),
        *("report", "evaluate", "evaluate", "evaluate", "evaluate"),
    ]
    runs = [
        config.load(words[1:3], words[3:]) for words in commands if words[0] in ("sft", "train")
    ]
    sft, *trained = runs
    assert [run.name for run in trained] == ["grpo", "rest"]
    # the same records are held out of both, so that the start has not seen what the methods are judged by
    first, calls = commands[:2]
    assert sft.data.train in first and trained[0].data.train in calls
    same = [word for word in first if word not in (sft.data.train, "0.25")]
    assert same == [word for word in calls if word not in (trained[0].data.train, "0", "0.25")]
    assert first[first.index("--held-out") + 1] == calls[calls.index("--held-out") + 1] == "0.25"
    judged = trained[0].data.train.replace(".jsonl", ".eval.jsonl")
    scored = [words for words in commands if words[0] == "evaluate" and "--output" in words]
    assert len(scored) == 4 and all(words[2] == judged for words in scored)
    for run in trained:
        assert run.model.source == str(sft.folder)
        # the seed and the sizes decide which prompts a step has
        assert (run.seed, run.rollout, run.data) == (
            trained[0].seed,
            trained[0].rollout,
            trained[0].data,
        )
    assert "data.brief_prompt=true" in first
    outputs = [words[words.index("--output") + 1] for words in commands if "--output" in words]
    assert outputs == [*(f"runs/real/{name}.jsonl" for name in EVALUATED), "runs/real/report.html"]


def test_dry_run(start, stages, tmp_path):
    """It prints what is left, the installation too, and makes nothing."""
    (tmp_path / "models/smollm2").rmdir()
    process = start("sgd", DRY_RUN="1")
    printed = [line for line in process.communicate(timeout=60)[0].splitlines() if line]
    assert process.returncode == 0 and printed[0] == "mkdir -p runs/real"
    assert printed[1].startswith("python -m pip install ")
    assert [line.split()[1] for line in printed[2:]] == [
        *("convert", "data", "data", "evaluate", "sft", "evaluate", "train", "evaluate", "train"),
        *("evaluate", "report", "evaluate", "evaluate", "evaluate", "evaluate"),
    ]
    assert stages.said() == [] and not (tmp_path / "runs").exists()


def test_what_is_done_is_not_done_again(start, stages, tmp_path):
    """Runs are told again, since they know themselves that they are done."""
    folder = tmp_path / "runs/real"
    folder.mkdir(parents=True)
    for name in ("sgd", "calls", *EVALUATED[:2]):
        (folder / f"{name}.jsonl").touch()
    assert start("sgd").wait(60) == 0
    commands = stages.said()
    assert commands[0][0] == "sft"
    outputs = [words[words.index("--output") + 1] for words in commands if "--output" in words]
    assert outputs[:2] == ["runs/real/grpo.jsonl", "runs/real/rest.jsonl"]


def test_a_stop_is_passed_on_and_nothing_follows(start, stages):
    process = start("sgd", seconds=30)
    while not stages.said():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert stages.said()[1:] == [["saved"]]


def test_a_folder_without_dialogues_is_refused(start, stages):
    process = start("nowhere")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1
    assert "nowhere/train/dialogues_*.json: no such files" in error and stages.said() == []
