"""launch/skypilot.yaml: what a node runs, and what brings it back."""

import signal

import pytest
import yaml

from rest_jax import config
from tests.conftest import REPOSITORY

NODE = {
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
}
OUTPUT, DATA = "gs://bucket/a b", "gs://bucket/c d"


@pytest.fixture
def task() -> dict:
    return yaml.safe_load((REPOSITORY / "launch" / "skypilot.yaml").read_text())


def variables(task: dict) -> dict[str, str]:
    assert task["envs"]["OUTPUT"] is None and task["envs"]["DATA"] is None  # SkyPilot asks for them
    return {**task["envs"], "OUTPUT": OUTPUT, "DATA": DATA, **NODE}


def test_a_node_joins_the_first(fakes, task):
    fakes.run("bash", "-c", task["run"], **variables(task))
    (call,) = fakes.calls()
    assert call[:2] == ["rest-jax", "train"]
    assert call[-3:] == [f"output={OUTPUT}", "--distributed", "1/2@10.0.0.7:8476"]
    files, data = call[2:-5], call[-5:-3]
    assert data == [f"data.train={DATA}/train.parquet", f"data.eval={DATA}/test.parquet"]
    config.load(files, data)


def test_tpu_slices_find_out(fakes, task):
    fakes.run("bash", "-c", task["run"], **variables(task) | {"WORLD": "auto"})
    assert fakes.calls()[0][-1] == "auto"


def test_a_node_that_is_told_to_stop_is_recovered(fakes, task):
    fakes.answer(("rest-jax", [{"seconds": 60}]))
    node = fakes.start("bash", "-c", task["run"], **variables(task))
    fakes.process("rest-jax", "train")
    node.send_signal(signal.SIGTERM)
    assert node.wait(30) in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert fakes.calls()[-1] == ["rest-jax", "saved"]


def test_bad_input_ends_the_job(fakes, task):
    fakes.answer(("rest-jax", [{"code": 2}]))
    fakes.run("bash", "-c", task["run"], code=2, **variables(task))
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [143, 75]
    assert "max_restarts_on_errors" not in recovery


def test_the_installation(fakes, task):
    """It installs the repository with the extra, in the environment that the run uses."""
    tool = fakes.folder / ".local" / "bin" / "uv"
    tool.parent.mkdir(parents=True)
    tool.symlink_to(fakes.folder / "bin" / "curl")
    fakes.run("bash", "-c", task["setup"], **variables(task))
    home = str(fakes.folder / "rest_jax")
    environment, install = fakes.calls("uv")
    assert environment[-1] == home
    assert install[-3:] == ["--python", f"{home}/bin/python", ".[cuda,gcs]"]
