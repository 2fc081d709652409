"""Starting over with huge pages: once, with the same command, and only where the kernel leaves them to the program."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from rest_jax import cli
from rest_jax.run import machine

MADVISE = "always [madvise] never\n"
VARIABLE = "GLIBC_TUNABLES"


@pytest.fixture
def execv(tmp_path, monkeypatch) -> list:
    """What `os.execv` was called with; a process without the variable and without jax, a kernel that says madvise."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "enabled")
    (tmp_path / "enabled").write_text(MADVISE)
    monkeypatch.setenv(VARIABLE, "to be put back")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    return calls


def test_the_same_command_once(execv, monkeypatch):
    monkeypatch.setattr(
        sys, "orig_argv", ["python3", "-X", "dev", "-m", "rest_jax", "train", "a b"]
    )
    machine.relaunch_tuned()
    words = ["-X", "dev", "-m", "rest_jax", "train", "a b"]
    assert execv == [(sys.executable, [sys.executable, *words])]
    assert os.environ[VARIABLE] == "glibc.malloc.hugetlb=1"
    machine.relaunch_tuned()  # what the new process does
    assert len(execv) == 1


@pytest.mark.parametrize("value", ["glibc.malloc.hugetlb=0", "glibc.malloc.check=1", ""])
def test_not_when_the_variable_is_set(execv, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    machine.relaunch_tuned()
    assert execv == [] and os.environ[VARIABLE] == value


@pytest.mark.parametrize("said", ["[always] madvise never\n", "always madvise [never]\n", "", None])
def test_not_when_the_kernel_does_not_ask(execv, said):
    if said is None:
        machine._HUGE_PAGES.unlink()
    else:
        machine._HUGE_PAGES.write_text(said)
    machine.relaunch_tuned()
    assert execv == [] and VARIABLE not in os.environ


def test_not_when_the_file_cannot_be_read(execv):
    machine._HUGE_PAGES.unlink()
    machine._HUGE_PAGES.mkdir()
    machine.relaunch_tuned()
    assert execv == []


def test_not_once_jax_is_there(execv, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", object())
    machine.relaunch_tuned()
    assert execv == [] and VARIABLE not in os.environ


def test_the_entry_point_relaunches_before_it_does_anything(monkeypatch):
    order = []
    monkeypatch.setattr(machine, "relaunch_tuned", lambda: order.append("relaunch"))
    monkeypatch.setattr(machine, "configure", lambda: order.append("configure"))
    monkeypatch.setattr(cli, "main", lambda: order.append("main") or 7)
    assert cli.entry() == 7
    assert order == ["relaunch", "configure", "main"]


def test_a_command_called_from_python_never_relaunches(execv, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert execv == [] and "rest-jax" in capsys.readouterr().out


PROGRAM = """
import json, os, pathlib, sys
from rest_jax.run import machine
machine._HUGE_PAGES = pathlib.Path(sys.argv[1])
with open(sys.argv[2], "a") as file:
    file.write("started\\n")
machine.relaunch_tuned()
assert "jax" not in sys.modules
print(json.dumps([os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[3:], sys.flags.utf8_mode]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is started over")
@pytest.mark.parametrize("said", [MADVISE, "[always] madvise never\n"])
def test_a_real_process(tmp_path, said):
    """Its number, its arguments and its interpreter's options stay; it runs twice, or once."""
    kernel, log = tmp_path / "enabled", tmp_path / "log"
    kernel.write_text(said)
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment |= {"PYTHONPATH": str(pathlib.Path(machine.__file__).parent.parent.parent)}
    words = ["-X", "utf8", "-c", PROGRAM, str(kernel), str(log), "two words", "train.steps=1", ""]
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    asked = said == MADVISE
    expected = [process.pid, "glibc.malloc.hugetlb=1" if asked else None]
    assert json.loads(out) == [*expected, ["two words", "train.steps=1", ""], 1]
    assert log.read_text().count("started") == (2 if asked else 1)
