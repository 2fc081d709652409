"""A program of another Python: objects are sent and received, its end is noticed, its package is looked for."""

import os
import signal
import sys
import time

import pytest

from rest_jax.child import Child, find_python
from rest_jax.errors import RunStopped, UserError

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def child(program: str) -> Child:
    return Child("program", [sys.executable, "-c", program])


def test_objects_go_both_ways():
    with child(ECHO) as echo:
        for message in ({"a": 1}, {"text": "ü\n\U0001f600"}):
            echo.send(message)
        assert [echo.receive(), echo.receive()] == [{"a": 1}, {"text": "ü\n\U0001f600"}]
        assert echo.receive(block=False) is None


def test_output_of_others_is_no_message():
    with child("print('loading'); print(3); print('{\"ready\": true}')") as noisy:
        assert noisy.receive() == {"ready": True}


def test_a_program_that_fails_is_named_with_its_last_line():
    with child("raise SystemExit('no such task')") as failing:
        for _ in range(2):
            with pytest.raises(RunStopped, match=r"program: .* exit code 1: no such task$"):
                failing.receive()
        with pytest.raises(RunStopped, match="no such task"):
            failing.send({})


def test_a_wait_has_an_end():
    with child(ECHO) as echo, pytest.raises(RunStopped, match=r"no answer .* in 0\.01 s"):
        echo.receive(seconds=0.01)


def test_closing_ends_a_program_that_still_works():
    program = child("import sys; print('{}', flush=True); sys.stdin.read()")
    assert program.receive() == {}
    program.close()
    assert program._process.returncode == 0


def test_closing_does_not_wait_for_what_a_program_leaves_behind(monkeypatch):
    """It holds the program's outputs for as long as it lives."""
    monkeypatch.setattr("rest_jax.child._TO_READ", 0.2)
    left = "subprocess.Popen(['sleep', '60'], start_new_session=True)"
    program = child(f"import json, subprocess; print(json.dumps({{'pid': {left}.pid}}))")
    message = program.receive()
    assert message is not None
    begun = time.monotonic()
    program.close()
    os.kill(message["pid"], signal.SIGKILL)
    assert time.monotonic() - begun < 30


def test_finds_the_python_that_has_a_module(tmp_path):
    assert find_python(None, "json", "json") == sys.executable
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    assert find_python(tmp_path, "json", "json") == str(tmp_path / "bin" / "python")


@pytest.mark.parametrize("folder", [None, "venv", "missing"])
def test_says_how_to_install_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "absent").mkdir()  # as an environment of that name would be
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(os.path.realpath(sys.executable))
    install = "python -m venv {0} && {0}/bin/pip install nvidia-absent==1"
    with pytest.raises(UserError) as caught:
        find_python(folder, "absent", "nvidia-absent==1")
    assert install.format(folder or "absent") in str(caught.value)
    assert ("--data absent" in str(caught.value)) == (folder is None)
