"""A run in a store equals one on a local file system bit for bit, through a kill; other commands use it where it is."""

import contextlib
import json
import signal
import subprocess
import sys

import jax
import pytest

from rest_jax import files
from rest_jax.data.files import JsonlWriter
from rest_jax.data.synthetic import world
from rest_jax.files import as_path, list_files
from rest_jax.models.hf.remote import COMMIT_FILE
from rest_jax.run.checkpoint import Checkpoints, newest_params
from rest_jax.run.folder import SAVED_FILE
from rest_jax.run.metrics import FILES, STEPS_FILE
from tests.programs.states import make_state
from tests.runs import (
    PROGRAMS,
    assert_same,
    environment,
    finish,
    lines,
    recipe,
    start,
    start_command,
    state,
)

pytestmark = pytest.mark.services


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state())


@pytest.fixture(params=["s3_server", "gs_server"])
def saved(request):
    """The URL of a run with checkpoints 1 and 2."""
    run = as_path(f"{request.getfixturevalue(request.param)}/{request.node.originalname}")
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"seen": step})
    return run


def test_checkpoints_come_back_bit_for_bit_and_old_ones_are_removed(saved):
    with Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(3, make_state(3), {"seen": 3})
        assert_same(checkpoints.restore(abstract()), (make_state(3), {"seen": 3}, 3))
        assert checkpoints._manager.all_steps() == [2, 3]
    found = {name.split("/")[1] for name in list_files(saved)}
    assert found == {"2", "3"}


def test_a_damaged_one_is_put_aside_and_its_step_can_be_written_again(saved, capsys):
    newest = saved / "checkpoints" / "2"
    found = list_files(newest)
    path = newest / max((n for n in found if "/d/" in n), key=lambda name: found[name]["size"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    with Checkpoints(saved) as checkpoints:
        assert_same(checkpoints.restore(abstract()), (make_state(1), {"seen": 1}, 1))
        assert f"checkpoint {newest} is damaged" in capsys.readouterr().err
        assert checkpoints.latest() == 1
        checkpoints.save(2, make_state(2), {"seen": 2})
        assert_same(checkpoints.restore(abstract()), (make_state(2), {"seen": 2}, 2))
    assert list_files(saved / "checkpoints" / "2.damaged").keys() == found.keys()


def test_one_without_its_commit_file_does_not_exist(saved, capsys):
    (saved / "checkpoints" / "2" / COMMIT_FILE).unlink()
    _, step = newest_params(saved)
    assert step == 1 and "damaged" not in capsys.readouterr().err
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, make_state(2), {"seen": 2})
        assert_same(checkpoints.restore(abstract()), (make_state(2), {"seen": 2}, 2))


@pytest.fixture(scope="module")
def trained(model, s3_server, tmp_path_factory):
    """The local folder of an unbroken run, and the URL of one that was killed and resumed; its data and model are there too."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.closing(JsonlWriter(folder / "train.jsonl")) as writer:
        for record in world.world("train", 0, 64, "mixed"):
            writer.write(record)
    local = recipe(model, folder / "runs")
    local["data"] |= {"train": str(folder / "train.jsonl")}
    finish(start("train", local, folder))
    files.upload(folder / "train.jsonl", as_path(f"{s3_server}/data/train.jsonl"))
    with files.atomic_folder(f"{s3_server}/model") as copy:
        for file in model.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    remote = recipe(f"{s3_server}/model", f"{s3_server}/runs")
    remote["data"] |= {"train": f"{s3_server}/data/train.jsonl"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        killed = start("train", remote, folder, program="killed_after_step.py")
        out = finish(killed, -signal.SIGKILL)
        assert "another process" not in out
        finish(start("train", remote, folder))
        yield folder / "runs" / "tiny", as_path(f"{s3_server}/runs/tiny")


def test_a_killed_and_resumed_run_equals_the_unbroken_local_one(trained):
    local, remote = trained
    assert lines(remote) == lines(local)
    for name in ("samples.jsonl", "tokens.jsonl"):
        assert (remote / name).read_bytes() == (local / name).read_bytes()
    assert_same(state(remote), state(local))
    names = {name.partition("/")[0] for name in list_files(remote)}
    files = {"config.yaml", "curves.png", *FILES}
    assert names == files | {"checkpoints", "model", SAVED_FILE, STEPS_FILE}


def test_a_run_in_a_store_is_audited(trained):
    _, remote = trained
    finish(start_command("audit", str(remote), "--steps", "1"))
    assert (remote / "audit.json").exists()
    (remote / "audit.json").unlink()


def test_evaluate_export_and_report_use_a_run_where_it_is(trained, model, s3_server, tmp_path):
    local, remote = trained
    words = {}
    for name, run in (("local", local), ("remote", remote)):
        words[f"evaluate {name}"] = ["evaluate", str(run), "synthetic:eval", "--limit", "8"]
        words[f"export {name}"] = ["export", str(run), str(tmp_path / name / "exported")]
        words[f"report {name}"] = ["report", str(run)]
    file = tmp_path / "commands.json"
    file.write_text(json.dumps(words))
    subprocess.run(
        [sys.executable, str(PROGRAMS / "commands.py"), str(file)], env=environment(), check=True
    )
    done = json.loads(file.read_text())
    assert all(code == 0 for code, _ in done.values()), done
    assert done["evaluate remote"] == done["evaluate local"]
    for name in ("curves.png", "report.html"):
        assert str(remote / name) in done["report remote"][1] and (remote / name).is_file()
    exported = {name: tmp_path / name / "exported" for name in ("local", "remote")}
    for path in sorted(exported["local"].iterdir()):
        content = path.read_bytes()
        if path.name == "README.md":  # has the config, with where its files are, and the commands
            moved = {
                local.parents[1] / "train.jsonl": f"{s3_server}/data/train.jsonl",
                local.parent: f"{s3_server}/runs",
                model: f"{s3_server}/model",
                exported["local"]: exported["remote"],
            }
            for here, there in moved.items():
                content = content.replace(str(here).encode(), str(there).encode())
        assert (exported["remote"] / path.name).read_bytes() == content, path.name


def test_a_converted_model_is_read_in_the_store(model, s3_server, tmp_path):
    url = f"{s3_server}/converted"
    words = {
        "convert": ["convert", str(model), url],
        "export": ["export", url, str(tmp_path / "back")],
        "again": ["convert", str(model), url],
    }
    file = tmp_path / "commands.json"
    file.write_text(json.dumps(words))
    subprocess.run(
        [sys.executable, str(PROGRAMS / "commands.py"), str(file)],
        env=environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        check=True,
    )
    done = json.loads(file.read_text())
    assert (done["convert"][0], done["export"][0], done["again"][0]) == (0, 0, 2), done
    back = tmp_path / "back" / "model.safetensors"
    assert back.read_bytes() == (model / "model.safetensors").read_bytes()
    assert not list((tmp_path / "cache").rglob("manifest.ocdbt"))


def test_a_fork_of_a_run_that_samples_ahead(model, s3_server, tmp_path):
    """In a store: it resumes, `--restart` makes it anew, and neither the other run nor a name that is taken is touched."""
    raw = recipe(
        model,
        f"{s3_server}/forks",
        rollout={"staleness": 1, "recompute_logprobs": True, "tis_cap": 2.0},
        train={"steps": 2, "eval_every": 0},
    )
    raw["data"] |= {"eval": None}
    finish(start("train", raw, tmp_path))
    origin, fork = (as_path(f"{s3_server}/forks/{name}") for name in ("tiny", "new"))
    there = {name: (origin / name).read_bytes() for name in list_files(origin)}
    words = ("train.steps=4", "optimizer.learning_rate=0.002", "--fork", "new")
    assert "fork of" in finish(start("train", raw, tmp_path, *words))
    found = lines(fork)
    assert [(line["step"], line["rollout/staleness"]) for line in found] == [(3, 0), (4, 1)]
    out = finish(start("train", raw, tmp_path, "train.steps=5", *words[1:]))
    assert "resumes after step 4" in out and lines(fork)[:2] == found
    assert "fork of" in finish(start("train", raw, tmp_path, *words, "--restart"))
    assert lines(fork) == found
    out = finish(start("train", raw, tmp_path, "name=new", "train.steps=9", "--fork", "tiny"), 2)
    assert "forks/tiny exists and is no fork of" in out
    assert {name: (origin / name).read_bytes() for name in list_files(origin)} == there


def test_a_missing_bucket_is_one_line_before_anything_is_loaded(tmp_path, s3_server):
    raw = recipe(tmp_path / "no-model", "s3://no-such-bucket/runs")
    out = finish(start("train", raw, tmp_path), 2)
    (line,) = [line for line in out.splitlines() if "error" in line]
    assert "s3://no-such-bucket/runs/tiny: " in line and "bucket does not exist" in line
