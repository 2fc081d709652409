"""Hub folders: one process of a host fetches, the others wait; a failure is said once."""

import socket
import subprocess
import sys

import pytest

from tests.runs import PROGRAMS, environment, finish

pytestmark = pytest.mark.multihost


def fetch_in_two_processes(folder, *options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [sys.executable, str(PROGRAMS / "fetches_from_hub.py"), str(folder / "log"), address]
    started = [
        subprocess.Popen(
            [*words, str(i), *options],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [finish(process).splitlines()[-1] for process in started]
    return said, (folder / "log").read_text().splitlines()


def test_one_process_fetches_and_both_find_it(tmp_path):
    said, requests = fetch_in_two_processes(tmp_path)
    assert said == [f"found {tmp_path}"] * 2
    assert requests == ["some/where"]


def test_a_failure_is_said_once(tmp_path):
    said, requests = fetch_in_two_processes(tmp_path, "FAIL")
    assert "hub did not give it (no connection)" in said[0]
    assert said[1] == "said ''"
    assert requests == ["some/where"]
