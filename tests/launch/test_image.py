"""launch/Dockerfile: what it copies exists; with a Docker daemon it is built as the quickstart's page says."""

import re
import shutil
import subprocess
import uuid

import pytest

from tests.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "launch" / "Dockerfile"


def test_what_is_copied_is_there_and_enough_for_the_wheel():
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE.read_text(), re.M)
    names = {name for line in copied for name in line.split()}
    assert all((REPOSITORY / name).exists() for name in names)
    project = (REPOSITORY / "pyproject.toml").read_text()
    (readme,) = re.findall(r'^readme = "(.*)"', project, re.M)
    (licence,) = re.findall(r'^license-files = \["(.*)"\]', project, re.M)
    needed = {"pyproject.toml", "setup.py", "requirements.txt", "configs", "rest_jax"}
    assert names == needed | {readme, licence}


def docker(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["docker", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.services
@pytest.mark.parametrize(("extras", "package"), [("", "jax"), ("cuda", "jax-cuda12-plugin")])
def test_it_builds_and_the_command_runs(extras, package):
    if not shutil.which("docker") or docker("info").returncode:
        pytest.skip("no Docker daemon")
    tag = f"rest-jax-test:{uuid.uuid4().hex}"
    built = docker(
        "build", "-f", "launch/Dockerfile", "--build-arg", f"EXTRAS={extras}", "-t", tag, "."
    )
    try:
        assert built.returncode == 0, built.stdout[-3000:]
        said = docker("run", "--rm", tag)
        assert said.returncode == 0 and "quickstart" in said.stdout, said.stdout
        version = f"import importlib.metadata as m; print(m.version({package!r}))"
        said = docker("run", "--rm", tag, "python", "-c", version)
        assert said.returncode == 0, said.stdout
    finally:
        docker("rmi", "--force", tag)
