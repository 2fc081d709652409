"""The programs that a run compiles, lowered with abstract weights on a mesh whose devices need not be here.

    step_programs(setup, lengths)        those that a step of `rest-jax train` or `rest-jax sft` calls, at these lengths
    memory_programs(setup, lengths)      all that can decide how much memory a run needs, evaluations among them

They are those of a run: `rl.step`, `rl.supervised` and `rollout.engine` make them. What is on a device while a program runs
is its arguments and what other programs have left there; a Program names both, so that memory has names.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rest_jax.distributed import (
    HOST_MEMORY,
    activate,
    batch_sharding,
    num_data_shards,
    place,
    replicated,
)
from rest_jax.models.decoder import param_shardings
from rest_jax.models.policy import Policy
from rest_jax.planning.setup import (
    HeldOut,
    Lengths,
    Row,
    Setup,
    StepRows,
    attention_trips,
    longest_rows,
    rows_at,
)
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.packing import Rows, bucket
from rest_jax.rl.prepare import Recomputed
from rest_jax.rl.step import Logprobs, Update, abstract_state, make_step
from rest_jax.rl.supervised import GoldBatch, make_prepare_gold, make_supervised_update
from rest_jax.rollout.engine import (
    Engine,
    NewRequests,
    RolloutSettings,
    Widths,
    cast_programs,
    make_engine,
    rollout_cast,
    rollout_decoder,
    token_routes,
)
from rest_jax.rollout.scheduler import response_widths, rollout_settings
from rest_jax.types import RolloutBatch, Routes, Sampling, ScoredBatch, TrainState

Tree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program: how to lower it, and what is on the devices meanwhile, by name."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Tree]
    resident: dict[str, Tree]  # no arguments of it
    # of its loops that values decide, by part (`measure.Sizes`)
    trips: Mapping[str, float] = dataclasses.field(default_factory=dict)


def step_programs(setup: Setup, lengths: Lengths) -> dict[str, Program]:
    """The programs that a step at these lengths calls, in their order, but for `resize`, which it seldom does."""
    found = {}
    if setup.step is not None:
        found |= rollout_programs(setup, training_rollout(setup, lengths))
        del found["resize"]
    return found | update_programs(setup, rows_at(setup, lengths))


def memory_programs(setup: Setup, lengths: Lengths) -> dict[str, Program]:
    """The programs among which the one is that needs the most, where the longest groups have these lengths. "fullest ..." is
    that with the micro-batch of the most positions.
    """
    own, longest = rows_at(setup, lengths), longest_rows(setup)
    found = update_programs(setup, own)
    kinds = {"update": 0, "logprobs": 1, "reference logprobs": 1}
    longer = [n for n, i in kinds.items() if n in found and longest[i].length > own[i].length]
    fullest = update_programs(setup, longest) if longer else {}
    for name in longer:
        found[f"fullest {name}"] = dataclasses.replace(fullest[name], name=f"fullest {name}")
    if setup.step is not None:
        found |= rollout_programs(setup, training_rollout(setup, lengths))
    if setup.held_out is not None:
        found |= evaluation_programs(setup, setup.held_out)
    return found


# --- the update -------------------------------------------------------------------------------------------------------------


def update_programs(setup: Setup, rows: StepRows) -> dict[str, Program]:
    """`prepare`, which makes the batch; `update`, the gradient of a micro-batch of these rows; `apply`, the optimiser. `logprobs`
    and `reference logprobs`, where the config asks for them: forward passes over a micro-batch.
    """
    if setup.step is None:
        return _supervised_programs(setup, rows.update)
    config, mesh = setup.config, setup.policy.mesh
    state, shardings = train_state(setup)
    rl = make_step(setup.policy.decoder, setup.tx, setup.step, mesh, shardings)
    scored, kept = _scored(setup), _reference(setup, state)
    token = scored.rollout.logp
    recomputed = Recomputed(token, token, token) if config.rollout.recompute_logprobs else None
    minibatch = place(_numbers((setup.groups,)), replicated(mesh))
    given = scored, recomputed, token if kept else None, minibatch, state.curriculum
    found = {}
    if recomputed is not None:
        found["logprobs"] = _logprobs(rl.logprobs, setup, rows.forward, scored.rollout, state)
    if kept:
        own = dataclasses.replace(scored.rollout, routes=None)
        program = _logprobs(rl.logprobs, setup, rows.forward, own, state)
        found["reference logprobs"] = dataclasses.replace(program, name="reference logprobs")
    found["prepare"] = _prepare(rl.prepare, given, scored, state, kept)
    batch, _, _ = jax.eval_shape(rl.prepare, *given)
    return found | gradient_programs(rl.update, state, batch, rows.update, kept)


def _supervised_programs(setup: Setup, row: Row) -> dict[str, Program]:
    config, mesh = setup.config, setup.policy.mesh
    state, shardings = train_state(setup)
    prepare = make_prepare_gold(config.sft, mesh)
    update = make_supervised_update(setup.policy.decoder, setup.tx, config.loss, mesh, shardings)
    tokens = (setup.groups, 1, setup.widths.response)
    gold = place(
        GoldBatch(
            prompt=_numbers((setup.groups, setup.widths.prompt)),
            prompt_length=_numbers(tokens[:1]),
            responses=_numbers(tokens),
            response_length=_numbers(tokens[:2]),
            region=_numbers(tokens, jnp.int8),
        ),
        batch_sharding(mesh),
    )
    batch = jax.eval_shape(prepare, gold)
    return {"prepare": _prepare(prepare, (gold,), gold, state, {})} | gradient_programs(
        update, state, batch, row, {}
    )


def _prepare(prepare, given: tuple, batch: Tree, state: TrainState, kept: dict) -> Program:
    held = {"parameters": state.params, "optimiser": state.opt_state, **kept}
    return Program("prepare", lambda: prepare.lower(*given), {"batch": batch}, held)


def gradient_programs(
    update: Update, state: TrainState, batch: Tree, row: Row, kept: dict[str, Tree]
) -> dict[str, Program]:
    """`update`, the gradient of a micro-batch added to what there is, and `apply` of any loss.

    `state` and `batch` are abstract; `kept` is what else stays on the devices.
    """
    mesh = update.mesh
    batch = place(batch, batch_sharding(mesh))
    rows = _rows(row, mesh)
    with activate(mesh):
        gradient, totals = jax.eval_shape(update.zero, state.params, batch)
    gradient = place(gradient, jax.tree.map(lambda x: x.sharding, state.params))
    totals = place(totals, replicated(mesh))
    parameters = {"parameters": state.params, "gradient": gradient}
    optimiser = {"optimiser": state.opt_state}
    return {
        "update": Program(
            "update",
            lambda: update.add.lower((gradient, totals), state.params, batch, rows),
            parameters | {"batch": batch},
            optimiser | kept,
            row.trips,
        ),
        "apply": Program(
            "apply",
            lambda: update.apply.lower(state, gradient, totals),
            parameters | optimiser,
            {"batch": batch, **kept},
        ),
    }


def _logprobs(
    logprobs: Logprobs, setup: Setup, row: Row, rollout: RolloutBatch, state: TrainState
) -> Program:
    rows = _rows(row, setup.policy.mesh)
    values = Recomputed(rollout.logp, rollout.entropy, rollout.gini)
    kept = _reference(setup, state)
    return Program(
        "logprobs",
        lambda: logprobs.add.lower(state.params, values, rollout, rows),
        {"parameters": state.params, "batch": rollout},
        {"optimiser": state.opt_state, **kept},
        row.trips,
    )


def _rows(row: Row, mesh: Mesh) -> Rows:
    shards = num_data_shards(mesh)
    table, groups = _numbers((shards, row.length)), _numbers((shards,))
    rows = Rows(table, table, table, table, groups, pairs=row.pairs)
    return place(rows, batch_sharding(mesh))


def train_state(setup: Setup) -> tuple[TrainState, TrainState]:
    """(abstract state, shardings); how long the schedule of the weights is changes no program."""
    schedule = Schedule(setup.config.weights, setup.config.curriculum, 1)
    return abstract_state(setup.policy, setup.tx, schedule, setup.config.optimizer.moments)


def _reference(setup: Setup, state: TrainState) -> dict[str, Tree]:
    """The starting policy, which a KL term keeps on the devices."""
    kept = setup.step is not None and setup.config.loss.kl_coefficient > 0
    return {"reference": state.params} if kept else {}


def _scored(setup: Setup) -> ScoredBatch:
    """The abstract batch of a step, as long as it may be."""
    most = setup.widths
    groups, tokens = (setup.groups,), (setup.groups, setup.group_size, most.response)
    each, reward = _numbers(tokens, jnp.float32), _numbers(tokens[:2], jnp.float32)
    routes = None
    if setup.config.rollout.replay_routing:
        route = token_routes(setup.policy.config)
        shapes = ((*groups, most.prompt), tokens)
        routes = Routes(*(_numbers((*shape, *route.shape), route.dtype) for shape in shapes))
    rollout = RolloutBatch(
        prompt=_numbers((*groups, most.prompt)),
        prompt_length=_numbers(groups),
        responses=_numbers(tokens),
        response_length=_numbers(tokens[:2]),
        logp=each,
        entropy=each,
        gini=each,
        routes=routes,
    )
    scored = ScoredBatch(rollout, _numbers(tokens, jnp.int8), reward, reward)
    return place(scored, batch_sharding(setup.policy.mesh))


# --- the rollout and the evaluation -----------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What is sampled: `groups` of each data shard, of these lengths; no prompt is longer than `widest`."""

    groups: int
    lengths: Lengths
    widest: int
    settings: RolloutSettings


def training_rollout(setup: Setup, lengths: Lengths) -> Rollout:
    """The rollout of a step."""
    r, policy = setup.config.rollout, setup.policy
    assert setup.step is not None
    settings = rollout_settings(policy, r, r.group_size, setup.step.sampling, r.replay_routing)
    groups = -(-setup.groups // num_data_shards(policy.rollout_mesh))
    return Rollout(groups, lengths, setup.widths.prompt, settings)


def evaluation_programs(setup: Setup, held_out: HeldOut) -> dict[str, Program]:
    """Those of the greedy rollout of an evaluation, one completion a prompt: `evaluation` decodes, the others are called after
    their part. Its `prefill` and, in a supervised run, its `cast` are made once.
    """
    r, policy = setup.config.rollout, setup.policy
    settings = rollout_settings(policy, r, 1, Sampling(greedy=True))
    groups = settings.decode_slots
    if held_out.prompts is not None:
        groups = -(-held_out.prompts // num_data_shards(policy.rollout_mesh))
    lengths = Lengths(held_out.tokens, r.max_response_tokens)
    found = rollout_programs(setup, Rollout(groups, lengths, held_out.tokens, settings))
    if setup.step is not None:
        del found["cast"]
    names = {
        name: "evaluation" if name == "decode" else name if name == "cast" else f"evaluation {name}"
        for name in found
    }
    return {
        names[name]: dataclasses.replace(program, name=names[name])
        for name, program in found.items()
    }


def rollout_programs(setup: Setup, rollout: Rollout) -> dict[str, Program]:
    """`cast`, `prefill`, `insert`, `start`, `decode`, `resize` with caches for what is sampled."""
    parts = _rollout_parts(setup.policy, rollout)
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
    until = np.full((1, widths.prompt), widths.prompt, np.int32)
    trips = {"prefill": attention_trips(setup.policy.config, until)}
    return {
        name: Program(name, lower, *memory[name], trips.get(name, {}))
        for name, lower in lowered.items()
    }


@dataclasses.dataclass(frozen=True)
class _RolloutParts:
    """The engine of a rollout and what it works on, abstract."""

    engine: Engine
    weights: Tree
    state: Tree  # as wide as it becomes
    narrower: Tree  # as it was before
    widths: Widths
    slots: int  # decode slots of a data shard


def _rollout_parts(policy: Policy, rollout: Rollout) -> _RolloutParts:
    mesh, settings, lengths = policy.rollout_mesh, rollout.settings, rollout.lengths
    decoder, cast = rollout_decoder(policy), rollout_cast(policy)
    engine = make_engine(decoder, settings, mesh)
    sizes = settings.sizes(rollout.groups)
    at = param_shardings(decoder.cfg, mesh, layout="rollout")
    # when responses have reached their length
    reached = next(n for n in response_widths(settings) if n >= lengths.response)
    widths = Widths(bucket(lengths.prompt, rollout.widest), reached)
    shorter = [n for n in response_widths(settings) if n < reached]
    before = widths._replace(response=shorter[-1] if shorter else reached)
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
    state, _ = train_state(setup)
    batch = {} if setup.step is None else {"batch": _scored(setup)}
    kept = batch | _reference(setup, state)
    return {"parameters": state.params, "optimiser": state.opt_state, **kept}


def _numbers(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def device_bytes(tree: Tree) -> int:
    """Bytes of a tree of abstract arrays on one device; what is kept in the memory of its host is not there."""

    def one(x: Any) -> int:
        if x.sharding is not None and x.sharding.memory_kind == HOST_MEMORY:
            return 0
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return 8 * math.prod(shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


def hosts(mesh: Mesh) -> np.ndarray:
    """int [devices]: the process that each device of a mesh belongs to, in the order of the mesh."""
    return np.array([device.process_index for device in mesh.devices.flat])
