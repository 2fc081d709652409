"""Runs and checkpoints as they are listed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from rest_jax import cli
from rest_jax.config import Config, dump, load
from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.rl.curriculum import Schedule, init
from rest_jax.run.checkpoint import MANIFEST, Checkpoints
from rest_jax.run.contents import MADE_OF
from rest_jax.run.folder import CONFIG_FILE
from rest_jax.run.lock import OWNER, begun, locked
from rest_jax.run.metrics import STEPS_FILE, MetricsWriter
from rest_jax.run.overview import QUIET, describe_checkpoint, list_runs
from rest_jax.types import TrainState
from tests import tiny


def make_run(folder, name, steps=4, done=2, owner=None, **metrics):
    """A run that has written a line of metrics."""
    path = folder / name
    path.mkdir(parents=True)
    raw = {"name": name, "model": {"source": "m"}, "train": {"steps": steps}}
    (path / CONFIG_FILE).write_text(dump(Config.model_validate(raw)))
    if metrics:
        writer = MetricsWriter(path)
        writer.write(done, metrics)
        writer.close()
    if owner is not None:
        (path / OWNER).write_text(json.dumps(owner))
    return path


def test_runs_have_state_step_figure_and_host(tmp_path, capsys):
    here = socket.gethostname()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = {"host": here, "pid": os.getpid(), "begun": begun(os.getpid())}
    make_run(tmp_path, "alive", owner=owner, **{"reward/mean": 1.5})
    make_run(tmp_path, "dead", owner=owner | {"pid": gone.pid}, **{"update/loss": 0.25})
    other = make_run(tmp_path, "other", owner={"host": "far", "pid": os.getpid()})
    os.utime(other / OWNER, (1e9, 1e9))
    make_run(tmp_path, "done", done=4, **{"eval/exact": 0.5, "reward/mean": 9.0})
    broken = make_run(tmp_path, "broken")
    (broken / CONFIG_FILE).write_text("train: {step: 3\n")
    (tmp_path / "no run").mkdir()
    for age, name in enumerate(("done", "alive", "dead", "other", "broken")):
        for file in ("metrics.jsonl", CONFIG_FILE):
            if (tmp_path / name / file).exists():
                os.utime(tmp_path / name / file, (1e9 - age, 1e9 - age))
    assert cli.main(["runs", str(tmp_path)]) == 0
    header, _, *rows, fault = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "step", "of", "figure", "moved", "host"]
    cells = [row.split() for row in rows]
    assert [row[:6] for row in cells[:3]] == [
        ["done", "finished", "4", "4", "exact", "50.0%"],
        ["alive", "training", "2", "4", "reward", "1.5"],
        ["dead", "stopped", "2", "4", "loss", "0.25"],
    ]
    assert cells[1][-1] == here and cells[3][:5] == ["other", "stopped?", "0", "4", "-"]
    assert cells[3][-1] == "far" and cells[4][:2] == ["broken", "unreadable"]
    assert fault.startswith(f"broken: {broken / CONFIG_FILE}: line 2: ")


def test_a_run_of_a_version_with_other_keys_is_listed(tmp_path):
    """Its config is shown, not used."""
    path = make_run(tmp_path, "old", done=4, **{"eval/exact": 0.5})
    with (path / CONFIG_FILE).open("a") as file:
        file.write("gone: {key: 3}\n")
    (row,) = list_runs(tmp_path).splitlines()[2:]
    assert row.split()[:6] == ["old", "finished", "4", "4", "exact", "50.0%"]


@pytest.mark.parametrize(
    ("file", "done"), [(OWNER, 2), ("metrics.jsonl", 2), (None, 2), (OWNER, 4)]
)
def test_a_run_on_another_host_is_judged_by_when_it_wrote_last(tmp_path, file, done):
    path = make_run(tmp_path, "r", done=done, owner={"host": "far", "pid": 1}, **{"update/loss": 1})
    for name in (OWNER, "metrics.jsonl", CONFIG_FILE):
        age = time.time() - QUIET + (60 if name == file else -60)
        os.utime(path / name, (age, age))
    state = "finished" if done == 4 else "training?" if file else "stopped?"
    assert list_runs(tmp_path).splitlines()[2].split()[1] == state


@pytest.mark.parametrize(("complete", "state"), [(True, "finished"), (False, "stopped")])
def test_a_run_that_says_so_is_finished(tmp_path, complete, state):
    """Whatever the config and the last line say: it may count in epochs, and be killed in its last save."""
    for name, steps in (("epochs", None), ("steps", 4)):
        path = make_run(tmp_path, name, steps=steps, done=4, **{"update/loss": 1})
        (path / STEPS_FILE).write_text(json.dumps({"steps": 6, "complete": complete}))
        with locked(as_path(path)):
            assert "training" in list_runs(tmp_path)
    # This process, which lives on, trains them no more.
    for row in list_runs(tmp_path).splitlines()[2:]:
        assert row.split()[1:4] == [state, "4", "6"] and row.endswith(socket.gethostname())
    (path / STEPS_FILE).write_text("[]")
    assert list_runs(tmp_path).count("finished") == 1 + complete


@pytest.mark.parametrize(("done", "state"), [(2, "stopped"), (4, "finished")])
@pytest.mark.parametrize(
    "other", [{"begun": "of a boot before/7"}, {"pid": 10**30}, {"pid": -1}], ids=str
)
def test_a_run_is_not_that_of_another_process_of_its_number(tmp_path, other, done, state):
    """As in a container, where a name and a number come again; with the lock of this process it is."""
    with locked(as_path(make_run(tmp_path, "r", done=done, **{"update/loss": 1}))):
        assert list_runs(tmp_path).splitlines()[2].split()[1] == "training"
        owner = json.loads((tmp_path / "r" / OWNER).read_text())
        (tmp_path / "r" / OWNER).write_text(json.dumps(owner | other))
        assert list_runs(tmp_path).splitlines()[2].split()[1] == state


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere", "no such folder"), ("empty", r"no runs in it .*config\.yaml")]
)
def test_a_folder_without_runs(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=reason):
        list_runs(tmp_path / name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints, in the second of which names have been seen."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    curriculum = init(tiny.step_config().schedule)
    seen = curriculum.seen.at[3].set(2)
    later = TrainState(
        jnp.int32(7),
        tiny.params(),
        {},
        jnp.zeros(2),
        curriculum.replace(seen=seen, nu=jnp.float32(0.25)),
    )
    folder.mkdir()
    given = ["model.source=hf", "name=mine", "optimizer.learning_rate=1e-3"]
    (folder / "config.yaml").write_text(dump(load([], given)))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, later.replace(curriculum=curriculum), {})
        checkpoints.save(7, later, {MADE_OF: {"prompts": "abc"}})
    return folder


def test_a_checkpoint_is_told_by_its_step_curriculum_shapes_and_digest(run, capsys):
    assert isinstance(tiny.step_config().schedule, Schedule)
    assert cli.main(["inspect", str(run), "--verify"]) == 0
    said = capsys.readouterr().out
    assert (
        f"checkpoint {run}/checkpoints/7: every file is what was saved\nstep 7, 0.0 M parameters\n"
        in said
    )
    assert "made of prompts abc" in said and "nu 0.25" in said
    (embed,) = (line for line in said.splitlines() if line.startswith("params.embed "))
    assert embed.split()[1] == "96x32"
    (heads,) = (line for line in said.splitlines() if line.startswith("region "))
    assert " ".join(heads.split()).startswith("region base weight entropy in force gini in force")
    (name,) = (line for line in said.splitlines() if line.startswith("name "))
    assert name.split()[1] == "1"
    (rate,) = (line for line in said.splitlines() if line.startswith("optimizer.learning_rate "))
    assert rate.split()[1:] == ["0.001", "1e-06"]
    first = describe_checkpoint(run / "checkpoints" / "3")
    assert "step 3," in first and "nothing on record" in first and "name " not in first


def test_a_checkpoint_of_a_version_with_other_keys_is_told(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "old")
    with (folder / CONFIG_FILE).open("a") as file:
        file.write("gone: {key: 3}\n")
    shown = [" ".join(line.split()) for line in describe_checkpoint(folder).splitlines()]
    assert {"model.source hf -", "optimizer.learning_rate 0.001 1e-06", "gone.key 3 -"} <= {*shown}


@pytest.mark.parametrize("name", ["7", "best", "7.damaged"])
def test_a_checkpoint_is_shown_wherever_it_is_and_whatever_its_name(
    run, tmp_path, monkeypatch, name
):
    shutil.copytree(run / "checkpoints" / "7", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    said = describe_checkpoint(name)
    assert said.startswith(f"checkpoint {tmp_path / name}\n{'step 7' if name == '7' else name}, ")
    assert "nu 0.25" in said


@pytest.mark.parametrize(
    "file", ["params/_METADATA", "rest/_METADATA", "rest/manifest.ocdbt", "loader/metadata"]
)
@pytest.mark.parametrize("content", [b"", b"\0" * 9, None])
def test_a_file_that_is_cut_is_damage(run, tmp_path, file, content):
    folder = shutil.copytree(run / "checkpoints" / "7", tmp_path / "7")
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(UserError, match="7: damaged: ") as told:
        describe_checkpoint(folder)
    assert len(str(told.value)) < 400 and "\n" not in str(told.value)


def test_a_damaged_checkpoint_is_named(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "copy") / "checkpoints" / "7"
    file = max(folder.glob("params/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert cli.main(["inspect", str(folder), "--verify"]) == 2
    said = capsys.readouterr().err
    assert "damaged" in said and file.name in said and len(said.splitlines()) == 1
    for content in ("", "{}", "[1]", '{"params/x": 0}'):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(UserError, match=r"7: damaged: manifest\.json"):
            describe_checkpoint(folder)
    folder.rename(folder.with_name("7.damaged"))
    assert "step 3," in describe_checkpoint(folder.parents[1])
    folder.with_name("7.damaged").rename(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="neither a checkpoint nor a run with one"):
        describe_checkpoint(folder)
