"""All launchers: bash reads them, shellcheck finds nothing, and what says how to call one says it to a wrong call."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "launch").glob("*.sh"))


def test_there_are_scripts():
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_reads_it(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.name != "sweep_slurm.sh"], ids=lambda s: s.name
)
def test_a_call_without_words_shows_the_usage(script, fakes):
    assert "usage: " in fakes.run(str(script), code=2)
    assert fakes.calls() == []
