"""Checkpoints: bit for bit on any mesh; damage of any file is either harmless or found, and the previous one is used."""

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.errors import UserError
from rest_jax.run import storage
from rest_jax.run.checkpoint import DAMAGED, FOLDER, Checkpoints, restore_params
from rest_jax.types import CurriculumState, TrainState


def make_state(seed: int = 0) -> TrainState:
    """A state with every kind of leaf: bfloat16, bool, int32, scalars, a typed key, adamw moments with a mask."""
    key = jax.random.key(seed)
    params = {
        "layers": {"w": jax.random.normal(key, (8, 16)), "scale": jnp.ones(16)},
        "head": jax.random.normal(key, (32, 64)).astype(jnp.bfloat16),
    }
    matrices = jax.tree.map(lambda x: x.ndim > 1, params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=matrices))
    _, opt_state = tx.update(params, tx.init(params), params)
    row = jnp.arange(8, dtype=jnp.float32) / 3
    curriculum = CurriculumState(
        step=jnp.int32(3),
        nu=jnp.float32(0.1),
        entropy=row,
        gini=-row,
        seen=row > 1,
        count=row * 7,
        weight=row + 1,
        format_score=jnp.float32(1 / 3),
    )
    return TrainState(
        step=jnp.int32(7 + seed),
        params=params,
        opt_state=opt_state,
        rng=jax.random.fold_in(key, 5),
        curriculum=curriculum,
    )


def abstract(state, mesh: Mesh | None = None):
    """Shapes of a state; with a mesh, matrices are sharded over its first axis."""

    def one(x):
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        spec = PartitionSpec(mesh.axis_names[0]) if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if storage.is_key(x):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with checkpoints 1 and 2; copy it before damaging it."""
    run = tmp_path_factory.mktemp("saved")
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"seen": step * 10}, f"name: step{step}\n")
    return run


def test_round_trip_is_bit_for_bit(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest() == 2
        state, loader_state, step = checkpoints.restore(abstract(make_state()))
        assert (step, loader_state) == (2, {"seen": 20})
        assert_same_bits(state, make_state(2))
        older, loader_state, step = checkpoints.restore(abstract(make_state()), step=1)
        assert (step, loader_state) == (1, {"seen": 10})
        assert_same_bits(older, make_state(1))
        assert checkpoints.config(2) == "name: step2\n"


def test_restores_onto_another_mesh(tmp_run):
    devices = np.array(jax.devices())
    four, two = Mesh(devices[:4], ("fsdp",)), Mesh(devices[4:6], ("data",))
    state = make_state()
    shardings = jax.tree.map(lambda x: x.sharding, abstract(state, four))
    sharded = jax.device_put(state, shardings)
    like = abstract(state, two)
    with Checkpoints(tmp_run) as checkpoints:
        checkpoints.save(1, sharded, {}, "")
        restored, _, _ = checkpoints.restore(like)
    assert_same_bits(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_state_may_be_donated_while_it_is_written(tmp_run):
    state = make_state()
    state = dataclasses.replace(state, params={**state.params, "large": jnp.ones((512, 1024))})
    kept = jax.tree.map(lambda x: x.copy(), state)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_run) as checkpoints:
        checkpoints.save(1, state, {}, "")
        jax.block_until_ready(jax.tree.map(overwrite, state.params))
        restored, _, _ = checkpoints.restore(abstract(kept))
    assert_same_bits(restored, kept)


def test_only_the_newest_are_kept_and_an_existing_step_stays(tmp_run):
    with Checkpoints(tmp_run, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"step": step}, "")
        checkpoints.save(3, make_state(9), {"step": 9}, "")
        checkpoints.wait()
        assert sorted(p.name for p in (tmp_run / FOLDER).iterdir()) == ["2", "3"]
        state, loader_state, _ = checkpoints.restore(abstract(make_state()))
    assert loader_state == {"step": 3}
    assert_same_bits(state, make_state(3))


def test_restore_params_reads_the_parameters_alone_and_changes_nothing(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(run / FOLDER / "2" / "rest")
    before = sorted(run.rglob("*"))
    params, step = restore_params(run, abstract(make_state()).params)
    assert step == 2
    assert_same_bits(params, make_state(2).params)
    assert sorted(run.rglob("*")) == before


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "bit flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_harmless_or_named(saved, tmp_path, damage, capfd):
    found_out = 0
    state, like = make_state(2), abstract(make_state())
    names = [p.relative_to(saved) for p in (saved / FOLDER / "2").rglob("*") if p.is_file()]
    assert len(names) > 10
    for name in names:
        run = shutil.copytree(saved, tmp_path / "run")
        DAMAGES[damage](run / name)
        capfd.readouterr()
        with Checkpoints(run) as checkpoints:
            restored, loader_state, step = checkpoints.restore(like)
            assert_same_bits(restored, state if step == 2 else make_state(1))
            assert loader_state == {"seen": step * 10}
            if step == 1:
                found_out += 1
                warning = capfd.readouterr().err
                assert f"checkpoint {run / FOLDER / '2'} is damaged" in warning
                assert warning.count("\n") == 1
                assert (run / FOLDER / f"2{DAMAGED}").is_dir()
                assert checkpoints.latest() == 1
                checkpoints.save(2, state, {"seen": 20}, "")  # the step can be written again
                checkpoints.wait()
                assert checkpoints.latest() == 2
        shutil.rmtree(run)
    assert found_out >= 3  # at least the JSON and the data of both items


def test_content_that_decodes_but_differs_is_found(saved, tmp_path, capfd):
    run = shutil.copytree(saved, tmp_path / "run")
    for item in (
        "params",
        "rest",
    ):  # a sound database of another step: only the fingerprints can tell
        shutil.rmtree(run / FOLDER / "2" / item)
        shutil.copytree(run / FOLDER / "1" / item, run / FOLDER / "2" / item)
    _, step = restore_params(run, abstract(make_state()).params)
    assert step == 1
    assert "is not what was saved" in capfd.readouterr().err


def test_none_left_is_an_error_and_nothing_is_renamed(saved, tmp_path, capfd):
    run = shutil.copytree(saved, tmp_path / "run")
    for step in ("1", "2"):
        flip(run / FOLDER / step / "extra" / "metadata")
    with Checkpoints(run) as checkpoints:
        with pytest.raises(UserError, match=r"no sound checkpoint is left \(damaged: 2, 1\)"):
            checkpoints.restore(abstract(make_state()))
        assert checkpoints.latest() == 2
    with pytest.raises(UserError, match="no sound checkpoint"):
        restore_params(run, abstract(make_state()).params)


def test_missing_checkpoints_are_user_errors(tmp_run):
    with Checkpoints(tmp_run) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoints.restore(abstract(make_state()))
    with pytest.raises(UserError, match=r"is .* the folder of a run"):
        restore_params(tmp_run / "nowhere", {})


def test_another_model_or_optimiser_is_named_not_called_damaged(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    wide = make_state()
    wide.params["head"] = jnp.zeros((32, 65), jnp.bfloat16)
    plain = dataclasses.replace(make_state(), opt_state=optax.sgd(0.1).init(make_state().params))
    with Checkpoints(run) as checkpoints:
        with pytest.raises(UserError, match=r"head is bfloat16\[32, 64\], .*bfloat16\[32, 65\]"):
            checkpoints.restore(abstract(wide))
        with pytest.raises(UserError, match="only the checkpoint has opt_state"):
            checkpoints.restore(abstract(plain))
    assert not list((run / FOLDER).glob(f"*{DAMAGED}*"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint32, jnp.bool_])
def test_fingerprint_sees_every_element_and_every_place(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (6, 5)).astype(dtype)
    whole = int(storage.fingerprint(jnp.asarray(x)))
    for index in np.ndindex(x.shape):
        y = x.copy()
        y[index] = not y[index]
        assert int(storage.fingerprint(jnp.asarray(y))) != whole
    assert int(storage.fingerprint(jnp.asarray(x[::-1]))) != whole


def test_fingerprint_does_not_depend_on_the_sharding():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    for spec in (PartitionSpec("a", "b"), PartitionSpec("b"), PartitionSpec(None, ("a", "b"))):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        assert int(storage.fingerprint(sharded)) == int(storage.fingerprint(x))


KILLED = """
    import sys, time, threading, os, signal
    sys.path.insert(0, {tests!r})
    from test_checkpoint import make_state
    from rest_jax.run.checkpoint import Checkpoints
    import jax.numpy as jnp
    checkpoints = Checkpoints({run!r})
    checkpoints.save(1, make_state(1), {{"seen": 10}}, "")
    checkpoints.wait()
    threading.Timer({delay}, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    checkpoints.save(2, make_state(2), {{"seen": 20}}, "")
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "delay", [0.02, *(pytest.param(d, marks=pytest.mark.slow) for d in (0.0, 0.01, 0.05, 0.1))]
)
def test_a_kill_during_a_save_leaves_a_usable_folder(tmp_run, delay):
    tests = str(pathlib.Path(__file__).parent)
    script = textwrap.dedent(KILLED).format(tests=tests, run=str(tmp_run), delay=delay)
    process = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    with Checkpoints(tmp_run) as checkpoints:
        state, loader_state, step = checkpoints.restore(abstract(make_state()))
        assert step in (1, 2)
        assert loader_state == {"seen": step * 10}
        assert_same_bits(state, make_state(step))
        checkpoints.save(3, state, {"seen": 30}, "")
        checkpoints.wait()
        assert checkpoints.latest() == 3
    assert all(p.name.isdigit() for p in (tmp_run / FOLDER).iterdir())
