"""launch/sft_then_rl.sh: two commands, the second from the folder of the first, and never after a stop or a failure."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from rest_jax import config
from tests.conftest import REPOSITORY


@pytest.fixture
def start(tmp_path):
    """Starts the script with a rest-jax that only notes its words."""
    fake = tmp_path / "bin" / "rest-jax"
    fake.parent.mkdir()
    shutil.copy(REPOSITORY / "tests" / "programs" / "fake_rest_jax.sh", fake)
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"

    def begin(*words: str, seconds: float = 0, code: int = 0) -> subprocess.Popen:
        environment = os.environ | {"PATH": path, "LOG": str(tmp_path / "log")}
        environment |= {"SECONDS_EACH": str(seconds), "CODE": str(code)}
        script = str(REPOSITORY / "launch" / "sft_then_rl.sh")
        # Where the tests run in the background, Ctrl-C is ignored, and a shell cannot trap what it inherits as ignored.
        return subprocess.Popen(
            [script, *words],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return begin


def said(tmp_path: pathlib.Path) -> list[list[str]]:
    path = tmp_path / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_the_second_run_starts_from_the_first(start, tmp_path):
    shared = ("output=/out", "data.eval_limit=8", "seed=0")
    words = ("tiny", "rest_tuned", *shared, "--", "seed=1", "name=mine")
    assert start(*words).wait(60) == 0
    first, second = said(tmp_path)
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


def test_the_folders_without_words(start, tmp_path):
    assert start("tiny", "grpo").wait(60) == 0
    first, second = (config.load(words[1:3], words[3:]) for words in said(tmp_path))
    assert (str(first.folder), second.model.source) == ("runs/tiny-sft", "runs/tiny-sft")
    assert second.name == "tiny-sft-grpo"


def test_usage(start, tmp_path):
    process = start("tiny")
    assert "usage: " in process.communicate(timeout=60)[1] and process.returncode == 2
    assert said(tmp_path) == []


def test_nothing_follows_a_failure(start, tmp_path):
    assert start("tiny", "rest", code=2).wait(60) == 2
    assert len(said(tmp_path)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_nothing_follows(start, tmp_path, number):
    process = start("tiny", "rest", seconds=30)
    while not said(tmp_path):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(60) == 75  # the second run is not done
    assert said(tmp_path)[1:] == [["saved"]]
