"""launch/local.sh: the same words in every process, one GPU each; all end when one fails."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.runs import environment, free_port, lines, recipe

SCRIPT = "launch/local.sh"


def test_dry_run(fakes):
    printed = fakes.dry_run(SCRIPT, "2", "train", "scale/tiny", "name=a b")
    assert printed == (
        "env CUDA_VISIBLE_DEVICES=0 rest-jax train scale/tiny 'name=a b' --distributed 0/2@127.0.0.1:8476\n"
        "env CUDA_VISIBLE_DEVICES=1 rest-jax train scale/tiny 'name=a b' --distributed 1/2@127.0.0.1:8476\n"
    )


def test_gpus_and_port_are_the_users(fakes):
    printed = fakes.dry_run(SCRIPT, "2", "train", "x", CUDA_VISIBLE_DEVICES="5,3", PORT="99")
    assert printed.splitlines() == [
        f"env CUDA_VISIBLE_DEVICES={gpu} rest-jax train x --distributed {i}/2@127.0.0.1:99"
        for i, gpu in enumerate((5, 3))
    ]


def test_too_few_gpus(fakes):
    said = fakes.run(SCRIPT, "3", "train", "x", code=2, CUDA_VISIBLE_DEVICES="5,3")
    assert "CUDA_VISIBLE_DEVICES=5,3 has fewer than 3 GPUs" in said


@pytest.mark.parametrize("count", ["0", "-1", "x", "1+1", "a[0]"])
def test_a_count_that_is_none(fakes, count):
    assert "usage: " in fakes.run(SCRIPT, count, "train", "x", code=2)


def test_a_count_with_a_zero_is_decimal(fakes):
    assert len(fakes.dry_run(SCRIPT, "08", "train", "x", CUDA_VISIBLE_DEVICES="").splitlines()) == 8


def test_words_survive(fakes, words):
    expected = [["rest-jax", *words, "--distributed", f"{i}/2@127.0.0.1:8476"] for i in range(2)]
    fakes.run("bash", "-c", fakes.dry_run(SCRIPT, "2", *words))
    assert fakes.calls() == expected
    fakes.run(SCRIPT, "2", *words)
    assert sorted(fakes.calls()[2:]) == expected


def test_all_end_when_one_fails(fakes):
    fakes.answer(("1/3@", [{"code": 3}]), ("rest-jax", [{"seconds": 60}]))
    fakes.run(SCRIPT, "3", "train", "x", code=3)
    assert fakes.calls().count(["rest-jax", "saved"]) <= 2
    for process, *_ in fakes._noted():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on(fakes, number):
    fakes.answer(("rest-jax", [{"seconds": 60}]))
    launcher = fakes.start(SCRIPT, "2", "train", "x")
    while len(fakes.calls()) < 2:
        time.sleep(0.01)
    launcher.send_signal(number)
    assert launcher.wait(30) == 0
    assert fakes.calls().count(["rest-jax", "saved"]) == 2


@pytest.mark.multihost
def test_two_processes_train(model, tmp_path):
    program = tmp_path / "bin" / "rest-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m rest_jax "$@"\n')
    program.chmod(0o755)
    raw = recipe(model, tmp_path, train={"steps": 2, "checkpoint_every": 2})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw | {"mesh": {"data": 2, "fsdp": 1}}))
    variables = environment() | {
        "PORT": str(free_port()),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
    }
    subprocess.run(
        [REPOSITORY / SCRIPT, "2", "train", path], env=variables, check=True, timeout=400
    )
    assert [line["step"] for line in lines(tmp_path / "tiny") if "update/loss" in line] == [1, 2]
