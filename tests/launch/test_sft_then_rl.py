"""launch/sft_then_rl.sh: two commands, the second from the folder of the first, and never after a stop or a failure."""

import functools
import signal
import time

import pytest

from rest_jax import config


@pytest.fixture
def start(stages):
    """Starts the script."""
    return functools.partial(stages.start, "sft_then_rl.sh")


def test_the_second_run_starts_from_the_first(start, stages):
    shared = ("output=/out", "data.eval_limit=8", "seed=0")
    words = ("tiny", "rest_tuned", *shared, "--", "seed=1", "name=mine")
    assert start(*words).wait(60) == 0
    first, second = stages.said()
    assert first == ["sft", "scale/tiny_sft", "method/sft", *shared, "name=tiny-sft"]
    assert second[:3] == ["train", "scale/tiny", "method/rest_tuned"]
    # a command line gives a key one value
    assert [word for word in second if word.startswith(("seed=", "name="))] == [
        "seed=1",
        "name=mine",
    ]
    loaded = [config.load(words[1:3], words[3:]) for words in (first, second)]
    assert loaded[1].model.source == str(loaded[0].folder) == "/out/tiny-sft"
    assert (loaded[1].name, loaded[1].seed, loaded[0].seed) == ("mine", 1, 0)


def test_the_folders_without_words(start, stages):
    assert start("tiny", "grpo").wait(60) == 0
    first, second = (config.load(words[1:3], words[3:]) for words in stages.said())
    assert (str(first.folder), second.model.source) == ("runs/tiny-sft", "runs/tiny-sft")
    assert second.name == "tiny-sft-grpo"


def test_dry_run(start, stages):
    printed, _ = start("tiny", "grpo", "output=/a b", DRY_RUN="1").communicate(timeout=60)
    assert printed == (
        "rest-jax sft scale/tiny_sft method/sft 'output=/a b' name=tiny-sft\n"
        "rest-jax train scale/tiny method/grpo 'output=/a b' name=tiny-sft-grpo 'model.source=/a b/tiny-sft'\n"
    )
    assert stages.said() == []


def test_usage(start, stages):
    process = start("tiny")
    assert "usage: " in process.communicate(timeout=60)[1] and process.returncode == 2
    assert stages.said() == []


def test_nothing_follows_a_failure(start, stages):
    assert start("tiny", "rest", code=2).wait(60) == 2
    assert len(stages.said()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_nothing_follows(start, stages, number):
    process = start("tiny", "rest", seconds=30)
    while not stages.said():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(60) == 75  # the second run is not done
    assert stages.said()[1:] == [["saved"]]
