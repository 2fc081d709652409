"""Meshes, the axis table, and: the decoder computes the same on any mesh."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, PartitionSpec

from rest_jax import distributed as sharding
from rest_jax.config import MeshConfig
from rest_jax.errors import RunStopped, UserError
from rest_jax.models.attention import prompt_rows
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder, abstract_params, logits, param_shardings
from rest_jax.planning import topology
from rest_jax.rollout.scheduler import deal_groups
from rest_jax.types import ResponseBatch
from tests import tiny
from tests.conftest import REPOSITORY

CFG = DecoderConfig("qwen3", 64, 32, 2, 4, 4, 8, 48, qk_norm=True, tied=False)
P, G, TP, TR = 4, 2, 5, 4


def mesh_of(data, fsdp, tensor, count=4):
    return sharding.make_mesh(
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[:count]
    )


def batch() -> ResponseBatch:
    rng = np.random.default_rng(1)
    prompt, responses = (
        jnp.asarray(rng.integers(0, 64, shape), jnp.int32) for shape in ((P, TP), (P, G, TR))
    )
    prompt_length, length = jnp.array([5, 3, 1, 4]), jnp.array([[4, 2], [1, 3], [4, 4], [2, 1]])
    return ResponseBatch(prompt, prompt_length, responses, length)


@functools.cache
def make_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32),
        nn.meta.unbox(abstract_params(CFG)),
    )


def loss(params, batch, rows):
    inputs = rows.tokens(batch), rows.position, rows.layout
    hidden, _ = Decoder(CFG).apply({"params": params}, *inputs)
    logp = jax.nn.log_softmax(logits(params, CFG, hidden))
    chosen = jnp.take_along_axis(logp, rows.targets(batch.responses)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(rows.predicts, chosen, 0.0)) / batch.responses.size


@functools.cache
def single_device():
    return jax.jit(jax.value_and_grad(loss))(make_params(), batch(), tiny.packed(batch(), P))


MESHES = [(1, 4, 1), (1, 2, 2)]
MORE_MESHES = [(2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)]


@pytest.mark.parametrize(
    "sizes",
    [
        MESHES[0],
        *(pytest.param(m, marks=pytest.mark.wide) for m in MESHES[1:]),
        *(pytest.param(m, marks=pytest.mark.slow) for m in MORE_MESHES),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(sizes):
    params, expected = make_params(), single_device()
    mesh = mesh_of(*sizes)
    placed = param_shardings(CFG, mesh)
    rows = sharding.batch_sharding(mesh)
    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(placed, rows, rows),
        out_shardings=(sharding.replicated(mesh), placed),
    )
    with sharding.activate(mesh):
        inputs = jax.device_put((batch(), tiny.packed(batch(), P)), rows)
        found = step(jax.device_put(params, placed), *inputs)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), atol=1e-5 * np.abs(b).max(), rtol=0
        )


@pytest.mark.parametrize("sizes", [pytest.param((2, 2, 1), marks=pytest.mark.slow), (1, 2, 2)])
def test_decoding_does_not_depend_on_the_mesh(sizes):
    params = make_params()
    prompt, prompt_length, responses = batch().prompt, batch().prompt_length, batch().responses

    def decode(params, prompt, prompt_length, responses):
        layout, positions = prompt_rows(prompt, prompt_length)
        apply: Any = Decoder(CFG).apply
        _, kv = apply({"params": params}, prompt, positions, layout, return_kv=True)
        given = tiny.empty_cache(kv, prompt_length, G, TR)
        for t in range(TR):
            token = responses[:, :, t]
            hidden, cache = apply({"params": params}, token, *given)
            given = tiny.next_token(given, cache)
        return hidden

    expected = jax.jit(decode)(params, prompt, prompt_length, responses)
    mesh = mesh_of(*sizes)
    placed = param_shardings(CFG, mesh, layout="rollout")
    rows = sharding.batch_sharding(mesh)
    with sharding.activate(mesh):
        run = jax.jit(decode, in_shardings=(placed, rows, rows, rows), out_shardings=rows)
        found = run(
            jax.device_put(params, placed),
            *jax.device_put((prompt, prompt_length, responses), rows),
        )
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-5)


def test_mesh_sizes():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    with pytest.raises(ValueError, match=r"3 does not divide the 4 devices"):
        mesh_of(3, -1, 1)
    with pytest.raises(ValueError, match=r"needs 2 devices and there are 4"):
        mesh_of(1, 2, 1)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    slice_index: int = 0


def slice_of(shape: tuple[int, int, int], host: tuple[int, int, int], slices: int = 1):
    """The devices of TPU slices in the order of their coordinates, as libtpu lists them: not in that of the hosts."""
    hosts = [n // m for n, m in zip(shape, host, strict=True)]
    count, devices = math.prod(hosts), []
    for part in range(slices):
        for z, y, x in itertools.product(*map(range, reversed(shape))):
            at = [c // h for c, h in zip((x, y, z), host, strict=True)]
            process = at[0] + hosts[0] * (at[1] + hosts[1] * at[2])
            devices.append(FakeDevice(len(devices), part * count + process, (x, y, z), part))
    return devices


SLICES = {
    "v5e:4x4": ((4, 4, 1), (2, 2, 1)),
    "v5e:4x8": ((4, 8, 1), (2, 2, 1)),
    "v5e:16x16": ((16, 16, 1), (2, 2, 1)),
    "v6e:8x8": ((8, 8, 1), (2, 2, 1)),
    "v5p:2x2x4": ((2, 2, 4), (2, 2, 1)),
    "v5p:4x4x8": ((4, 4, 8), (2, 2, 1)),
    "4 nodes of 8": ((32, 1, 1), (8, 1, 1)),
}
SIZES = [{}, {"tensor": 2}, {"tensor": 4}, {"tensor": 8}, {"data": 2}, {"data": 4, "tensor": 2},
         {"expert": 2}, {"expert": 4, "tensor": 2}]  # fmt: skip


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", SLICES)
def test_every_mesh_of_a_slice_has_tensor_groups_in_hosts(name, slices):
    devices = slice_of(*SLICES[name], slices)
    host = len(devices) // len({d.process_index for d in devices})
    for sizes in SIZES:
        mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
        tensor = sizes.get("tensor", 1)
        assert mesh.shape["data"] == sizes.get("data", slices)
        assert sorted(d.id for d in mesh.devices.flat) == list(range(len(devices)))
        groups = mesh.devices.reshape(-1, tensor)
        for group in groups:
            assert len({d.slice_index for d in group}) == 1
            assert len({d.process_index for d in group}) == max(1, tensor // host)
        if mesh.shape["data"] % slices == 0:  # then only data crosses slices
            for part in mesh.devices:
                assert len({d.slice_index for d in part.flat}) == 1
        owners = sharding.shard_owners(mesh)
        assert len(owners) == len(devices) // tensor
        shards = [shard for group in sharding.host_groups(mesh) for shard in group]
        assert sorted(shards) == list(range(len(owners)))


# What libtpu and XLA for GPUs know of real hardware; two slices of the first.
TPU_SLICES = [
    "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:16x16", "v6e:4x4", "v6e:8x8", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4",
    "v5p:4x4x8", "v4:2x2x4", "v5e:4x4*2",
]  # fmt: skip
GPU_NODES = ["h100:8", "h100:2x8", "h100:3x8", "h100:4x8"]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("package", "names"), [("libtpu", TPU_SLICES), ("jax_cuda12_plugin", GPU_NODES)]
)
def test_every_mesh_of_real_hardware_starts(package, names, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "tests.programs.topology_meshes", *names]
    environment = topology.child_environment(topology.parse("v5e:4x4"), tmp_path)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 6 * len(names)
    for record in found:
        _check_mesh_of_hardware(record)


def _check_mesh_of_hardware(record: dict[str, Any]) -> None:
    """Every process owns rows; tensor groups lie in one process or are complete ones, of one slice; data crosses slices."""
    where = f"{record['topology']} {record['sizes']}"
    assert "refused" not in record, f"{where}: {record['refused']}"
    sizes, processes = record["mesh"], np.array(record["processes"])
    count, host = len(processes), len(processes) // len(set(record["processes"]))
    slices, coords = np.array(record["slices"]), np.array(record["coords"])
    assert count == record["devices"] == math.prod(sizes.values()), where
    assert all(sizes[axis] == size for axis, size in record["sizes"].items()), where
    tensor = sizes["tensor"]
    groups = processes.reshape(-1, tensor)
    assert {len(set(group)) for group in groups} == {max(1, tensor // host)}, where
    assert {len(set(group)) for group in slices.reshape(-1, tensor)} == {1}, where
    assert {len(set(part)) for part in slices.reshape(sizes["data"], -1)} == {1}, where
    assert set(groups.flat) == set(range(count // host)), where  # data shards of every process
    if coords.size:  # on a torus a tensor group is a box of chips; those of v4 are two devices
        sides = np.ptp(coords.reshape(count // tensor, tensor, -1), axis=1) + 1
        assert set(np.prod(sides, axis=1)) <= {tensor, max(1, tensor // 2)}, where


def test_meshes_that_devices_cannot_have():
    devices = slice_of((4, 4, 1), (2, 2, 1))
    with pytest.raises(UserError, match=r"tensor 3\): 3 does not divide the 16 devices"):
        sharding.make_mesh(MeshConfig(tensor=3), devices)
    with pytest.raises(
        UserError, match=r"mesh\.tensor 3: neither divides the 4 devices of a process"
    ):
        sharding.make_mesh(MeshConfig(tensor=3), slice_of((6, 2, 1), (2, 2, 1)))
    with pytest.raises(
        UserError, match=r"mesh\.tensor 8: does not divide the 4 devices of a slice"
    ):
        sharding.make_mesh(MeshConfig(data=1, tensor=8), slice_of((2, 2, 1), (2, 2, 1), slices=2))
    with pytest.raises(UserError, match=r"equally many devices \(process 0: 4, process 1: 3\)"):
        sharding.make_mesh(MeshConfig(), slice_of((4, 2, 1), (2, 2, 1))[:-1])


def test_rows_belong_to_shards_not_to_processes():
    """Owners in any order: here the hosts of a slice hold shards that alternate."""
    mesh = sharding.make_mesh(MeshConfig(), slice_of((2, 2, 2), (2, 2, 1)))
    mixed = mesh.devices.reshape(-1)[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(mesh.devices.shape)
    mesh = Mesh(mixed, mesh.axis_names)
    assert sharding.shard_owners(mesh) == [(0,), (1,)] * 4
    assert sharding.host_groups(mesh) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert sharding.local_shards(mesh) == [0, 2, 4, 6]
    assert sharding.rows_of_shards(16, [0, 2, 4, 6], mesh).tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert deal_groups(np.arange(16), mesh) == [
        [13, 5], [15, 7], [12, 4], [14, 6], [9, 1], [11, 3], [8, 0], [10, 2]
    ]  # fmt: skip


def test_rows_are_gathered_in_the_order_of_the_shards(monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(), slice_of((2, 2, 2), (2, 2, 1)))
    mixed = mesh.devices.reshape(-1)[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(mesh.devices.shape)
    mesh = Mesh(mixed, mesh.axis_names)
    parts = [np.array([0, 1, 4, 5, 8, 9, 12, 13]), np.array([2, 3, 6, 7, 10, 11, 14, 15])]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "all_gather", lambda x: np.stack(parts))
    assert sharding.gather(parts[0], mesh).tolist() == list(range(16))


def integers(*shape: int, dtype: str = "float32") -> jax.Array:
    """Small whole numbers, whose sums are exact in any order."""
    return jnp.asarray(np.random.default_rng(len(shape)).integers(-4, 5, shape), dtype)


@pytest.mark.parametrize(("devices", "dimension"), [(2, 0), (6, 1), (8, 0), (8, 1)])
def test_sums_are_scattered_in_steps(devices, dimension):
    """Of four devices at most, where their number allows it."""
    x = integers(devices, 24, 48)
    where: list[Any] = [None, None]
    where[dimension] = "fsdp"
    mesh = sharding.make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(*where)
    )
    def scatter(x):
        return sharding.scatter_sum(x[0], "fsdp", dimension)

    np.testing.assert_array_equal(scatter(x), x.sum(axis=0))
    text = scatter.lower(x).as_text()
    steps = {2: 1, 6: 2, 8: 2}[devices]
    assert text.count("stablehlo.reduce_scatter") == steps


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}],
)
@pytest.mark.parametrize(
    ("axes", "counts"),
    [(("embed", "mlp"), (16, 8)), (("heads", "embed"), (8, 8)), (("embed", "kv_heads"), (16, 1))],
    ids=str,
)
def test_gradients_of_weights_are_summed_and_split_as_the_weights_are(sizes, axes, counts):
    """One kv head is on both devices of a tensor group."""
    x, d_y = integers(16, 16, dtype="bfloat16"), integers(16, 8, dtype="bfloat16")
    product = functools.partial(jnp.einsum, "ti,to->io", preferred_element_type=jnp.float32)
    mesh = tiny.mesh(**sizes)
    with sharding.activate(mesh):
        run = jax.jit(lambda x, y: sharding.sum_weight_gradient(product, x, y, axes, counts))
        found = run(x, d_y)
    np.testing.assert_array_equal(found, product(x, d_y))
    assert found.dtype == jnp.float32
    part = math.prod(size for axis, size in sizes.items() if axis in ("fsdp", "expert"))
    assert math.prod(found.sharding.shard_shape(found.shape)) in (
        found.size // part,
        found.size // part // sizes.get("tensor", 1),
    )


def test_positions_of_hidden_states_are_split_over_tensor_where_they_divide():
    with sharding.activate(tiny.mesh(fsdp=2, tensor=2)):
        for time, parts in ((6, 2), (5, 1)):
            found = jax.jit(sharding.pin_positions)(integers(2, time, 4))
            assert found.sharding.shard_shape(found.shape) == (1, time // parts, 4)


def test_batches_that_do_not_divide_name_both_numbers():
    sharding.check_batch("rollout.prompts_per_step", 8, mesh_of(2, 2, 1))
    with pytest.raises(
        ValueError, match=r"rollout\.prompts_per_step 6 does not divide over 4 data shards"
    ):
        sharding.check_batch("rollout.prompts_per_step", 6, mesh_of(2, 2, 1))


def test_parameter_layouts():
    mesh = mesh_of(1, 2, 2)
    train = param_shardings(CFG, mesh)
    rollout = param_shardings(CFG, mesh, layout="rollout")
    attention = train["blocks"]["attention"]
    assert attention["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert attention["o"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert train["blocks"]["mlp"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert train["embed"].spec == PartitionSpec("tensor", "fsdp")
    assert train["final_norm"]["scale"].spec == PartitionSpec(None)
    assert all("fsdp" not in s.spec for s in jax.tree.leaves(rollout))
    assert rollout["head"].spec == PartitionSpec("tensor", None)
    params = nn.meta.unbox(abstract_params(CFG))
    assert jax.tree.structure(params) == jax.tree.structure(train) == jax.tree.structure(rollout)


def test_experts_are_split_and_their_axis_is_never_idle():
    """Rows and the other weights are split over it as well; what does not divide over both is split over fsdp."""
    cfg = dataclasses.replace(CFG, family="qwen3_moe", d_ff=8, n_experts=4, experts_per_token=2)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    assert sharding.num_data_shards(mesh) == 4
    assert sharding.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp", "expert"))
    mlp = param_shardings(cfg, mesh)["blocks"]["mlp"]
    assert mlp["gate"].spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert mlp["down"].spec == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert mlp["router"].spec == PartitionSpec(None, ("fsdp", "expert"), None)
    placed = param_shardings(cfg, mesh)
    assert placed["embed"].spec == PartitionSpec("tensor", ("fsdp", "expert"))
    odd = dataclasses.replace(cfg, d_model=30)
    assert param_shardings(odd, mesh)["embed"].spec == PartitionSpec("tensor", "fsdp")
    rollout = param_shardings(cfg, mesh, layout="rollout")
    assert rollout["blocks"]["mlp"]["gate"].spec == PartitionSpec(None, "expert", None, "tensor")
    assert rollout["embed"].spec == PartitionSpec("tensor", None)


def test_dimensions_that_do_not_divide():
    few = dataclasses.replace(CFG, n_kv_heads=2)
    placed = param_shardings(few, mesh_of(1, 1, 4))
    assert placed["blocks"]["attention"]["k"].spec == PartitionSpec(None, "fsdp", None, None)
    assert placed["blocks"]["attention"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    odd = dataclasses.replace(CFG, d_ff=50)
    with pytest.raises(ValueError, match=r"blocks.mlp.down: its mlp dimension 50 .* tensor 4"):
        param_shardings(odd, mesh_of(1, 1, 4))
    odd = dataclasses.replace(CFG, n_heads=6, n_kv_heads=6)
    with pytest.raises(ValueError, match=r"kv_heads dimension 6 .* tensor 4"):
        param_shardings(odd, mesh_of(1, 1, 4))


def test_optimiser_state_follows_the_parameters():
    mesh = mesh_of(1, 2, 2)
    placed = param_shardings(CFG, mesh)
    params = nn.meta.unbox(abstract_params(CFG))
    matrices = jax.tree.map(lambda x: x.ndim > 2, params)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.constant_schedule(1e-3), mask=matrices),
        optax.ema(0.9),
    )
    state = jax.eval_shape(tx.init, params)
    found = sharding.tree_shardings_like(state, params, placed)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for (path, where), leaf in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(state), strict=True
    ):
        if leaf.ndim == 0:
            assert where.spec == PartitionSpec(), path
    adam = found[1][0]
    assert adam.mu == placed and adam.nu == placed and found[2].ema == placed
    assert adam.count.spec == PartitionSpec()
    whole = sharding.tree_shardings_like({"params": params, "step": jnp.zeros(())}, params, placed)
    assert whole["params"] == placed and whole["step"].spec == PartitionSpec()


@pytest.mark.parametrize("kind", [UserError, RunStopped])
def test_a_fault_of_one_process_is_that_of_all(kind, monkeypatch):
    said = []
    monkeypatch.setattr(sharding, "exchange", lambda text, _: said.append(text) or [text])
    with pytest.raises(kind, match="one"):
        sharding.agree(kind("one"))
    monkeypatch.setattr(sharding, "exchange", lambda text, _: [text, said[0]])
    with pytest.raises(kind, match="one"):
        sharding.agree(None)
    monkeypatch.undo()
    sharding.agree(None)
