"""Hub folders: one process of a host fetches, the others wait; a failure is said once."""

import pytest

from tests.runs import run_together

pytestmark = pytest.mark.multihost


def fetch(folder, *options):
    said = run_together("fetches_from_hub.py", str(folder / "log"), options=options)
    return [lines[-1] for lines in said], (folder / "log").read_text().splitlines()


def test_one_process_fetches_and_both_find_it(tmp_path):
    said, requests = fetch(tmp_path)
    assert said == [f"found {tmp_path}"] * 2
    assert requests == ["some/where"]


def test_a_failure_is_said_once(tmp_path):
    said, requests = fetch(tmp_path, "FAIL")
    assert "hub did not give it (no connection)" in said[0]
    assert said[1] == "said ''"
    assert requests == ["some/where"]
