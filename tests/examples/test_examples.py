"""What `rest-jax new` writes works as it is: its tests pass, the line it prints starts a run, and nothing is overwritten."""

import shlex
import subprocess
import sys
from typing import get_args

import pytest

from rest_jax import cli, config
from rest_jax.examples import USES, Kind, write_new
from rest_jax.rewards.plugin import check_plugin
from rest_jax.rl.plugins import check_traces
from rest_jax.rl.rules import check_rules
from tests.runs import environment

KINDS = get_args(Kind)


@pytest.mark.slow
def test_its_tests_pass(tmp_path):
    """Under another name, away from here; as they are, pytest runs them with all others."""
    for kind in KINDS:
        write_new(kind, f"my_{kind}", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout
    assert all(f"test_my_{kind}.py ." in done.stdout for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_that_is_printed_is_one_of_a_run(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", kind, "mine"]) == 0
    said = capsys.readouterr().out
    assert "NAME" not in said + (tmp_path / "mine.py").read_text()
    words = shlex.split(said.rpartition("rest-jax train FILES... ")[2])
    assert len(words) == len(USES[kind].split())
    loaded = config.load(["scale/tiny", "method/rest"], words)
    check_plugin(loaded.reward)
    check_rules(loaded)
    check_traces(loaded)
    before = (tmp_path / "mine.py").read_text()
    assert cli.main(["new", "reward", "mine"]) == 2
    assert "mine.py: exists, and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine.py").read_text() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [(["reward", "my-own"], "new reward my-own: a name of letters"), (["metric", "x"], "metric")],
    ids=["name", "kind"],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
