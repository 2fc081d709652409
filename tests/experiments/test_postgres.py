"""A sweep on a real PostgreSQL server, which the test starts as an unprivileged user: four workers, one of them killed."""

import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile

import pytest

from rest_jax.experiments import storage
from rest_jax.run.metrics import read_lines

pytestmark = pytest.mark.services


@pytest.fixture
def postgres():
    """The URL of an empty database."""
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql: apt-get install postgresql")
    # Not tmp_path: only root may enter that.
    folder, tools = pathlib.Path(tempfile.mkdtemp(prefix="postgres")), found[-1].parent
    # The server refuses to run as root.
    user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    options = {"check": True, "stdout": subprocess.DEVNULL}
    if os.getuid() == 0:
        shutil.chown(folder, user)
        options["user"] = user
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    subprocess.run(
        [tools / "initdb", "-D", data, "-A", "trust", "-U", "rest"], cwd=folder, **options
    )
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [tools / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", settings, "start"], cwd=folder, **options)
    try:
        yield f"postgresql+psycopg://rest@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], cwd=folder, **options)
        shutil.rmtree(folder)


def test_four_workers_of_which_one_is_killed(
    recipe, write_space, tmp_path, start, steps, until, children, postgres
):
    """Two commands with two workers each, as on two machines: each point of the grid is done once, the killed worker's
    trial by another worker, from its checkpoint.
    """
    choices = [i / 10 for i in range(1, 11)]
    space = write_space(parameters={"curriculum.alpha_format": {"choices": choices}})
    commands = [start(recipe, space, 0.4, workers=2, url=postgres) for _ in range(2)]
    folder = tmp_path / "runs/some"

    def training() -> dict[int, pathlib.Path]:
        """Worker process -> the folder of its run, once that has trained four of its eight steps."""
        found = {}
        for worker in [pid for command in commands for pid in children(command.pid)]:
            for run in children(worker):
                for word in pathlib.Path(f"/proc/{run}/cmdline").read_text().split("\0"):
                    if word.startswith('name="'):
                        found[worker] = folder / word[6:-1]
        return found

    until(lambda: any(4 <= len(steps(run)) < 7 for run in training().values()))
    victim, run = next((w, run) for w, run in training().items() if 4 <= len(steps(run)) < 7)
    os.kill(victim, signal.SIGKILL)
    outs = [command.communicate(timeout=300)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0], outs

    import optuna

    study = optuna.load_study(study_name="some", storage=postgres)
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(t.params["curriculum.alpha_format"] for t in complete) == choices
    (retried,) = [t for t in complete if storage.attempts(t) == 2]
    assert retried.user_attrs[storage.RUN] == run.name
    assert all(storage.attempts(t) == 1 for t in complete if t is not retried)
    for trial in complete:
        trained = steps(folder / trial.user_attrs[storage.RUN])
        if trial is not retried:
            assert trained == list(range(1, 9))
            continue
        # Its second worker went back to the checkpoint of step 3 or 6, and not further.
        broken_off = max(i for i in range(1, len(trained)) if trained[i] <= trained[i - 1])
        assert trained[:broken_off] == list(range(1, broken_off + 1)) and broken_off >= 4
        assert trained[broken_off:] == list(range(broken_off // 3 * 3 + 1, 9))
        held = [x["step"] for x in read_lines(run / "metrics.jsonl") if "eval/reward" in x]
        assert held == [0, 2, 4, 6, 8]
    assert sum(": resumes" in out for out in outs) == 1
