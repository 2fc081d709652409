"""What `rest-jax train` and `rest-jax sft` print before they begin: where they run, what they hold in memory, what they write.

Memory is that of arrays whose shapes are known before anything is compiled: parameters, optimiser, the rollout's copy of the
weights and its pages of keys and values, the batch. Activations and other temporaries come on top; `rest-jax plan` has them.
"""

import math
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rest_jax.config import Config
from rest_jax.distributed import HOST_MEMORY, num_data_shards, platform
from rest_jax.files import is_url
from rest_jax.planning.memory import memory_limit
from rest_jax.planning.programs import (
    Program,
    device_bytes,
    evaluation_programs,
    held_by_training,
    rollout_programs,
    train_state,
    training_rollout,
)
from rest_jax.planning.setup import Setup
from rest_jax.rollout.engine import PAGE, num_pages
from rest_jax.run.environment import host_memory
from rest_jax.run.trackers import wanted

Fields = list[tuple[str, str]]


def banner(setup: Setup, data: Sequence[tuple[str, str]]) -> Fields:
    """(label, text) of each line; `data` are those of the command: its records and its steps."""
    config, cfg, mesh = setup.config, setup.policy.config, setup.policy.mesh
    total, trained = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
        for tree in (setup.policy.params, setup.policy.adapters)
    )
    lora = ""
    if cfg.lora is not None:
        lora = f", LoRA of rank {cfg.lora.rank} on {' '.join(cfg.lora.targets)} ({trained / 1e6:,.2f} M trained)"
    experts = f", {cfg.experts_per_token} of {cfg.n_experts} experts" if cfg.n_experts else ""
    return [
        ("run", f"{config.name} (seed {config.seed})"),
        ("devices", _devices(setup)),
        ("mesh", f"{_axes(mesh)}: {num_data_shards(mesh)} data shard(s){_rollout_mesh(setup)}"),
        (
            "model",
            f"{config.model.source}: {cfg.family}{experts}, {total / 1e6:,.1f} M parameters{lora}, computes in {cfg.dtype.name}, "
            f"template {config.data.template}",
        ),
        ("memory", _memory(setup)),
        *data,
        ("writes", _written(setup)),
    ]


def _devices(setup: Setup) -> str:
    devices = setup.policy.mesh.devices
    processes = jax.process_count()
    said = f", {processes} processes" if processes > 1 else ""
    return f"{devices.size} x {devices.flat[0].device_kind}{said}"


def _axes(mesh: Any) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _rollout_mesh(setup: Setup) -> str:
    rollout = setup.policy.rollout_mesh
    return "" if rollout == setup.policy.mesh else f"; rollout {_axes(rollout)}"


def _memory(setup: Setup) -> str:
    """Of one device while the run samples, by name, the largest first."""
    program, held, state = _sampling(setup), held_by_training(setup), train_state(setup)[0]
    if program is not None:
        held = program.resident | program.arguments
    parts = {name: device_bytes(tree) for name, tree in held.items()}
    shown = []
    for name, size in sorted(parts.items(), key=lambda item: -item[1]):
        if name == "cache":
            name = f"KV cache ({num_pages(held[name].pool):,} pages of {PAGE} tokens a data shard)"
        if size:
            shown.append(f"{name} {_size(size)}")
    total, limit = sum(parts.values()), memory_limit(setup.policy.mesh)
    if limit is not None:
        of = f" of {_size(limit)}"
    elif platform(setup.policy.mesh) == "cpu":
        of = f", the host has {_size(host_memory())}"
    else:
        of = ""
    leaves = jax.tree.leaves(state)
    on_host = {"optimiser": _total_bytes(x for x in leaves if _is_on_host(x))}
    if setup.step is not None and setup.step.updates > 1:
        on_host["copy of the state that a step begins with"] = _total_bytes(leaves)
    named = ", ".join(f"{name} {_size(size)}" for name, size in on_host.items() if size)
    kept = f"; on hosts: {named}" if named else ""
    return f"a device holds {_size(total)}{of}: {', '.join(shown)}{kept}; temporaries come on top"


def _sampling(setup: Setup) -> Program | None:
    """The program that draws tokens in a step or, in a supervised run, in an evaluation; None where nothing is sampled."""
    if setup.step is not None:
        return rollout_programs(setup, training_rollout(setup, setup.widths))["decode"]
    if setup.held_out is not None:
        return evaluation_programs(setup, setup.held_out)["evaluation"]
    return None


def _written(setup: Setup) -> str:
    config, train = setup.config, setup.config.train
    size = _total_bytes(jax.tree.leaves(train_state(setup)[0]))
    kept = f"the newest {train.keep_checkpoints} of them kept{_free(config)}"
    parts = [
        f"{config.folder}: metrics, samples",
        f"a checkpoint ({_size(size)}) every {train.checkpoint_every} steps, {kept}",
    ]
    parts += [kind.title for kind in wanted(config).values()]
    return "; ".join(parts)


def _free(config: Config) -> str:
    """What the disk has left for them; nothing for a store."""
    if is_url(config.folder):
        return ""
    there = next(path for path in config.folder.absolute().parents if path.exists())
    return f" ({_size(shutil.disk_usage(there).free)} free)"


def _is_on_host(x: Any) -> bool:
    return x.sharding is not None and x.sharding.memory_kind == HOST_MEMORY


def _total_bytes(leaves: Any) -> int:
    """Of abstract arrays, wherever they lie."""
    return sum(
        math.prod(x.shape) * x.dtype.itemsize
        for x in leaves
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _size(size: float) -> str:
    """Bytes, readable."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if size >= 2**shift:
            return f"{size / 2**shift:,.1f} {unit}"
    return f"{size / 2**10:,.1f} KiB"
