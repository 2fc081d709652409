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
from rest_jax.models.cache import PageTable
from rest_jax.models.decoder import param_shardings, with_adapters
from rest_jax.models.lora import pair_up
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
from rest_jax.rewards.score import PARTS
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.packing import Rows
from rest_jax.rl.prepare import Recomputed
from rest_jax.rl.rules import find_phrases
from rest_jax.rl.step import Logprobs, Update, abstract_state, make_step
from rest_jax.rl.supervised import GoldBatch, make_prepare_gold, make_supervised_update
from rest_jax.rollout.cast import cast_programs, group_members, rollout_cast, rollout_decoder
from rest_jax.rollout.engine import (
    DecodeCall,
    Engine,
    PromptRows,
    Requests,
    RolloutSettings,
    Sizes,
    make_engine,
    token_routes,
)
from rest_jax.rollout.scheduler import prefill_width, rollout_settings, table_columns
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
    """The programs that a step at these lengths calls, in their order."""
    found = {}
    if setup.step is not None:
        found |= rollout_programs(setup, training_rollout(setup, lengths))
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
    scored, has_reference = _scored(setup), config.loss.kl_coefficient > 0
    token = scored.rollout.logp
    recomputed = Recomputed(token, token, token) if config.rollout.recompute_logprobs else None
    minibatch = place(_numbers((setup.groups,)), replicated(mesh))
    given = scored, recomputed, token if has_reference else None, minibatch, state.curriculum
    found, frozen = {}, setup.policy.frozen
    if recomputed is not None or config.train.measure_change:
        own = with_adapters(state.params, frozen), scored.rollout
        found["logprobs"] = _logprobs(rl.logprobs, setup, rows.forward, own, state)
    if has_reference:
        weights = with_adapters(state.params, frozen) if _reference(setup, state) else frozen
        own = weights, dataclasses.replace(scored.rollout, routes=None)
        program = _logprobs(rl.logprobs, setup, rows.forward, own, state)
        found["reference logprobs"] = dataclasses.replace(program, name="reference logprobs")
    found["prepare"] = _prepare(setup, rl.prepare, given, scored, state)
    batch, *_ = jax.eval_shape(rl.prepare, *given)
    return found | gradient_programs(setup, rl.update, state, batch, rows.update)


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
    own = _prepare(setup, prepare, (gold,), gold, state)
    return {"prepare": own} | gradient_programs(setup, update, state, batch, row)


def _prepare(setup: Setup, prepare: Any, given: tuple, batch: Tree, state: TrainState) -> Program:
    held = _weights(setup, state) | {"optimiser": state.opt_state, **_reference(setup, state)}
    return Program("prepare", lambda: prepare.lower(*given), {"batch": batch}, held)


def gradient_programs(
    setup: Setup, update: Update, state: TrainState, batch: Tree, row: Row
) -> dict[str, Program]:
    """`update`, the gradient of a micro-batch added to what there is, and `apply` of any loss.

    `state` and `batch` are abstract.
    """
    mesh, frozen, kept = update.mesh, setup.policy.frozen, _reference(setup, state)
    batch = place(batch, batch_sharding(mesh))
    rows = _rows(row, mesh)
    with activate(mesh):
        gradient, totals = jax.eval_shape(update.zero, state.params, batch, frozen=frozen)
    gradient = place(gradient, jax.tree.map(lambda x: x.sharding, state.params))
    totals = place(totals, replicated(mesh))
    optimiser, base = {"optimiser": state.opt_state}, _base(setup)
    return {
        "update": Program(
            "update",
            lambda: update.add.lower((gradient, totals), state.params, batch, rows, frozen=frozen),
            _weights(setup, state) | {"gradient": gradient, "batch": batch},
            optimiser | kept,
            row.trips,
        ),
        "apply": Program(
            "apply",
            lambda: update.apply.lower(state, gradient, totals),
            {"parameters": state.params, "gradient": gradient} | optimiser,
            {"batch": batch, **base, **kept},
        ),
    }


def _logprobs(
    logprobs: Logprobs, setup: Setup, row: Row, given: tuple[Tree, RolloutBatch], state: TrainState
) -> Program:
    """Of these parameters of the decoder and this rollout."""
    (weights, rollout), rows = given, _rows(row, setup.policy.mesh)
    values = Recomputed(rollout.logp, rollout.entropy, rollout.gini)
    return Program(
        "logprobs",
        lambda: logprobs.add.lower(weights, values, rollout, rows),
        _weights(setup, state) | {"batch": rollout},
        {"optimiser": state.opt_state, **_reference(setup, state)},
        row.trips,
    )


def _base(setup: Setup) -> dict[str, Tree]:
    """The frozen weights of a run with LoRA."""
    return {} if setup.policy.frozen is None else {"base": setup.policy.frozen}


def _weights(setup: Setup, state: TrainState) -> dict[str, Tree]:
    """What is trained, and the frozen weights beside it."""
    return {"parameters": state.params} | _base(setup)


def _rows(row: Row, mesh: Mesh) -> Rows:
    shards = num_data_shards(mesh)
    table, groups = _numbers((shards, row.length)), _numbers((shards,))
    rows = Rows(table, table, table, table, groups, pairs=row.pairs)
    return place(rows, batch_sharding(mesh))


def train_state(setup: Setup) -> tuple[TrainState, TrainState]:
    """(abstract state, shardings); how long the schedule of the weights is changes no program."""
    schedule = Schedule.of(setup.config, 1)
    return abstract_state(setup.policy, setup.tx, schedule, setup.config.optimizer.moments)


def _reference(setup: Setup, state: TrainState) -> dict[str, Tree]:
    """The starting policy, which a KL term keeps on the devices; with LoRA that is the base, which is there anyway, with the
    adapters of a folder if it begins with those.
    """
    kept = setup.step is not None and setup.config.loss.kl_coefficient > 0
    kept = kept and (setup.policy.frozen is None or setup.config.refers_to_adapters)
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
    scored = ScoredBatch(
        rollout,
        region=_numbers(tokens, jnp.int8),
        reward=reward,
        format_score=reward,
        parts=_numbers((*tokens[:2], len(PARTS)), jnp.float32),
        exact=_numbers(tokens[:2], jnp.bool_),
        marked=_numbers(tokens, jnp.bool_) if find_phrases(setup.config) else None,
    )
    return place(scored, batch_sharding(setup.policy.mesh))


# --- the rollout and the evaluation -----------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What is sampled: `groups` of each data shard, of these lengths; no prompt is longer than `widest`."""

    groups: int
    lengths: Lengths
    widest: int
    settings: RolloutSettings

    @property
    def sizes(self) -> Sizes:
        """What a data shard holds."""
        return self.settings.sizes(self.groups, self.widest)

    @property
    def prefill_width(self) -> int:
        """Positions of a row of prompts."""
        pages = -(-self.lengths.prompt // self.settings.page)
        return prefill_width(pages, self.groups * pages, self.settings.page)

    def visited_pages(self) -> dict[str, float]:
        """Pages that the kernels of `decode` visit for a token, by the name of their scope: those of the prompts of complete
        groups, and of responses that have half of their length, what they have just drawn included.
        """
        page, slots = self.settings.page, self.sizes.slots
        prompts = -(-slots // self.settings.group_size)
        return {
            "prompt_pages": prompts * -(-self.lengths.prompt // page),
            "response_pages": slots * (self.lengths.response / 2 / page + 1),
        }


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
        name: {"decode": "evaluation", "cast": "cast"}.get(name, f"evaluation {name}")
        for name in found
    }
    return {
        names[name]: dataclasses.replace(program, name=names[name])
        for name, program in found.items()
    }


def rollout_programs(setup: Setup, rollout: Rollout) -> dict[str, Program]:
    """`cast`, `prefill`, `decode` with pages for what is sampled."""
    policy, settings, sizes = setup.policy, rollout.settings, rollout.sizes
    mesh, decoder = policy.rollout_mesh, rollout_decoder(policy)
    engine = make_engine(decoder, settings, mesh)
    merged = rollout_cast(dataclasses.replace(policy, adapters=None))
    weights = place(
        jax.eval_shape(merged, policy.params),
        param_shardings(decoder.cfg, mesh, layout="rollout"),
    )
    state = place(
        jax.eval_shape(functools.partial(engine.empty_state, sizes)), engine.state_shardings
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    given = place(
        (_prompt_rows(engine, rollout), _decode_call(engine, rollout)), batch_sharding(mesh)
    )
    trained = held_by_training(setup)
    read = {name: trained[name] for name in ("parameters", "base") if name in trained}
    moments = {name: tree for name, tree in trained.items() if name not in read}
    own, cache = {"rollout weights": weights}, {"cache": state}
    until = np.full((1, rollout.prefill_width), rollout.lengths.prompt, np.int32)
    programs = (
        Program(
            "cast",
            lambda: _lower_cast(policy),
            read,
            moments | own,
        ),
        Program(
            "prefill",
            lambda: _lower_on(mesh, engine.prefill, weights, state, given[0], None),
            own | cache,
            trained,
            attention_trips(policy.config, until),
        ),
        Program(
            "decode",
            lambda: _lower_on(mesh, engine.decode, weights, state, given[1], key, _numbers(())),
            own | cache,
            trained,
            rollout.visited_pages(),
        ),
    )
    return {program.name: program for program in programs}


def _lower_on(mesh: Mesh, program: Any, *given: Any) -> jax.stages.Lowered:
    """On the mesh of rollouts, which may be another than that of the training."""
    with activate(mesh):
        return program.lower(*given)


def _prompt_rows(engine: Engine, rollout: Rollout) -> PromptRows:
    width = rollout.prefill_width
    row = _numbers((engine.num_shards, width))
    page = _numbers((engine.num_shards, width // rollout.settings.page))
    return PromptRows(row, row, row, page, page, page, page)


def _decode_call(engine: Engine, rollout: Rollout) -> DecodeCall:
    """As it is when prompts and responses have reached their lengths."""
    sizes, shards, page = rollout.sizes, engine.num_shards, rollout.settings.page
    used = (-(-rollout.lengths.prompt // page), -(-rollout.lengths.response // page))
    columns = table_columns(used, sizes, engine.gathers)
    slot = _numbers((shards, sizes.slots))
    waiting = _numbers((shards, sizes.entries * rollout.settings.group_size))
    return DecodeCall(
        queue=Requests(*(waiting,) * 5),
        queued=_numbers((shards,)),
        prompts=PageTable(*(_numbers((shards, sizes.entries, columns[0])),) * 3),
        responses=PageTable(*(_numbers((*slot.shape, columns[1])),) * 3),
        running=_numbers(slot.shape, bool),
        next_page=slot,
        enough=_numbers((shards,)),
    )


def _lower_cast(policy: Policy) -> Any:
    """Of the largest parameter: they are cast one after another."""
    operands = group_members(pair_up(policy.params, policy.adapters), rollout_decoder(policy).cfg)
    given = jax.tree.leaves(operands, is_leaf=lambda x: isinstance(x, list))
    leaves = zip(jax.tree.leaves(cast_programs(policy)), given, strict=True)
    program, largest = max(
        leaves, key=lambda pair: sum(math.prod(weights.shape) for weights, *_ in pair[1])
    )
    return program.lower(*largest)


def held_by_training(setup: Setup) -> dict[str, Tree]:
    """What a run holds on the devices while it samples."""
    state, _ = train_state(setup)
    batch = {} if setup.step is None else {"batch": _scored(setup)}
    kept = batch | _reference(setup, state)
    return _weights(setup, state) | {"optimiser": state.opt_state, **kept}


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
