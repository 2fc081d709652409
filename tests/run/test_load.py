"""Export from a run: layer by layer from its checkpoint. Memory of convert and export on a real size."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from rest_jax.config import MeshConfig, ModelConfig
from rest_jax.errors import UserError
from rest_jax.models.hf import store
from rest_jax.run import load
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.folder import MODEL_FOLDER
from rest_jax.types import TrainState
from tests.runs import PROGRAMS, ROOT, environment

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run folder with one checkpoint, saved from four devices, and its parameters."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(model, folder / MODEL_FOLDER, ignore=shutil.ignore_patterns("*.safetensors"))
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    policy = load.load_policy(ModelConfig(source=str(model)), mesh)
    params = jax.tree.map(lambda x: x + 1 / 3, policy.params)
    with Checkpoints(folder) as checkpoints:
        none = jax.numpy.zeros(())
        checkpoints.save(1, TrainState(none, params, none, none, none), {})
    return folder, jax.tree.map(np.asarray, params)


def test_a_run_is_exported_without_a_policy(run, model, tmp_path, monkeypatch):
    folder, params = run

    def refuse(*_):
        raise AssertionError("the policy was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(load, "load_policy", refuse)
        load.export(str(folder), tmp_path / "out", "float32")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == safetensors.numpy.load_file(model / "model.safetensors").keys()
    policy = load.load_policy(ModelConfig(source=str(tmp_path / "out")), MeshConfig(fsdp=-1))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), policy.params, params
    )


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 8, 1), (4, 1, 2), (1, 2, 4)])
def test_a_run_is_loaded_exactly_on_another_mesh(run, data, fsdp, tensor):
    folder, params = run
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    policy = load.load_policy(ModelConfig(source=str(folder)), mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), policy.params, params
    )
    assert dict(policy.mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": 1}


def test_a_layer_of_a_checkpoint_is_a_chunk(run):
    folder, params = run
    path = folder / "checkpoints" / "1" / "params"
    array = store.open_array(path, ("blocks", "mlp", "gate"))
    layers, d, f = params["blocks"]["mlp"]["gate"].shape
    assert array.shape == (layers, d, f)
    assert tuple(array.chunk_layout.read_chunk.shape) == (1, d // 2, f // 2)
    np.testing.assert_array_equal(array.read().result(), params["blocks"]["mlp"]["gate"])


def test_a_damaged_run_is_not_exported(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    largest = max((folder / "checkpoints").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        load.export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def peak_bytes(*words):
    """Peak memory of `rest-jax WORDS`, which must succeed."""
    code = (
        "import resource, subprocess, sys; "
        "done = subprocess.run([sys.executable, '-m', 'rest_jax', *sys.argv[1:]]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
def test_convert_and_export_hold_no_model(tmp_path):
    """Llama 3.2 1B: 2.5 GB in two files, the embedding alone 0.5 GB."""
    source, converted, out = (tmp_path / name for name in ("hf", "converted", "out"))
    words = [
        sys.executable,
        str(PROGRAMS / "random_hf_folder.py"),
        "meta-llama/Llama-3.2-1B-Instruct",
        str(source),
    ]
    subprocess.run(words, env=environment() | {"PYTHONPATH": str(ROOT)}, check=True)
    files = sorted(source.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 2.4 * GIGABYTE
    assert peak_bytes("convert", str(source), str(converted)) < GIGABYTE
    shutil.rmtree(source)
    assert peak_bytes("export", str(converted), str(out)) < GIGABYTE
    manifest = json.loads((converted / "rest_jax.json").read_text())["tensors"]
    assert len(manifest) == len(list(tensors_of(out)))


def tensors_of(folder):
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "numpy") as opened:
            yield from opened.keys()


def test_the_plugins_of_a_run_are_left_out_unless_they_are_asked_for(tmp_path, capsys):
    """Whoever made the run wrote its config."""
    for name in ("checkpoints", MODEL_FOLDER):
        (tmp_path / name).mkdir()
    text = "name: theirs\nmodel: {source: x}\nreward: {plugin: 'theirs.py:score', builtin: false, coarse: true}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = load.config_of(str(tmp_path), [])
    assert (config.reward.plugin, config.reward.builtin, config.reward.coarse) == (None, True, True)
    assert "names reward.plugin theirs.py:score; it is not run" in capsys.readouterr().err
    own = load.config_of(str(tmp_path), ["reward.plugin=mine.py:score"])
    assert own.reward.plugin == "mine.py:score"
    capsys.readouterr()
    asked = load.config_of(str(tmp_path), [], plugins=True)
    assert (asked.reward.plugin, asked.reward.builtin) == ("theirs.py:score", False)
    assert capsys.readouterr().err == ""
