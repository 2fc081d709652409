"""Reading onto meshes: the same parameters on any, every byte read once, whole rows; what the programs exchange."""

import collections
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from rest_jax.config import MeshConfig
from rest_jax.distributed import make_mesh
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import param_shardings
from rest_jax.models.hf import placement
from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.read import load_model, open_weights, read_config
from rest_jax.models.hf.safetensors import Stored
from rest_jax.models.hf.table import table
from rest_jax.models.hf.write import convert
from rest_jax.models.presets import preset
from tests.programs import random_hf_folder
from tests.runs import run_together

SIZES = DecoderConfig("qwen3", 256, 64, 4, 8, 8, 16, 96, qk_norm=True, tied=True)
# fsdp divides no multiple of 3; kv heads fewer than the tensor axis; q has a bias.
ODD = DecoderConfig("qwen2", 250, 48, 3, 4, 2, 12, 96, qkv_bias=True, tied=False)
MESHES = {
    "fsdp 8": (1, 8, 1),
    "tensor 8": (1, 1, 8),
    "data 4 x fsdp 2": (4, 2, 1),
    "data 2 x fsdp 2 x tensor 2": (2, 2, 2),
}


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same model as HF files and converted, and its parameters on one device."""
    root = tmp_path_factory.mktemp("placement")
    random_hf_folder.write(SIZES, root / "hf", max_bytes=100_000)
    convert(str(root / "hf"), root / "converted")
    _, params, _ = load_model(str(root / "hf"), mesh_of(1, 1, 1), jnp.float32, "none")
    return root, jax.tree.map(np.asarray, params)


@pytest.fixture
def read_bytes(monkeypatch):
    """Calls to the files: how many bytes of each, and whether they were whole rows."""
    seen = collections.Counter()
    plain = Stored.read

    def read(stored, rows=slice(None)):
        found = plain(stored, rows)
        assert found.shape[1:] == stored.shape[1:]
        seen[stored.name] += found.nbytes
        return found

    monkeypatch.setattr(Stored, "read", read)
    return seen


def assert_placed(folder, mesh, expected):
    cfg, params, _ = load_model(str(folder), mesh, jnp.bfloat16, "none")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), params, expected)
    assert jax.tree.map(lambda x: x.sharding, params) == param_shardings(cfg, mesh)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("by_layers", [False, True])
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_each_byte_of_hf_files_is_read_once(shape, by_layers, sources, read_bytes, monkeypatch):
    root, expected = sources
    if by_layers:
        monkeypatch.setattr(placement, "_STAGED_BYTES", 1000)
        monkeypatch.setattr(placement, "_SMALL_BYTES", 0)
    assert_placed(root / "hf", mesh_of(*shape), expected)
    assert sum(read_bytes.values()) == sum(x.size * 2 for x in jax.tree.leaves(expected))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_each_byte_of_a_converted_folder_is_read_once(shape, sources, tmp_path, monkeypatch):
    root, expected = sources
    # A path of its own: small chunks stay in a cache under their paths.
    folder = shutil.copytree(root / "converted", tmp_path / "converted")
    monkeypatch.setattr(placement, "_STAGED_BYTES", 1000)
    monkeypatch.setattr(placement, "_SMALL_BYTES", 0)
    name = "/tensorstore/kvstore/file/bytes_read"

    def total():
        return sum(
            v["value"] for m in ts.experimental_collect_matching_metrics(name) for v in m["values"]
        )

    before = total()
    assert_placed(folder, mesh_of(*shape), expected)
    model = sum(x.size * 2 for x in jax.tree.leaves(expected))
    descriptions = sum(f.stat().st_size for f in folder.rglob(".zarray"))
    assert model <= total() - before <= 1.05 * model + descriptions


def test_sizes_that_the_mesh_does_not_divide(tmp_path, read_bytes):
    random_hf_folder.write(ODD, tmp_path / "hf")
    _, params, _ = load_model(str(tmp_path / "hf"), mesh_of(1, 1, 1), jnp.float32, "none")
    expected = jax.tree.map(np.asarray, params)
    read_bytes.clear()
    assert_placed(tmp_path / "hf", mesh_of(1, 2, 1), expected)
    assert_placed(tmp_path / "hf", mesh_of(2, 2, 2), expected)
    assert sum(read_bytes.values()) == 2 * sum(x.size * 2 for x in jax.tree.leaves(expected))
    convert(str(tmp_path / "hf"), tmp_path / "converted")
    assert_placed(tmp_path / "converted", mesh_of(2, 2, 2), expected)


def test_orbax_restores_a_converted_folder(sources):
    """With its own checkpointer, onto another mesh than any this was written for."""
    root, expected = sources
    cfg, mesh = read_config(root / "hf"), mesh_of(1, 2, 4)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
        expected,
        param_shardings(cfg, mesh),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(root / "converted" / "params", like)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a).astype(np.float32), b),
        restored,
        expected,
    )


def test_a_lost_chunk_is_an_error(sources, tmp_path):
    root, _ = sources
    convert(str(root / "hf"), tmp_path / "converted")
    (tmp_path / "converted" / "params" / "blocks.mlp.gate" / "2.0.0").unlink()
    with pytest.raises(ConversionError, match=r"blocks\.mlp\.gate: .*2\.0\.0.* is missing"):
        load_model(str(tmp_path / "converted"), mesh_of(1, 1, 1), jnp.float32, "none")


@pytest.mark.parametrize("layout", ["hf", "converted"])
def test_devices_exchange_stored_dtypes_and_never_whole_layers(layout, sources):
    """HLO of a matrix under data 2 x fsdp 2 x tensor 2: what a device receives is as large as its part."""
    root, _ = sources
    mesh = mesh_of(2, 2, 2)
    cfg = read_config(root / "hf")
    found = {w.spec.path: w for w in open_weights(root / layout, cfg)}
    weights = found["blocks", "mlp", "gate"]
    sharding = param_shardings(cfg, mesh)["blocks"]["mlp"]["gate"]
    plan = placement._plan(weights, sharding, np.dtype("float32"))
    bits = jax.ShapeDtypeStruct(weights.shape, np.uint16, sharding=plan.stages[0])
    program = jax.jit(placement._arrange, static_argnames="plan", out_shardings=sharding)
    text = program.lower(bits, plan=plan).compile().as_text()
    exchanged = re.findall(r"(\w+)\[([\d,]+)\]\S* (?:all-gather|all-to-all|all-reduce)", text)
    assert exchanged
    part = np.prod(weights.shape) // 4
    for dtype, shape in exchanged:
        assert dtype == "u16" and np.prod([int(n) for n in shape.split(",")]) <= part


def test_layers_are_staged_in_whole_chunks():
    """36 layers of 2560 x 9728 in bfloat16, 50 MB each."""
    cfg = preset("Qwen/Qwen3-4B")
    gate = {spec.path: spec for spec in table(cfg)}["blocks", "mlp", "gate"]
    shape = (36, *gate.hf_shape)
    sharding = param_shardings(cfg, mesh_of(1, 1, 1))["blocks"]["mlp"]["gate"]

    def together(chunk):
        found = placement.Weights(gate, shape, chunk, np.dtype(jnp.bfloat16), True, np.zeros)
        return placement._layers_together(found, sharding)

    assert together((1, 1, 2560)) == 1
    assert together((4, 1, 2560)) == 4
    assert together((5, 1, 2560)) == 36


@pytest.mark.multihost
@pytest.mark.parametrize("sizes", ["1,4,1", "2,2,1", "1,2,2"])
def test_two_processes_read_each_byte_once_between_them(sizes, sources):
    root, expected = sources
    said = run_together("loads_on_mesh.py", str(root / "hf"), options=[sizes])
    read = [int(lines[-1]) for lines in said]
    assert sum(read) == sum(x.size * 2 for x in jax.tree.leaves(expected))
    assert max(read) < 0.6 * sum(read)
