"""Launchers among programs that only note their words (tests/programs/fake_tool.py)."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

TOOLS = ("gcloud", "srun", "squeue", "scontrol", "rest-jax", "curl")
# What shells and their words are tried with.
WORDS = [
    "train",
    "scale/tiny",
    "method/rest",
    """name=it's "a" $HOME; `b` \\ c""",
    "output=gs://b/runs",
    "",
]


@dataclasses.dataclass
class Fakes:
    """A folder with fake programs, their answers and their calls."""

    folder: pathlib.Path

    def answer(self, *known: tuple[str, list[dict]]) -> None:
        """The answers to calls, see fake_tool.py."""
        (self.folder / "answers.json").write_text(json.dumps(known))

    def calls(self, *names: str) -> list[list[str]]:
        """Name and words of the calls, of those programs."""
        return [words for _, *words in self._noted() if not names or words[0] in names]

    def process(self, *start: str) -> int:
        """The process id of the last call that starts so, once there is one."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for process, *words in reversed(self._noted()):
                if tuple(words[: len(start)]) == start:
                    return process
            time.sleep(0.01)
        raise AssertionError(f"no call of {start} in {self.calls()}")

    def _noted(self) -> list[list]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(self, *command: str, **variables: str) -> subprocess.Popen:
        """Starts a launcher, or another command, in the repository."""
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        environment = {"PATH": path, "HOME": str(self.folder), "FAKES": str(self.folder)}
        # Where the tests run in the background, Ctrl-C is ignored, and a shell cannot trap what it inherits as ignored.
        return subprocess.Popen(
            ["env", "--default-signal=INT", *command],
            cwd=REPOSITORY,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, code: int = 0, **variables: str) -> str:
        """The output of a launcher that ends with this exit code."""
        process = self.start(*command, **variables)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (process.returncode, out, err, self.calls())
        return out if code == 0 else err

    def dry_run(self, *command: str, **variables: str) -> str:
        """What a launcher prints, which has called nothing."""
        printed = self.run(*command, DRY_RUN="1", **variables)
        assert self.calls() == []
        return printed


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    found = Fakes(tmp_path)
    program = (REPOSITORY / "tests" / "programs" / "fake_tool.py").read_text()
    for folder, names in (("bin", TOOLS), ("rest_jax/bin", ["rest-jax"])):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            path = tmp_path / folder / name
            path.write_text(f"#!{sys.executable} -IS\n{program}")
            path.chmod(0o755)
    found.answer()
    return found


@pytest.fixture
def words() -> list[str]:
    """A command whose words a careless shell would change."""
    return list(WORDS)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@dataclasses.dataclass
class Stages:
    """A folder in which scripts run a rest-jax that only notes its words (tests/programs/fake_rest_jax.sh)."""

    folder: pathlib.Path

    def start(
        self, script: str, *words: str, seconds: float = 0, code: int = 0, **variables: str
    ) -> subprocess.Popen[str]:
        """Starts launch/<script>, each of whose commands takes so long and ends with that code."""
        environment = os.environ | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        environment |= {"LOG": str(self.folder / "log")}
        environment |= {"SECONDS_EACH": str(seconds), "CODE": str(code), **variables}
        # Where the tests run in the background, Ctrl-C is ignored, and a shell cannot trap what it inherits as ignored.
        return subprocess.Popen(
            [str(REPOSITORY / "launch" / script), *words], cwd=self.folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def said(self) -> list[list[str]]:
        """The words of each command so far."""
        path = self.folder / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def stages(tmp_path) -> Stages:
    """For scripts that run one command after the other."""
    fake = tmp_path / "bin" / "rest-jax"
    fake.parent.mkdir()
    shutil.copy(REPOSITORY / "tests" / "programs" / "fake_rest_jax.sh", fake)
    fake.chmod(0o755)
    return Stages(tmp_path)
