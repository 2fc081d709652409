"""The programs that a run compiles, lowered with abstract weights on a mesh whose devices need not be here.

    setup = abstract_setup(config, devices)        config, policy without weights, optimiser, static side of the steps
    programs(setup, lengths)                       -> the update's and the rollout's Programs at the given lengths

They are those of a run: `rl.step.make_step` and `rollout.engine.make_engine` make them. What is on a device while a program runs
is its arguments and what other programs have left there; a Program names both, so that memory has names.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from rest_jax.config import Config, locate
from rest_jax.distributed import (
    activate,
    batch_sharding,
    make_mesh,
    num_data_shards,
    place,
    replicated,
    with_tensor,
)
from rest_jax.errors import UserError
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder, abstract_params, param_shardings
from rest_jax.models.hf.config import decoder_config
from rest_jax.models.policy import Policy, compute_dtype
from rest_jax.models.presets import PRESETS, preset
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.packing import BUCKETS, BatchLengths, MicroBatch, Picker, bucket
from rest_jax.rl.prepare import StepConfig
from rest_jax.rl.step import Update, abstract_state, make_step, plan_minibatches
from rest_jax.rl.supervised import SupervisedBatch, plan_supervised
from rest_jax.rollout.engine import (
    Engine,
    NewRequests,
    RolloutSettings,
    Widths,
    cast_programs,
    make_engine,
    rollout_cast,
    rollout_decoder,
)
from rest_jax.rollout.scheduler import response_widths, rollout_settings
from rest_jax.types import RolloutBatch, Sampling, ScoredBatch, TrainState

Tree = Any


class Lengths(NamedTuple):
    """Tokens of every prompt and of every response."""

    prompt: int
    response: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the programs of a run are made of; the policy's parameters are abstract, with shardings."""

    config: Config
    policy: Policy
    step: StepConfig
    tx: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program: how to lower it, and what is on the devices meanwhile, by name."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Tree]
    resident: dict[str, Tree]  # no arguments of it


@dataclasses.dataclass(frozen=True)
class _AnyTokenizer:
    """Ids that a rollout knows of; which they are changes no program."""

    pad_id: int = 0
    stop_ids: tuple[int, ...] = (1,)


def model_config(source: str) -> DecoderConfig:
    """Sizes of a model from its config.json (a folder's, or the file), or of a published one by its name, with or without the
    owner's: no weights are read, nothing is fetched. UserError names the known ones.
    """
    path = pathlib.Path(locate(source))
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return decoder_config(json.loads(file.read_text()))
    known = {_size_name(hub_id): hub_id for hub_id in PRESETS}
    if _size_name(source) not in known:
        raise UserError(
            f"model.source {source}: neither a folder with a config.json nor a published size; known: {', '.join(known)}"
        )
    return preset(known[_size_name(source)])


def _size_name(source: str) -> str:
    return re.sub(r"-(instruct|thinking|base)\b", "", source.rpartition("/")[2].lower())


def abstract_setup(
    config: Config, devices: Sequence[Any], step_config: Callable[[Config, int], StepConfig]
) -> Setup:
    """The setup of `config` on these devices. UserError for a mesh that they or the model do not fit."""
    mesh = make_mesh(config.mesh, devices)
    cfg = dataclasses.replace(
        model_config(config.model.source),
        dtype=compute_dtype(config.model.dtype, mesh),
        remat=config.model.remat,
    )
    params = place(nn.meta.unbox(abstract_params(cfg)), param_shardings(cfg, mesh))
    tokenizer: Any = _AnyTokenizer()
    tensor = config.rollout.tensor
    rollout_mesh = mesh if tensor is None else with_tensor(mesh, tensor)
    policy = Policy(Decoder(cfg), params, tokenizer, mesh, rollout_mesh, pathlib.Path())
    steps = config.train.steps or 100  # a constant of the schedules
    step = step_config(config, steps)
    return Setup(config, policy, step, make_optimizer(config.optimizer, steps * step.updates))


def longest(config: Config) -> Lengths:
    """The longest prompts and responses that a config allows."""
    return Lengths(config.data.max_prompt_tokens, config.rollout.max_response_tokens)


def micro_batches(setup: Setup, lengths: Lengths) -> list[MicroBatch]:
    """The micro-batches of one update in which all groups are active and as long as `lengths`."""
    config, mesh = setup.config, setup.policy.mesh
    rollout, most = config.rollout, longest(config)
    shape = (rollout.prompts_per_step, rollout.group_size)
    batch = BatchLengths(
        np.full(shape[0], lengths.prompt, np.int32),
        np.full(shape, lengths.response, np.int32),
        (max(lengths.prompt, most.prompt), most.response),
    )
    reward = np.zeros(shape, np.float32)
    reward[:, 0] = 1
    return plan_minibatches(batch, reward, setup.step, mesh)[0]


def fullest(setup: Setup, most: Lengths) -> Lengths:
    """The lengths, at most these, whose micro-batch has the most positions: of several the longest responses."""
    step, rollout = setup.step, setup.config.rollout
    limit = step.max_tokens_per_microbatch
    shards = num_data_shards(setup.policy.mesh)
    groups = max(1, rollout.prompts_per_step // step.updates // shards)
    if limit is None or step.noise_groups is not None:
        return most
    best, found = 0, most
    for prompt in sorted(
        {bucket(b, most.prompt) for b in BUCKETS if b <= most.prompt} | {most.prompt}
    ):
        for response in sorted({b for b in BUCKETS if b <= most.response} | {most.response}):
            cost = prompt + rollout.group_size * response
            rows = max(1, min(groups, limit // cost))
            rows = rows if rows == groups else 1 << (rows.bit_length() - 1)
            if (rows * cost, response) > (best, found.response):
                best, found = rows * cost, Lengths(prompt, response)
    return found


def update_programs(setup: Setup, lengths: Lengths) -> dict[str, Program]:
    """`update`, the gradient of the largest micro-batch of these lengths, added to what there is; `apply`, the optimiser."""
    config, mesh = setup.config, setup.policy.mesh
    state, shardings = abstract_state(setup.policy, setup.tx, setup.step.schedule)
    rl = make_step(setup.policy.decoder, setup.tx, setup.step, mesh, shardings)
    scored = place(_scored(config), batch_sharding(mesh))
    kl = config.loss.kl_coefficient > 0
    logp_ref = scored.rollout.logp if kl else None
    minibatch = _numbers((config.rollout.prompts_per_step,))
    batch, _, _ = jax.eval_shape(rl.prepare, scored, None, logp_ref, minibatch, state.curriculum)
    reference = {"reference": state.params} if kl else {}
    return gradient_programs(rl.update, state, batch, micro_batches(setup, lengths)[0], reference)


def gradient_programs(
    update: Update, state: TrainState, batch: Tree, micro: MicroBatch, kept: dict[str, Tree]
) -> dict[str, Program]:
    """`update` and `apply` of any loss. `state` and `batch` are abstract; `kept` is what else stays on the devices."""
    mesh = update.mesh
    batch = place(batch, batch_sharding(mesh))
    pick = jax.ShapeDtypeStruct(micro.pick.shape, jnp.int32, sharding=batch_sharding(mesh))
    picker = Picker(pick, micro.widths, mesh)
    with activate(mesh):
        gradient, totals = jax.eval_shape(update.first, state.params, batch, picker)
    gradient = place(gradient, jax.tree.map(lambda x: x.sharding, state.params))
    totals = place(totals, replicated(mesh))
    parameters = {"parameters": state.params, "gradient": gradient}
    optimiser = {"optimiser": state.opt_state}
    return {
        "update": Program(
            "update",
            lambda: update.add.lower((gradient, totals), state.params, batch, picker),
            parameters | {"batch": batch},
            optimiser | kept,
        ),
        "apply": Program(
            "apply",
            lambda: update.apply.lower(state, gradient, totals),
            parameters | optimiser,
            {"batch": batch, **kept},
        ),
    }


def supervised_programs(
    update: Update, state: TrainState, size: int, lengths: Lengths, max_tokens: int | None
) -> dict[str, Program]:
    """`update` and `apply` of a supervised run whose batches are `size` records of these lengths."""
    tokens = (size, 1, lengths.response)
    batch = SupervisedBatch(
        prompt=_numbers((size, lengths.prompt)),
        prompt_length=_numbers((size,)),
        responses=_numbers(tokens),
        response_length=_numbers(tokens[:2]),
        loss_weight=_numbers(tokens, jnp.float32),
        plain_weight=_numbers(tokens, jnp.float32),
    )
    full = BatchLengths(
        np.full(size, lengths.prompt),
        np.full((size, 1), lengths.response),
        (lengths.prompt, lengths.response),
    )
    micro = plan_supervised(full, max_tokens, update.mesh)[0]
    return gradient_programs(update, state, batch, micro, {})


def rollout_programs(
    setup: Setup, lengths: Lengths, group_size: int, sampling: Sampling
) -> dict[str, Program]:
    """`cast`, `prefill`, `insert`, `start`, `decode`, `resize` with caches for these lengths; `group_size` 1: those of the
    evaluation.
    """
    parts = _rollout_parts(setup, lengths, group_size, sampling)
    engine, weights, state, widths = parts.engine, parts.weights, parts.state, parts.widths
    shards = engine.num_shards
    of_shard, scalar = _numbers((shards,)), _numbers(())
    of_slot = _numbers((shards, parts.slots))
    tokens = _numbers((shards, widths.prompt))
    requests = NewRequests(jax.ShapeDtypeStruct(of_slot.shape, bool), *(of_slot,) * 4)
    key = jax.eval_shape(lambda: jax.random.key(0))
    kept = place(of_slot, batch_sharding(setup.policy.rollout_mesh))
    prefilled = jax.eval_shape(engine.prefill, weights, tokens, of_shard)._replace(routes=None)
    trained = _trained(setup)
    moments = {name: tree for name, tree in trained.items() if name != "parameters"}
    own, cache = {"rollout weights": weights}, {"cache": state}
    lowered = {
        "cast": lambda: _lower_cast(setup.policy),
        "prefill": lambda: engine.prefill.lower(weights, tokens, of_shard),
        "insert": lambda: engine.insert.lower(state, prefilled, of_shard),
        "start": lambda: engine.start.lower(state, requests, key, scalar),
        "decode": lambda: engine.decode.lower(weights, state, scalar, of_shard),
        "resize": lambda: engine.resize.lower(parts.narrower, kept, widths),
    }
    # what each takes, and what lies beside it
    memory = {
        "cast": ({"parameters": setup.policy.params}, moments | own),
        "prefill": (own, trained | cache),
        "insert": (cache, trained | own),
        "start": (cache, trained | own),
        "decode": (own | cache, trained),
        "resize": ({"cache": parts.narrower}, trained | own),
    }
    return {name: Program(name, lower, *memory[name]) for name, lower in lowered.items()}


@dataclasses.dataclass(frozen=True)
class _RolloutParts:
    """The engine of a rollout and what it works on, abstract."""

    engine: Engine
    weights: Tree
    state: Tree  # as wide as it becomes
    narrower: Tree  # as it was before
    widths: Widths
    slots: int  # decode slots of a data shard


def _rollout_parts(
    setup: Setup, lengths: Lengths, group_size: int, sampling: Sampling
) -> _RolloutParts:
    policy, mesh = setup.policy, setup.policy.rollout_mesh
    settings = rollout_settings(policy, setup.config.rollout, group_size, sampling)
    decoder, cast = rollout_decoder(policy), rollout_cast(policy)
    engine = make_engine(decoder, settings, mesh)
    sizes = settings.sizes(groups_of_shard(setup))
    at = param_shardings(decoder.cfg, mesh, layout="rollout")
    widths = cache_widths(settings, lengths, longest(setup.config))
    shorter = [n for n in response_widths(settings) if n < widths.response]
    before = widths._replace(response=shorter[-1] if shorter else widths.response)
    states = (
        place(
            jax.eval_shape(functools.partial(engine.empty_state, *sizes, w)), engine.state_shardings
        )
        for w in (widths, before)
    )
    weights = place(jax.eval_shape(cast, policy.params), at)
    return _RolloutParts(engine, weights, *states, widths=widths, slots=sizes[1])


def _lower_cast(policy: Policy) -> Any:
    """Of the largest parameter: they are cast one after another."""
    leaves = zip(
        jax.tree.leaves(cast_programs(policy)), jax.tree.leaves(policy.params), strict=True
    )
    program, largest = max(leaves, key=lambda pair: math.prod(pair[1].shape))
    return program.lower(largest)


def _trained(setup: Setup) -> dict[str, Tree]:
    """What a run holds on the devices while it samples."""
    state, _ = abstract_state(setup.policy, setup.tx, setup.step.schedule)
    kept = {"reference": state.params} if setup.config.loss.kl_coefficient > 0 else {}
    batch = place(_scored(setup.config), batch_sharding(setup.policy.mesh))
    return {"parameters": state.params, "optimiser": state.opt_state, "batch": batch, **kept}


def groups_of_shard(setup: Setup) -> int:
    """Prompts of a step that a data shard samples for."""
    return -(-setup.config.rollout.prompts_per_step // num_data_shards(setup.policy.rollout_mesh))


def cache_widths(settings: RolloutSettings, lengths: Lengths, most: Lengths) -> Widths:
    """Widths of the caches when responses have reached their length."""
    response = next(n for n in response_widths(settings) if n >= lengths.response)
    return Widths(bucket(lengths.prompt, most.prompt), response)


def _scored(config: Config) -> ScoredBatch:
    """The abstract batch of a step, as long as it may be."""
    r, most = config.rollout, longest(config)
    groups, tokens = (r.prompts_per_step,), (r.prompts_per_step, r.group_size, most.response)
    each, reward = _numbers(tokens, jnp.float32), _numbers(tokens[:2], jnp.float32)
    rollout = RolloutBatch(
        prompt=_numbers((*groups, most.prompt)),
        prompt_length=_numbers(groups),
        responses=_numbers(tokens),
        response_length=_numbers(tokens[:2]),
        logp=each,
        entropy=each,
        gini=each,
    )
    return ScoredBatch(rollout, _numbers(tokens, jnp.int8), reward, reward)


def _numbers(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def device_bytes(tree: Tree) -> int:
    """Bytes of a tree of abstract arrays on one device."""

    def one(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return 8 * math.prod(shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


def hosts(mesh: Mesh) -> np.ndarray:
    """int [devices]: the process that each device of a mesh belongs to, in the order of the mesh."""
    return np.array([device.process_index for device in mesh.devices.flat])
