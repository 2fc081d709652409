"""A run's folder: one process at a time, one config, complete side files, strict NaN guard, lines before checkpoints."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.files import Location
from rest_jax.run import folder, lock
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.contents import MADE_OF
from rest_jax.run.folder import (
    CONFIG_FILE,
    EVALUATION,
    RL_FINITE,
    SAVED_FILE,
    SUPERVISED_FINITE,
    Run,
    check_config,
    check_start,
    not_finite,
    open_run,
)
from rest_jax.run.fork import Origin, Start
from rest_jax.run.lock import FILE, OWNER
from rest_jax.run.metrics import METRICS, METRICS_FILE, SAMPLES_FILE, STEPS_FILE, read_lines
from rest_jax.run.record import CERTIFICATE_FILE
from rest_jax.types import TrainState
from tests.programs.states import make_state

START = Start({"seen": 0}, updates=1)
REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path) -> pathlib.Path:
    """A model folder: side files and weights."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text("{}")
    for name in ("model.safetensors", "model.safetensors.index.json", "rest_jax.json", "notes.md"):
        (folder / name).write_text("not copied")
    return folder


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path)


def make_config(tmp_path: pathlib.Path, *overrides: str) -> Config:
    raw = {"name": "tiny", "output": str(tmp_path / "runs"), "model": {"source": "hf"}}
    return config_lib.from_overrides(raw, overrides)


def begun(config: Config, files: pathlib.Path, restart: bool = False) -> Run:
    """An open run behind all that could refuse it."""
    run = open_run(config, files, restart)
    run.begin()
    return run


def content(run: Location) -> dict[str, bytes]:
    """Every file in a run's folder but those of its lock, by path."""
    files = (path for path in pathlib.Path(run).rglob("*") if path.is_file())
    return {str(x): x.read_bytes() for x in files if x.name not in (FILE, OWNER)}


def begin(config: Config, files: pathlib.Path) -> None:
    """A run that has written a line."""
    begun(config, files).close()
    (config.folder / METRICS_FILE).write_text('{"step": 1}\n')


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def test_a_new_run_has_its_config_and_the_side_files_alone(config, files):
    with contextlib.closing(begun(config, files)) as run:
        assert config_lib.load([run.folder / CONFIG_FILE]) == config
        names = {path.name for path in (run.folder / "model").iterdir()}
        assert names == {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"}
        run.save(1, make_state(), {})
    fresh = make_state()
    (files / "NOTICE").symlink_to("/etc/hostname")  # which would be refused
    with contextlib.closing(open_run(config, files)) as run:
        run.resume(lambda: fresh, abstract(fresh), {}, START)
    with contextlib.closing(open_run(config, files / "gone")) as run:
        run.resume(lambda: fresh, abstract(fresh), {}, START)  # what is there is not copied again
    assert {path.name for path in (config.folder / "model").iterdir()} == names


def test_a_run_that_has_not_begun_has_the_model_of_its_newest_launch(config, files):
    begun(config, files).close()  # and then there was no room for its first step
    (files / "tokenizer.json").write_text("another")
    (files / "LICENSE").unlink()
    begun(config, files).close()
    copied = config.folder / "model"
    assert (copied / "tokenizer.json").read_text() == "another" and not (
        copied / "LICENSE"
    ).exists()


def test_in_a_store_it_has_it_too(files, tmp_path, memory_store, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE", 0)
    config = make_config(tmp_path, f"output={memory_store}")
    copied = config.folder / "model"
    for anew, names in ((True, {"a.json"}), (False, {"b.json"}), (True, {"c.json"})):
        for file in files.glob("?.json"):
            file.unlink()
        (files / min(names)).write_text("{}")
        folder._put_model_files(files, copied, anew)
        found = {path.name for path in copied.iterdir()}
        assert found & {"a.json", "b.json", "c.json"} == (names if anew else {"a.json"})


@pytest.mark.parametrize("restart", [False, True])
def test_a_launch_that_is_refused_changes_nothing(saved, files, tmp_path, restart):
    """By what is known only when the model is loaded, as its memory is, or when a checkpoint is read."""
    before = content(saved.folder)
    words = ("train.checkpoint_every=1", "train.steps=9", *(["seed=3"] if restart else []))
    other, fresh = make_config(tmp_path, *words), make_state()
    (files / "tokenizer.json").write_text("another")
    open_run(other, files, restart).close()
    assert content(saved.folder) == before
    if not restart:
        with contextlib.closing(open_run(other, files)) as run:
            run.launch = {MADE_OF: {"prompts": "others"}}
            with pytest.raises(UserError, match="was made of other prompts"):
                run.resume(lambda: fresh, abstract(fresh), {}, START)
        assert content(saved.folder) == before


def test_a_launch_that_is_refused_puts_no_checkpoint_aside(saved, files, tmp_path):
    """Nor does it remove what a killed save has left: whoever named other data may still mend them."""
    folder, fresh = pathlib.Path(saved.folder / "checkpoints"), make_state()
    newest = max(map(int, (path.name for path in folder.iterdir() if path.name.isdigit())))
    (folder / f"{newest + 1}.orbax-checkpoint-tmp-1").mkdir()
    cut = next(path for path in (folder / str(newest) / "params").rglob("*") if path.is_file())
    cut.write_bytes(b"")
    before = content(saved.folder)
    with contextlib.closing(open_run(saved, files)) as run:
        run.launch = {MADE_OF: {"prompts": "others"}}
        with pytest.raises(UserError, match="was made of other prompts"):
            run.resume(lambda: fresh, abstract(fresh), {}, START)
    assert content(saved.folder) == before
    assert (folder / f"{newest + 1}.orbax-checkpoint-tmp-1").is_dir()


@pytest.mark.parametrize("fault", ["lock", "files"])
def test_what_is_refused_as_a_run_begins_has_forgotten_nothing(saved, files, monkeypatch, fault):
    """The lock of a store may be lost while a launch compiles; side files are read now."""
    before = content(saved.folder)
    with contextlib.closing(open_run(saved, files, restart=True)) as run:
        if fault == "lock":
            monkeypatch.setattr(run, "check_lock", torn)
        else:
            (files / "NOTICE").symlink_to("/etc/hostname")
        with pytest.raises(
            (UserError, KeyboardInterrupt), match="NOTICE" if fault == "files" else None
        ):
            run.begin()
    assert content(saved.folder) == before


def test_the_beginning_of_a_run_has_an_end(config, files, monkeypatch):
    """What it waits for is named to whoever stops the run, as for a save."""
    waited = []
    with contextlib.closing(open_run(config, files)) as run:
        waiting = run.stop.waiting
        monkeypatch.setattr(run.stop, "waiting", lambda what: waited.append(what) or waiting(what))
        run.begin()
    assert waited[0] == f"{config.folder}: the beginning of the run"


@pytest.mark.parametrize(
    "name", ["read_results", "write_origin", "MetricsWriter", "copy_side_files", "Checkpoints"]
)
def test_a_restart_that_is_torn_is_made_by_the_same_command(
    saved, files, tmp_path, name, monkeypatch
):
    other, fresh = make_config(tmp_path, "seed=3"), make_state()
    origin = Origin(str(tmp_path), 1, "") if name == "write_origin" else None
    with monkeypatch.context() as patch:
        patch.setattr(folder, name, torn)
        with (
            contextlib.closing(open_run(other, files, True, origin)) as run,
            pytest.raises(KeyboardInterrupt),
        ):
            run.begin()
    check_start(other, restart=True)
    with contextlib.closing(open_run(other, files, restart=True)) as run:
        assert run.resume(lambda: fresh, abstract(fresh), {}, START)[2] == 0
        run.write(1, {"reward/mean": 1.0})
    assert config_lib.load([other.folder / CONFIG_FILE]) == other
    assert [line["step"] for line in read_lines(other.folder / METRICS_FILE)] == [1]


def torn(*_, **__) -> None:
    raise KeyboardInterrupt


def test_a_folder_of_another_config_is_refused_with_every_difference(config, files, tmp_path):
    begin(config, files)
    other = make_config(tmp_path, "seed=3", "loss.clip_low=0.1", "train.steps=7")
    for refuse in (lambda: check_config(other.folder, other), lambda: open_run(other, files)):
        with pytest.raises(
            UserError, match=r"seed: 0 there, 3 now.*clip_low: 0.2 there, 0.1 now"
        ) as caught:
            refuse()
        assert "\n" not in str(caught.value) and "--restart" in str(caught.value)
        assert "train.steps" not in str(caught.value)


def test_adapters_of_a_kl_term_s_reference_may_move_but_neither_come_nor_go(files, tmp_path):
    lora, kl = "lora.rank=2", "loss.kl_coefficient=0.1"
    begin(begun := make_config(tmp_path, lora, kl, "lora.adapter=here"), files)
    check_config(begun.folder, make_config(tmp_path, lora, kl, "lora.adapter=moved"))
    with pytest.raises(UserError, match=r"lora\.adapter: 'here' there, None now"):
        check_config(begun.folder, make_config(tmp_path, lora, kl))


def test_a_launch_that_ended_before_its_first_line_binds_nobody(config, files, tmp_path):
    begun(config, files).close()  # and then the memory was not enough
    other = make_config(tmp_path, "rollout.group_size=2")
    check_start(other)
    begun(other, files).close()
    assert config_lib.load([other.folder / CONFIG_FILE]) == other
    (other.folder / CONFIG_FILE).write_text("")  # and then the power was cut
    check_start(other)
    begin(other, files)
    with pytest.raises(UserError, match="holds a run of another config"):
        check_start(config)
    (other.folder / CONFIG_FILE).write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: is empty, .* put it back"):
        check_start(other)


def test_a_run_resumes_under_what_does_not_change_its_result(config, files, tmp_path, capsys):
    begin(config, files)
    words = ["train.steps=7", "train.max_tokens_per_microbatch=64", "rollout.decode_slots=2", "model.remat=none",
             "mesh.fsdp=1", "train.tensorboard=true", "train.eval_every=1", "data.eval=null",
             "train.checkpoint_every=2", "rollout.cache_tokens=4096", "train.measure_noise=true"]  # fmt: skip
    other = make_config(tmp_path, *words)
    check_start(other)
    said = capsys.readouterr().out
    assert all(word.partition("=")[0] in said for word in words) and said.count("\n") == 1
    begun(other, files).close()
    assert config_lib.load([other.folder / CONFIG_FILE]) == other


def test_a_supervised_run_resumes_with_other_evaluations(config, files, tmp_path):
    supervised = ("sft.batch_size=4", "rollout.max_response_tokens=64")
    begin(make_config(tmp_path, *supervised), files)
    changes = ("rollout.max_response_tokens=32", "rollout.group_size=2", "reward.coarse=true")
    check_start(make_config(tmp_path, *supervised, *changes))
    both = (*supervised, *changes, "rollout.prompts_per_step=8")  # `train` may read it, too
    for words in (both, ("sft.batch_size=8",), changes):
        with pytest.raises(UserError, match="holds a run of another config"):
            check_start(make_config(tmp_path, *words))


@pytest.fixture
def saved(config, files) -> Config:
    """A run with lines of two steps and a checkpoint of each."""
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"checkpoint_every": 1})}
    )
    with contextlib.closing(begun(config, files)) as run:
        run.launch = {MADE_OF: {"prompts": "these"}}
        for step in (1, 2):
            run.write(step, {"reward/mean": 1.0}, [{"text": "a"}])
            run.save(step, make_state(step), {"seen": step})
    return config


LOSSES = (
    "all",
    "the folder",
    "all, hidden",
    "all but one put aside",
    "all but one put aside, hidden",
)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(saved, files, loss):
    checkpoints = saved.folder / "checkpoints"
    shutil.rmtree(checkpoints)
    if loss != "the folder":
        checkpoints.mkdir()
    if "aside" in loss:
        (checkpoints / "2.damaged").mkdir()
    if "hidden" in loss:
        (saved.folder / SAVED_FILE).unlink()
    before = (saved.folder / METRICS_FILE).read_bytes()
    for refuse in (lambda: check_start(saved), lambda: open_run(saved, files)):
        with pytest.raises(UserError, match=r"no checkpoint is left.*--restart") as caught:
            refuse()
        assert str(checkpoints) in str(caught.value) and "\n" not in str(caught.value)
    assert (saved.folder / METRICS_FILE).read_bytes() == before


def early(config: Config, files: pathlib.Path, tmp_path: pathlib.Path, last: int) -> Config:
    """A run with a checkpoint at every tenth step, whose last line is of step `last`; a config that asks for them sooner."""
    late = make_config(tmp_path, "train.checkpoint_every=10")
    begun(late, files).close()
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, last + 1)]
    (late.folder / METRICS_FILE).write_text(
        "\0\n".join(lines)
    )  # and no line in front of them can be read
    return make_config(tmp_path, "train.checkpoint_every=5")


def test_a_run_lost_before_its_first_checkpoint_begins_again_under_another_config(
    config, files, tmp_path
):
    sooner, fresh = early(config, files, tmp_path, 8), make_state()
    check_start(sooner)
    with contextlib.closing(open_run(sooner, files)) as run:
        assert run.resume(lambda: fresh, abstract(fresh), {}, START)[2] == 0
    sooner = early(config, files, tmp_path, 12)
    with pytest.raises(UserError, match="no checkpoint is left"):
        check_start(sooner)


def test_a_run_killed_in_its_first_save_begins_again_also_behind_a_launch_that_did_not(
    config, files, tmp_path, monkeypatch
):
    sooner, fresh = early(config, files, tmp_path, 12), make_state()
    part = sooner.folder / "checkpoints" / "10.orbax-checkpoint-tmp"
    part.mkdir()
    open_run(sooner, files).close()  # refused, as for its memory
    check_start(sooner)
    with contextlib.closing(open_run(sooner, files)) as run, monkeypatch.context() as patch:
        patch.setattr(Run, "_open_checkpoints", torn)  # killed as it begins
        with pytest.raises(KeyboardInterrupt):
            run.begin()
    check_start(sooner)
    with contextlib.closing(open_run(sooner, files)) as run:
        assert run.resume(lambda: fresh, abstract(fresh), {}, START)[2] == 0
        run.save(1, make_state(), {})  # waits for what Orbax removes in a thread of its own
    assert not part.exists()


def test_restart_forgets_the_run_in_the_folder(saved, files, tmp_path):
    fresh, other = make_state(), make_config(tmp_path, "seed=3")
    rate = {"rate": 0.5, "low": 0.1, "high": 0.9}
    result = {"benchmark": "api_bank", "rates": {"soft": {"all": rate}}}
    measured = [saved.folder / name for name in ("api_bank-step1.json", CERTIFICATE_FILE)]
    for path in measured:
        path.write_text(json.dumps(result))
    made = ("tensorboard/events", "profile/trace", "curves.png", "nan_step_3.0.npz")
    measured += [saved.folder / name for name in made]
    for path in measured[-4:]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of the run before")
    (saved.folder / "notes.json").write_text("{}")
    check_start(other, restart=True)
    with contextlib.closing(open_run(other, files, restart=True)) as run:
        assert run.resume(lambda: fresh, abstract(fresh), {}, START) == (
            fresh,
            {"seen": 0, EVALUATION: True},
            0,
        )
    assert read_lines(saved.folder / METRICS_FILE) == read_lines(saved.folder / SAMPLES_FILE) == []
    assert not any(path.exists() for path in measured)
    assert (saved.folder / "notes.json").exists()
    # Nothing of the old run refuses the new one.
    open_run(other, files).close()


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(config, files, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_lib.dump(config))
    words = [
        sys.executable,
        str(REPOSITORY / "tests/programs/holds_lock.py"),
        str(path),
        str(files),
    ]
    process = subprocess.Popen(
        words,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        for refuse in (lambda: check_start(config), lambda: open_run(config, files)):
            with pytest.raises(
                UserError, match=r"another process \(.*\) trains this run"
            ) as caught:
                refuse()
            assert (
                f"{config.folder}: another process ({socket.gethostname()}, process {process.pid}, for "
                in str(caught.value)
            )
            assert "\n" not in str(caught.value)
    finally:
        process.kill()
        process.wait()
    check_start(config)
    open_run(config, files).close()


def test_what_is_not_finite_is_named_and_the_batch_saved(config, files):
    sound = dict.fromkeys(RL_FINITE, 1.0) | {"reward/mean": math.nan}
    assert not_finite(sound, RL_FINITE) == ""
    broken = sound | {"update/grad_norm": math.inf, "rollout/logp": math.nan}
    assert not_finite(broken, RL_FINITE) == "update/grad_norm inf, rollout/logp nan"
    with pytest.raises(KeyError, match="loss"):
        not_finite({"update/grad_norm": 1.0}, SUPERVISED_FINITE)
    batch = {"responses": np.arange(6).reshape(2, 3), "region": jax.numpy.ones(2)}
    with contextlib.closing(open_run(config, files)) as run:
        path = run.save_batch(4, batch)
        assert path == run.folder / "nan_step_4.0.npz"
        with np.load(path) as saved:
            assert saved["responses"].tolist() == [[0, 1, 2], [3, 4, 5]]
            assert saved["region"].tolist() == [1, 1]


def test_the_guard_names_metrics_of_the_table():
    assert set(RL_FINITE) <= METRICS.keys() and set(SUPERVISED_FINITE) < set(RL_FINITE)


def test_resuming_drops_the_lines_after_the_checkpoint(config, files):
    fresh = make_state()
    with contextlib.closing(open_run(config, files)) as run:
        assert run.resume(lambda: fresh, abstract(fresh), {}, START) == (
            fresh,
            {"seen": 0, EVALUATION: True},
            0,
        )
        for step in range(4):
            run.write(step, {"reward/mean": step / 4}, [{"text": str(step)}])
            if step == 2:
                run.save(step, make_state(step), {"seen": step})
    with contextlib.closing(open_run(config, files)) as run:
        state, loader_state, step = run.resume(lambda: fresh, abstract(fresh), {}, START)
        assert (int(state.step), loader_state, step) == (9, {"seen": 2}, 2)
    lines = read_lines(config.folder / METRICS_FILE)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["step"] for line in read_lines(config.folder / SAMPLES_FILE)] == [0, 1, 2]


def test_a_checkpoint_is_read_when_the_weights_it_replaces_are_gone(saved, files, monkeypatch):
    """No fresh state is made, and the starting weights are deleted: at no time are there two states."""
    starting, live = jax.tree.map(jnp.copy, make_state().params), []
    restore = Checkpoints.restore

    def watched_restore(*args):
        live.extend(x for x in jax.tree.leaves(starting) if not x.is_deleted())
        return restore(*args)

    monkeypatch.setattr(Checkpoints, "restore", watched_restore)

    def fresh() -> TrainState:
        raise AssertionError("a fresh state is made")

    with contextlib.closing(open_run(saved, files)) as run:
        state, _, step = run.resume(fresh, abstract(make_state()), starting, START)
    assert step == 2 and int(state.step) == int(make_state(2).step)
    assert live == []


def test_a_run_without_a_checkpoint_begins_with_empty_files(config, files):
    fresh = make_state()
    with contextlib.closing(begun(config, files)) as run:
        run.write(0, {"reward/mean": 1.0})
    with contextlib.closing(open_run(config, files)) as run:
        run.resume(lambda: fresh, abstract(fresh), {}, START)
    assert read_lines(config.folder / METRICS_FILE) == []


def test_lines_are_on_disk_before_the_checkpoint_is_begun(config, files, monkeypatch):
    order = []
    with contextlib.closing(begun(config, files)) as run:
        assert run.metrics is not None
        monkeypatch.setattr(run.metrics, "sync", lambda: order.append("sync"))
        monkeypatch.setattr(run.checkpoints, "save", lambda *_: order.append("save"))
        run.save(1, make_state(), {})
        assert order == ["sync", "save"]


def test_a_run_is_complete_when_its_last_checkpoint_is(config, files):
    def written() -> dict:
        return json.loads((config.folder / STEPS_FILE).read_text())

    fresh = make_state()
    for done, complete in ((1, False), (2, True)):
        with contextlib.closing(open_run(config, files)) as run:
            run.total = 2
            run.resume(lambda: fresh, abstract(fresh), {}, START)
            assert written() == {"steps": 2, "complete": False}
            run.save(done, make_state(done), {"seen": done})
            run.complete = complete
        assert written() == {"steps": 2, "complete": complete}
    for total in (2, 3):  # at once, also where it is killed then
        with contextlib.closing(open_run(config, files)) as run:
            run.total = total
            run.resume(lambda: fresh, abstract(fresh), {}, START)
            assert written() == {"steps": total, "complete": total == 2}


def test_sigterm_is_caught_until_the_last_checkpoint_is_on_disk(config, files, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    run = begun(config, files)
    assert not run.stop.received and not run.stop.agreed()
    plain = run.checkpoints._manager.wait_until_finished
    monkeypatch.setattr(
        run.checkpoints._manager,
        "wait_until_finished",
        lambda: (os.kill(os.getpid(), signal.SIGTERM), plain()),
    )
    run.close()
    assert run.stop.received and run.stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before
