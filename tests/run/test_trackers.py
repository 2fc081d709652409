"""Trackers: refused in one line before a run, given up with one warning in it, and the real packages without a network."""

import http.server
import json
import math
import os
import pathlib
import re
import sqlite3
import subprocess
import sys
import threading
import time
import types

import pytest
from etils import epath

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.run import folder as run_folder
from rest_jax.run import trackers
from rest_jax.run.folder import check_start
from rest_jax.run.metrics import METRICS_FILE, MetricsWriter, read_lines
from tests import runs

ALL = ("train.tensorboard=true", "train.wandb_project=tools", "train.trackio_project=tools")


def make_config(tmp_path: pathlib.Path, *overrides: str) -> Config:
    raw = {"name": "tiny", "output": str(tmp_path / "runs"), "model": {"source": "hf"}}
    return config_lib.from_overrides(raw, overrides)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)


# --- before a run


@pytest.mark.parametrize(
    ("override", "package"), list(zip(ALL, ("tensorboard", "wandb", "trackio"), strict=True))
)
def test_a_missing_package_is_named_before_a_folder_is_made(
    tmp_path, monkeypatch, override, package
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = make_config(tmp_path, override)
    with pytest.raises(UserError, match=f"train.{package}.*pip install {package}"):
        check_start(config)
    assert not config.folder.exists()


def test_a_login_that_is_missing_is_one_line_before_a_folder_is_made(
    tmp_path, monkeypatch, installed
):
    def login(verify: bool) -> None:
        raise RuntimeError("No API key\nconfigured\x1b[0m.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    config = make_config(tmp_path, ALL[1])
    with pytest.raises(UserError, match=r"train\.wandb_project.*No API key configured") as caught:
        check_start(config)
    said = str(caught.value)
    assert not {"\n", "\x1b"} & set(said) and "WANDB_MODE=offline" in said
    assert not config.folder.exists()


def test_a_tracker_that_is_down_does_not_keep_a_run_from_resuming(tmp_path, monkeypatch, installed):
    def login(verify: bool) -> None:
        raise RuntimeError("no answer")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    config = make_config(tmp_path, ALL[1])
    config.folder.mkdir(parents=True)
    recorded = config.folder / "config.yaml"
    recorded.write_text(config_lib.dump(config))
    check_start(config)
    with pytest.raises(UserError, match="no answer"):
        check_start(config, restart=True)
    recorded.write_text(config_lib.dump(make_config(tmp_path)))  # it had none
    with pytest.raises(UserError, match="no answer"):
        check_start(config)


def test_a_login_that_hangs_is_given_up(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(trackers, "PATIENCE", 0.05)
    fake = types.SimpleNamespace(login=lambda verify: time.sleep(1))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="no answer within"):
        check_start(make_config(tmp_path, ALL[1]))


@pytest.fixture
def on_this_machine(tmp_path, monkeypatch, installed):
    """Trackio with a folder of its own, and no word of a server."""
    for name in ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "TRACKIO_WRITE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    utils = types.SimpleNamespace(TRACKIO_DIR=tmp_path / "trackio")
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "trackio.utils", utils)
    return make_config(tmp_path, ALL[2])


def test_trackio_needs_a_folder_that_can_be_written(on_this_machine, tmp_path, monkeypatch):
    check_start(on_this_machine)
    assert (tmp_path / "trackio").is_dir()
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("trackio"))
    with pytest.raises(UserError, match=r"train\.trackio_project: Trackio.*cannot be written"):
        check_start(on_this_machine)


def test_a_server_of_trackio_needs_a_token_and_answers(on_this_machine, monkeypatch):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    monkeypatch.setenv("TRACKIO_SERVER_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match="TRACKIO_WRITE_TOKEN is not set"):
        check_start(on_this_machine)
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "t")
    threading.Thread(target=server.handle_request, daemon=True).start()
    check_start(on_this_machine)
    server.server_close()
    with pytest.raises(UserError, match=r"Connection refused.*unset TRACKIO_SERVER_URL"):
        check_start(on_this_machine)


# --- in a run


class Fake:
    """A package of a tracker, in memory. `broken`: the function that raises."""

    def __init__(self, broken: str = ""):
        self.broken, self.started, self.seen = broken, {}, []

    def init(self, **options):
        self.started.update(options)
        return (
            types.SimpleNamespace(log=self._log, finish=self._finish) if self._may("init") else None
        )

    def _may(self, name):
        if name == self.broken:
            raise ConnectionError("the network\nis gone")
        return True

    def _log(self, values, step):
        if self._may("log"):
            self.seen.append((step, values))

    def _finish(self):
        if self._may("finish"):
            self.seen.append("end")


def write(config: Config, tmp_run: pathlib.Path) -> list[dict]:
    writer = MetricsWriter(tmp_run, config)
    for step in (3, 4):
        writer.write(step, {"reward/mean": 0.5, "reward/max": math.nan})
    writer.close()
    return read_lines(tmp_run / METRICS_FILE)


def test_each_gets_the_lines_a_lasting_name_and_the_config(tmp_path, tmp_run, monkeypatch):
    fakes = {name: Fake() for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    write(make_config(tmp_path, *ALL[1:]), tmp_run)
    line = {"reward/mean": 0.5}
    assert fakes["wandb"].seen == [(step, line | {"reward/max": None}) for step in (3, 4)] + ["end"]
    assert fakes["trackio"].seen == [(3, line), (4, line), "end"]
    for fake in fakes.values():
        assert fake.started["project"] == "tools" and fake.started["resume"] == "allow"
        assert fake.started["config"]["seed"] == 0
    name = fakes["trackio"].started["name"]
    assert re.fullmatch("tiny-[0-9a-f]{6}", name)
    assert (fakes["wandb"].started["id"], fakes["wandb"].started["name"]) == (name, "tiny")


def test_a_run_keeps_its_name_until_it_is_made_anew(tmp_path, tmp_run, monkeypatch):
    config = make_config(tmp_path, ALL[2])

    def named(folder: pathlib.Path) -> str:
        monkeypatch.setitem(sys.modules, "trackio", fake := Fake())
        write(config, folder)
        return fake.started["name"]

    first = named(tmp_run)
    assert named(tmp_run) == first
    others = {named(tmp_run.parent / "elsewhere"), first}
    run_folder._forget(epath.Path(tmp_run))
    others.add(named(tmp_run))
    assert len(others) == 3
    # one that was begun before names were kept
    (tmp_run / trackers.NAME_FILE).unlink()
    assert named(tmp_run) == "tiny"


def test_what_opens_after_it_was_given_up_is_closed_and_gets_nothing(
    tmp_path, tmp_run, monkeypatch, capsys
):
    monkeypatch.setattr(trackers, "PATIENCE", 0.05)
    opens, fake = threading.Event(), Fake()
    init = fake.init
    fake.init = lambda **options: opens.wait(10) and init(**options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricsWriter(tmp_run, make_config(tmp_path, ALL[1]))
    assert "is given up: no answer within 0.05 s" in capsys.readouterr().err
    opens.set()
    for thread in threading.enumerate():
        if thread.name == "tracker":
            thread.join(10)
    writer.write(3, {"reward/mean": 0.5})
    writer.close()
    assert fake.seen == ["end"]


@pytest.mark.parametrize("key", ["wandb", "trackio"])
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_one_that_is_lost_is_one_warning_and_the_run_goes_on(
    tmp_path, tmp_run, monkeypatch, capsys, key, broken
):
    monkeypatch.setitem(sys.modules, key, Fake(broken))
    lines = write(make_config(tmp_path, f"train.{key}_project=tools"), tmp_run)
    assert [line["step"] for line in lines] == [3, 4]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("rest-jax: warning: ") and "is given up: the network is gone;" in said


def test_a_token_in_an_address_is_not_told(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "localhost/?write_token=secret")
    with pytest.raises(UserError, match=r"unknown url type: .localhost/") as stop:
        trackers.check_trackers(make_config(tmp_path, "train.trackio_project=tools"))
    assert "secret" not in str(stop.value)


def test_one_that_does_not_end_is_not_waited_for(tmp_path, tmp_run, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE", 0.05)
    fake = Fake()
    fake._finish = lambda: time.sleep(1)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert len(write(make_config(tmp_path, ALL[1]), tmp_run)) == 2
    assert "no answer within 0.05 s" in capsys.readouterr().err


def test_tensorboard_gets_the_same_values(tmp_path, tmp_run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(make_config(tmp_path, ALL[0]), tmp_run)
    events = EventAccumulator(str(tmp_run / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["reward/mean"]
    first, second = events.Tensors("reward/mean")
    assert (first.step, second.step, first.tensor_proto.float_val[0]) == (3, 4, 0.5)


# --- the packages themselves, without a network, each in a process of its own


def track(folder: pathlib.Path, override: str, code: int = 0, **environment: str) -> str:
    """What tests/programs/track.py says; no variable of a tracker but these."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    path = os.pathsep.join([str(runs.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(runs.PROGRAMS / "track.py"), str(folder), override],
        env=kept | {"PYTHONPATH": path, "HOME": str(folder)} | environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code and "is given up" not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.services
def test_trackio_itself(tmp_run, monkeypatch):
    pytest.importorskip("trackio")
    home = tmp_run / "trackio"
    for _ in range(2):  # the second resumes the run of the first
        track(tmp_run, ALL[2], TRACKIO_DIR=str(home), HF_HUB_OFFLINE="1")
    with sqlite3.connect(home / "tools.db") as database:
        found = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        logged = [(run, step, json.loads(values)) for run, step, values in found]
    name = (tmp_run / trackers.NAME_FILE).read_text().strip()
    assert logged == 2 * [(name, step, {"reward/mean": 0.5}) for step in (3, 4)]


@pytest.mark.services
def test_wandb_itself(tmp_run):
    pytest.importorskip("wandb")
    track(tmp_run, ALL[1], WANDB_MODE="offline")
    (kept,) = tmp_run.glob("wandb/offline-run-*/run-tiny-*.wandb")
    assert b"reward/mean" in kept.read_bytes()


@pytest.mark.services
@pytest.mark.parametrize("key", ["", 40 * "a"], ids=["no login", "no network"])
def test_wandb_that_cannot_be_used(tmp_run, key):
    pytest.importorskip("wandb")
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": str(tmp_run / "netrc")}
    said = track(tmp_run, ALL[1], code=2, **nowhere, **({"WANDB_API_KEY": key} if key else {}))
    assert said.splitlines()[-1].startswith(
        "train.wandb_project: Weights & Biases cannot be used: "
    )
    assert not (tmp_run / METRICS_FILE).exists()
