"""Starting over with huge pages: once, with the same command, and only where nothing speaks against it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from rest_jax import cli
from rest_jax.run import environment

MADVISE = "always [madvise] never\n"
VARIABLE = "GLIBC_TUNABLES"
PROGRAM = pathlib.Path(__file__).parent / "programs" / "restart.py"


@pytest.fixture
def execv(tmp_path, monkeypatch) -> list:
    """What `os.execv` was called with, in a process without jax, debugger and launcher; a kernel that says madvise."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(environment, "HUGE_PAGES", tmp_path / "enabled")
    (tmp_path / "enabled").write_text(MADVISE)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TORCHELASTIC", "KUBERNETES", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv(VARIABLE, "to be put back")
    monkeypatch.delenv(VARIABLE)
    for name in ("jax", "pdb", "debugpy", "pydevd", "ipykernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    return calls


def test_the_same_command_once(execv, monkeypatch):
    words = ["-X", "dev", "-m", "rest_jax", "train", "a b"]
    monkeypatch.setattr(sys, "orig_argv", ["python3", *words])
    cli.restart_with_huge_pages()
    assert execv == [(sys.executable, [sys.executable, *words])]
    assert os.environ[VARIABLE] == "glibc.malloc.hugetlb=1"
    cli.restart_with_huge_pages()  # what the new process does
    assert len(execv) == 1


@pytest.mark.parametrize("value", ["glibc.malloc.hugetlb=0", "glibc.malloc.check=1", ""])
def test_not_when_the_variable_is_set(execv, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    cli.restart_with_huge_pages()
    assert execv == [] and os.environ[VARIABLE] == value


@pytest.mark.parametrize("said", ["[always] madvise never\n", "always madvise [never]\n", "", None])
def test_not_when_the_kernel_does_not_ask(execv, said):
    if said is None:
        environment.HUGE_PAGES.unlink()
        environment.HUGE_PAGES.mkdir()
    else:
        environment.HUGE_PAGES.write_text(said)
    cli.restart_with_huge_pages()
    assert execv == [] and VARIABLE not in os.environ


@pytest.mark.parametrize("module", ["jax", "pdb", "debugpy", "ipykernel"])
def test_not_under_a_debugger_in_a_notebook_or_after_jax(execv, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, object())
    cli.restart_with_huge_pages()
    assert execv == []


def test_not_while_something_traces(execv, monkeypatch):
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    cli.restart_with_huge_pages()
    assert execv == []


@pytest.mark.parametrize(
    "name",
    [
        "SLURM_JOB_ID",
        "OMPI_COMM_WORLD_RANK",
        "TORCHELASTIC_RUN_ID",
        "KUBERNETES_SERVICE_HOST",
        "JAX_COORDINATOR_ADDRESS",
    ],
)
def test_not_under_a_launcher(execv, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    cli.restart_with_huge_pages()
    assert execv == []


def test_the_entry_point_restarts_before_it_does_anything(monkeypatch):
    order = []
    monkeypatch.setattr(cli, "restart_with_huge_pages", lambda: order.append("restart"))
    monkeypatch.setattr(environment, "configure", lambda: order.append("configure"))
    monkeypatch.setattr(cli, "main", lambda: order.append("main") or 7)
    assert cli.entry() == 7
    assert order == ["restart", "configure", "main"]


def test_a_command_called_from_python_never_restarts(execv, capsys):
    assert cli.main(["--version"]) == 0
    assert execv == [] and "rest-jax" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is started over")
@pytest.mark.parametrize("said", [MADVISE, "[always] madvise never\n"])
def test_a_real_process(tmp_path, said):
    """Its number, its arguments and its interpreter's options stay; it runs twice, or once."""
    kernel, log = tmp_path / "enabled", tmp_path / "log"
    kernel.write_text(said)
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAM.parent.parent.parent)}
    words = [str(kernel), str(log), "two words", "train.steps=1", ""]
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", str(PROGRAM), *words],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    asked = said == MADVISE
    expected = [process.pid, "glibc.malloc.hugetlb=1" if asked else None]
    assert json.loads(out) == [*expected, ["two words", "train.steps=1", ""], 1]
    assert log.read_text().count("started") == (2 if asked else 1)
