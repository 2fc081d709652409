"""Checkpoints: bit for bit on any mesh; damage of any file is either harmless or found, and the previous one is used."""

import dataclasses
import gc
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.errors import RunStopped, UserError
from rest_jax.files import as_path
from rest_jax.run.checkpoint import (
    DAMAGED,
    FOLDER,
    MANIFEST,
    Checkpoints,
    newest,
    newest_params,
    params_distance,
    read,
)
from tests.programs.states import make_state

REPOSITORY = pathlib.Path(__file__).parents[2]
PROGRAMS = REPOSITORY / "tests" / "programs"


def program_environment() -> dict[str, str]:
    """One CPU device a process; the program finds the package and the tests."""
    return os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(REPOSITORY)}


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
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with checkpoints 1 and 2; copy it before damaging it."""
    run = tmp_path_factory.mktemp("saved")
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"seen": step * 10})
    return run


def test_parameters_are_compared_value_by_value(tmp_path):
    """Also of a checkpoint that has taken the place of another one within a process."""
    first, second = make_state(1), make_state(2)
    path = as_path(tmp_path / "checkpoints" / "1")
    for own, other in ((first, second), (second, first)):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, own, {})
        assert params_distance(path, own.params) == (0, 0.0)
        unequal, distance = params_distance(path, other.params)
        assert 8 * 16 < unequal <= 8 * 16 + 32 * 64 and 1 < distance < 2
        shutil.rmtree(tmp_path / "checkpoints")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    split = NamedSharding(mesh, PartitionSpec("a"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, first, {})
    params = jax.device_put(first.params, split)
    assert params_distance(path, params) == (0, 0.0)
    params["layers"]["scale"] = params["layers"]["scale"].at[15].add(1e-6)
    assert params_distance(path, params)[0] == 1
    with pytest.raises(UserError, match=r"only the checkpoint has head"):
        params_distance(path, {"layers": params["layers"]})


def test_round_trip_is_bit_for_bit(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest() == 2
        state, loader_state, step = checkpoints.restore(abstract(make_state()))
        assert (step, loader_state) == (2, {"seen": 20})
        assert_same_bits(state, make_state(2))


def test_restores_onto_another_mesh(tmp_run):
    devices = np.array(jax.devices())
    four, two = Mesh(devices[:4], ("fsdp",)), Mesh(devices[4:6], ("data",))
    state = make_state()
    shardings = jax.tree.map(lambda x: x.sharding, abstract(state, four))
    sharded = jax.device_put(state, shardings)
    like = abstract(state, two)
    with Checkpoints(tmp_run) as checkpoints:
        checkpoints.save(1, sharded, {})
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
        checkpoints.save(1, state, {})
        jax.block_until_ready(jax.tree.map(overwrite, state.params))
        restored, _, _ = checkpoints.restore(abstract(kept))
    assert_same_bits(restored, kept)


def test_only_the_newest_are_kept_and_an_existing_step_stays(tmp_run):
    with Checkpoints(tmp_run, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"step": step})
        checkpoints.save(3, make_state(9), {"step": 9})
        checkpoints.wait()
        assert sorted(p.name for p in (tmp_run / FOLDER).iterdir()) == ["2", "3"]
        state, loader_state, _ = checkpoints.restore(abstract(make_state()))
    assert loader_state == {"step": 3}
    assert_same_bits(state, make_state(3))


def test_saves_leave_no_objects_behind(tmp_run):
    """A long run makes thousands of them."""

    def lists_after(steps: range) -> int:
        for step in steps:
            checkpoints.save(step, make_state(step), {"seen": step})
            checkpoints.wait()
        gc.collect()
        return sum(type(x) is list for x in gc.get_objects())

    with Checkpoints(tmp_run) as checkpoints:
        before, saves = lists_after(range(1, 3)), 4
        # Some are made once, at the first of them; every metric of TensorStore would be 50 a save.
        assert lists_after(range(3, 3 + saves)) - before < 10 * saves


def test_newest_params_needs_the_parameters_alone_and_changes_nothing(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(run / FOLDER / "2" / "rest")
    before = sorted(run.rglob("*"))
    assert newest_params(run) == (run / FOLDER / "2" / "params", 2)
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


@pytest.mark.slow
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
                checkpoints.save(2, state, {"seen": 20})  # the step can be written again
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
    _, step = newest_params(run)
    assert step == 1
    assert "checkpoints/2 is damaged" in capfd.readouterr().err


def test_none_left_is_an_error_and_nothing_is_renamed(saved, tmp_path, capfd):
    run = shutil.copytree(saved, tmp_path / "run")
    for step in ("1", "2"):
        flip(run / FOLDER / step / "params" / "manifest.ocdbt")
    with Checkpoints(run) as checkpoints:
        with pytest.raises(UserError, match=r"no sound checkpoint is left \(damaged: 2, 1\)"):
            checkpoints.restore(abstract(make_state()))
        assert checkpoints.latest() == 2
    with pytest.raises(UserError, match="no sound checkpoint"):
        newest_params(run)


def test_missing_checkpoints_are_user_errors(tmp_run):
    with Checkpoints(tmp_run) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoints.restore(abstract(make_state()))
    with pytest.raises(UserError, match=r"is .* the folder of a run"):
        newest_params(tmp_run / "nowhere")


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


def test_the_curriculum_of_another_version_is_named(saved):
    """Its fields do not depend on the config."""
    like = abstract(make_state())
    other = dataclasses.replace(like.curriculum, seen=jax.ShapeDtypeStruct((8,), bool))
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(
            UserError, match=r"curriculum.seen is int32\[8\], .* another version of"
        ):
            checkpoints.restore(dataclasses.replace(like, curriculum=other))
        without = {"step": like.curriculum.step}
        with pytest.raises(UserError, match=r"only the checkpoint has .* another version of"):
            checkpoints.restore(dataclasses.replace(like, curriculum=without))


def test_a_full_disk_is_one_line_and_costs_the_new_checkpoint_alone(
    saved, tmp_path, limit_files, capfd
):
    run = shutil.copytree(saved, tmp_path / "run")
    noise = jax.random.normal(jax.random.key(0), (256, 256))  # which cannot be compressed
    large = dataclasses.replace(make_state(3), params={**make_state().params, "large": noise})
    said = r"checkpoints/3: not saved: File too large; make room"
    with pytest.raises(RunStopped, match=said), Checkpoints(run) as checkpoints:
        limit_files(60_000)
        checkpoints.save(3, large, {"seen": 30})
        checkpoints.wait()
    assert "Traceback" not in capfd.readouterr().err
    path = newest(run)
    assert path == run / FOLDER / "2"
    assert_same_bits(read(path, abstract(make_state()))[0], make_state(2))


def kind_of(name: str) -> str:
    """A file's name without what is random in it: all files of one kind are read by the same code."""
    return re.sub(r"/[0-9a-f]{32}$", "/*", name)


def flip_bits(run: pathlib.Path, count: int, capfd) -> dict[str, int]:
    """Flips `count` random bits in every kind of file of checkpoint 2, one at a time; how many of each kind were found."""
    newest = run / FOLDER / "2"
    state, like = make_state(2), abstract(make_state())
    kinds: dict[str, list[pathlib.Path]] = {}
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        kinds.setdefault(kind_of(path.relative_to(newest).as_posix()), []).append(path)
    rng, found = np.random.default_rng(0), dict.fromkeys(kinds, 0)
    with Checkpoints(run) as checkpoints:
        for kind, paths in kinds.items():
            for _ in range(count):
                path = paths[rng.integers(len(paths))]
                content = bytearray(path.read_bytes())
                sound = bytes(content)
                content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
                path.write_bytes(bytes(content))
                capfd.readouterr()
                restored, loader_state, step = checkpoints.restore(like)
                if step == 1:
                    warning = capfd.readouterr().err
                    assert f"checkpoint {newest} is damaged" in warning
                    assert warning.count("\n") == 1
                    found[kind] += 1
                    (run / FOLDER / f"2{DAMAGED}").rename(newest)
                assert_same_bits(restored, state if step == 2 else make_state(1))
                assert loader_state == {"seen": 10 * step}
                path.write_bytes(sound)
                checkpoints._manager.reload()
    return found


@pytest.mark.parametrize("count", [1, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(saved, tmp_path, capfd, count):
    """Orbax's own two files at the top are not read to restore, so their bits are harmless."""
    found = flip_bits(shutil.copytree(saved, tmp_path / "run"), count, capfd)
    assert found.pop("_CHECKPOINT_METADATA") == found.pop("commit_success.txt") == 0
    assert len(found) > 10 and MANIFEST in found
    assert found == dict.fromkeys(found, count)


def test_a_checkpoint_without_a_manifest_is_not_sound(saved, tmp_path, capfd):
    run = shutil.copytree(saved, tmp_path / "run")
    (run / FOLDER / "2" / MANIFEST).unlink()
    _, step = newest_params(run)
    assert step == 1
    assert "manifest.json" in capfd.readouterr().err


def test_a_manifest_that_forgets_an_item_is_not_sound(saved, tmp_path, capfd):
    run = shutil.copytree(saved, tmp_path / "run")
    path = run / FOLDER / "2" / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("rest/")}))
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(abstract(make_state()))[2] == 1
    assert "does not describe the items" in capfd.readouterr().err


def test_a_manifest_that_is_nested_too_deeply_is_not_sound(saved, tmp_path, capfd):
    run = shutil.copytree(saved, tmp_path / "run")
    (run / FOLDER / "2" / MANIFEST).write_text("[" * 100_000)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(abstract(make_state()))[2] == 1
    assert "is damaged and not used" in capfd.readouterr().err


def test_typed_keys_of_another_generator_come_back(tmp_run):
    state = dataclasses.replace(make_state(), rng=jax.random.key(3, impl="rbg"))
    with Checkpoints(tmp_run) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _, _ = checkpoints.restore(abstract(state))
        assert restored.rng.dtype == state.rng.dtype
        assert_same_bits(restored, state)
        with pytest.raises(UserError, match=r"rng is uint32\[4\], .*uint32\[2\]"):
            checkpoints.restore(abstract(make_state()))


@pytest.mark.parametrize(
    "moment",
    [
        "0.02",
        "before the manifest",
        "before the rename",
        "after the rename",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("0.0", "0.01", "0.05", "0.1", "0.2")),
    ],
)
def test_a_kill_during_a_save_leaves_a_usable_folder(tmp_run, moment):
    program = [sys.executable, str(PROGRAMS / "killed_save.py"), str(tmp_run), moment]
    process = subprocess.run(program, env=program_environment(), capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    with Checkpoints(tmp_run) as checkpoints:
        state, loader_state, step = checkpoints.restore(abstract(make_state()))
        wanted = {"before the manifest": 1, "before the rename": 1, "after the rename": 2}
        assert step == wanted.get(moment, step)
        assert loader_state == {"seen": step * 10}
        assert_same_bits(state, make_state(step))
        checkpoints.save(3, state, {"seen": 30})
        checkpoints.wait()
        assert checkpoints.latest() == 3
    assert all(p.name.isdigit() for p in (tmp_run / FOLDER).iterdir())


@pytest.mark.multihost
def test_two_processes_save_and_restore_one_state(tmp_run, capfd):
    """Each holds half of the rows; both skip a checkpoint in which one of them finds damage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = [sys.executable, str(PROGRAMS / "shared_checkpoint.py"), str(tmp_run), address]
    processes = [
        subprocess.Popen([*program, str(i)], env=program_environment(), stderr=subprocess.PIPE)
        for i in range(2)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "2 is damaged" in errors[0] and "damaged" not in errors[1]
    assert (tmp_run / FOLDER / f"2{DAMAGED}").is_dir()
