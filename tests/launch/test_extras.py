"""What a launcher installs by itself has the client of the store, or of the database, that its command names."""

import re
import tomllib

import pytest
import yaml

from tests.conftest import REPOSITORY

LAUNCH = REPOSITORY / "launch"
# what a command names, and the extra with its client
CLIENTS = {"gs://": "gcs", "s3://": "s3", "--storage": "postgres"}
PODS = (REPOSITORY / "docs" / "pods.md").read_text()


def clients(command: str) -> set[str]:
    return {extra for word, extra in CLIENTS.items() if word in command}


def default(file: str, pattern: str) -> set[str]:
    (found,) = re.findall(pattern, (LAUNCH / file).read_text(), re.M)
    return set(found.split(","))


def printed(launcher: str) -> list[str]:
    """The commands of the page on pods that this launcher runs."""
    found = [line for line in PODS.splitlines() if re.match(rf" *[^`|]*launch/{launcher} ", line)]
    assert found, launcher
    return found


@pytest.mark.parametrize("launcher", ["tpu_vm.sh", "tpu_queued.sh"])
def test_a_wheel_on_tpus(launcher):
    extras = default("tpu_vm.sh", r"\$\{EXTRAS:-([\w,]+)\}")
    for command in printed(launcher):
        assert {"tpu", "gcs"} == {"tpu"} | clients(command) <= extras, command


def test_a_requirement_on_tpus():
    texts = [PODS, *(path.read_text() for path in LAUNCH.glob("tpu_*.sh"))]
    named = re.findall(r"rest-jax\[([\w,]+)\] @", "".join(texts))
    assert named and all({"tpu", "gcs"} <= set(one.split(",")) for one in named)


def test_an_image():
    extras = default("Dockerfile", r"^ARG EXTRAS=([\w,]+)$")
    for command in printed("jobset.py"):
        assert {"gcs"} == clients(command) <= extras, command
    for built in re.findall(r"EXTRAS=([\w,]+)", PODS):
        assert "gcs" in built.split(",")


def test_skypilot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    extras = set(task["envs"]["EXTRAS"].split(","))
    (command,) = re.findall(r"launch/skypilot.yaml (--env [^`]+)", PODS)
    assert {"gcs"} == clients(command) <= extras


def test_a_sweep():
    """In the image that its file asks for."""
    text = (LAUNCH / "sweep_job.yaml").read_text()
    extras = default("sweep_job.yaml", r"EXTRAS=([\w,]+)")
    (script,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"postgres"} == clients(script) <= extras
    page = (REPOSITORY / "docs" / "experiments.md").read_text()
    (named,) = re.findall(r"sweep_job\.yaml.*EXTRAS=([\w,]+)", page)
    assert set(named.split(",")) == extras


def test_all_of_them_exist():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = {*CLIENTS.values()}
    for path in [*LAUNCH.iterdir(), REPOSITORY / "docs" / "pods.md"]:
        if path.is_file():
            for one in re.findall(r"EXTRAS(?:=|: |:-)(\w+(?:,\w+)*)", path.read_text()):
                named |= set(one.split(","))
    assert named <= project["optional-dependencies"].keys()
