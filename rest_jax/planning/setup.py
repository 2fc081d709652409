"""What the programs of a run are made of, for devices that need not be here: sizes, lengths, the shapes of micro-batches.

    setup = abstract_setup(config, devices, step_config)      config, policy without weights, optimiser, what is held out
    longest(config, supervised)                               the lengths that a plan is for, unless it is told others
    rows_at(setup, lengths), longest_rows(setup)              how a mini-batch is packed

A run (`train.py`, `sft.py`) makes a Setup of its own policy and data for the check of memory at its start.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rest_jax.config import Config, locate
from rest_jax.distributed import check_batch, make_mesh, num_data_shards, place, with_tensor
from rest_jax.errors import UserError
from rest_jax.models.block_attention import WIDE, cpu_blocks, mean_visits
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import (
    Decoder,
    abstract_adapters,
    abstract_params,
    adapter_shardings,
    param_shardings,
)
from rest_jax.models.hf.config import decoder_config
from rest_jax.models.lora import make_lora, stays_float32
from rest_jax.models.policy import Policy, attention_of, compute_dtype
from rest_jax.models.presets import PRESETS, preset
from rest_jax.rl.optimizer import Optimizer, make_optimizer
from rest_jax.rl.packing import BatchLengths, MicroBatch, longest_row, make_rows, row_length
from rest_jax.rl.prepare import StepConfig
from rest_jax.rl.step import plan_all_groups, plan_minibatches
from rest_jax.types import Params


class Lengths(NamedTuple):
    """Tokens of every prompt and of every response."""

    prompt: int
    response: int


class HeldOut(NamedTuple):
    """What the evaluations of a run complete: `prompts` of at most `tokens`; None: as many as fill the decode slots."""

    prompts: int | None
    tokens: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the programs of a run are made of; the policy's parameters are abstract, with shardings."""

    config: Config
    policy: Policy
    step: StepConfig | None  # None: a supervised run
    tx: Optimizer
    widths: Lengths  # of a batch: as long as its longest prompt and its longest response may be
    held_out: HeldOut | None

    @property
    def groups(self) -> int:
        """Groups (prompts with their responses) of a step."""
        if self.step is None:
            return self.config.sft.batch_size
        return self.config.rollout.prompts_per_step

    @property
    def group_size(self) -> int:
        """Responses of a group."""
        return 1 if self.step is None else self.config.rollout.group_size

    @property
    def updates(self) -> int:
        """Optimiser updates of a step."""
        return 1 if self.step is None else self.step.updates


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
    config: Config,
    devices: Sequence[Any],
    step_config: Callable[[Config, int], StepConfig] | None,
) -> Setup:
    """The setup of `config` on these devices, of a supervised run if `step_config` is None. UserError for a mesh that they, the
    model or the batch do not fit.
    """
    mesh = make_mesh(config.mesh, devices)
    cfg = dataclasses.replace(
        model_config(config.model.source),
        dtype=compute_dtype(config.model.dtype, mesh),
        remat=config.model.remat,
        attention=attention_of(mesh),
    )
    cfg = dataclasses.replace(cfg, lora=make_lora(config.lora, cfg))
    params = place(nn.meta.unbox(abstract_params(cfg)), param_shardings(cfg, mesh))
    adapters, kept = None, config.lora.base_dtype
    if cfg.lora is not None:
        adapters = place(nn.meta.unbox(abstract_adapters(cfg)), adapter_shardings(cfg, mesh))
        params = _in_dtype(params, jnp.dtype(cfg.dtype if kept == "auto" else kept))
    tokenizer: Any = _AnyTokenizer()
    tensor = config.rollout.tensor
    rollout_mesh = mesh if tensor is None else with_tensor(mesh, tensor)
    policy = Policy(Decoder(cfg), params, tokenizer, mesh, rollout_mesh, pathlib.Path(), adapters)
    steps = config.train.steps or 100  # a constant of the schedules
    most, data = config.sft.max_tokens, config.data
    if step_config is None:
        check_batch("sft.batch_size", config.sft.batch_size, mesh)
        step, updates, widths = None, steps, Lengths(min(data.max_prompt_tokens, most), most)
    else:
        step = step_config(config, steps)
        updates, widths = steps * step.updates, longest(config, supervised=False)
    tx = make_optimizer(config.optimizer, updates)
    held_out = None
    if data.eval or config.evaluation.benchmarks:
        # how many items the benchmarks have, only their files say
        prompts = None if config.evaluation.benchmarks else data.eval_limit
        held_out = HeldOut(prompts, data.max_prompt_tokens)
    return Setup(config, policy, step, tx, widths, held_out)


def _in_dtype(params: Params, dtype: Any) -> Params:
    """Abstract weights as `hf.read.read_params` reads them."""

    def one(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        kept = x.dtype if stays_float32((path[-1].key,)) else dtype
        return jax.ShapeDtypeStruct(x.shape, kept, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, params)


def longest(config: Config, supervised: bool) -> Lengths:
    """The longest groups that a config allows. A supervised record has `sft.max_tokens` in all, and no prompt of its own limit:
    `data.max_prompt_tokens` of them, at most half, are taken for it.
    """
    prompt, most = config.data.max_prompt_tokens, config.sft.max_tokens
    if not supervised:
        return Lengths(prompt, config.rollout.max_response_tokens)
    prompt = min(prompt, most // 2)
    return Lengths(prompt, most - prompt)


def _batch(setup: Setup, lengths: Lengths) -> BatchLengths:
    shape, widths = (setup.groups, setup.group_size), setup.widths
    return BatchLengths(
        np.full(shape[0], lengths.prompt, np.int32),
        np.full(shape, lengths.response, np.int32),
        (max(lengths.prompt, widths.prompt), max(lengths.response, widths.response)),
    )


def micro_batches(setup: Setup, lengths: Lengths) -> list[MicroBatch]:
    """The micro-batches of one update in which all groups are active and as long as `lengths`."""
    if setup.step is None:
        return all_groups(setup, lengths)
    active = np.ones(setup.groups, bool)
    return plan_minibatches(_batch(setup, lengths), active, setup.step, setup.policy.mesh)[0]


def all_groups(setup: Setup, lengths: Lengths) -> list[MicroBatch]:
    """The micro-batches of a pass over all groups of a step, as long as `lengths`."""
    limit = setup.config.train.max_tokens_per_microbatch
    return plan_all_groups(_batch(setup, lengths), limit, setup.policy.mesh)


class Row(NamedTuple):
    """The rows of a micro-batch: positions, pairs of tokens that see each other, and the trips of the loops over what is in
    them, by part (`measure.Sizes`).
    """

    length: int
    pairs: int
    trips: Mapping[str, float] = MappingProxyType({})


class StepRows(NamedTuple):
    """The rows of an update, and those of a pass over all groups of a step."""

    update: Row
    forward: Row


def rows_at(setup: Setup, lengths: Lengths) -> StepRows:
    """The rows where all groups are active and as long as `lengths`."""
    update, forward = micro_batches(setup, lengths), all_groups(setup, lengths)
    return StepRows(row_of(setup, update[0]), row_of(setup, forward[0]))


def row_of(setup: Setup, micro: MicroBatch) -> Row:
    """The rows of a micro-batch."""
    rows = make_rows(micro)
    predicted = int((rows.target >= 0).sum(axis=1).max())
    chunks = -(-predicted // min(setup.config.loss.vocab_chunk, micro.row_length))
    trips = {"vocabulary": chunks} | attention_trips(setup.policy.config, rows.until)
    return Row(micro.row_length, micro.max_pairs, trips)


def attention_trips(cfg: DecoderConfig, until: np.ndarray) -> dict[str, float]:
    """Blocks of keys that a block of queries of such a row visits, on average; a kernel's loop is not in a program's text."""
    small = cpu_blocks(cfg.n_heads * cfg.head_dim)
    blocks = {"blocks": small, "wide_blocks": WIDE}.get(cfg.attention)
    return {} if blocks is None else {"attention": mean_visits(jnp.asarray(until[:1]), blocks)}


def longest_rows(setup: Setup) -> StepRows:
    """The longest rows that any lengths of the batch can give."""
    (prompt, response), shards = setup.widths, num_data_shards(setup.policy.mesh)
    group = prompt - 1 + setup.group_size * response
    limit = setup.config.train.max_tokens_per_microbatch

    def longest(groups: int) -> Row:
        everything = -(-groups // shards) * group
        length = row_length(everything)
        if limit is not None:
            length = min(length, longest_row(prompt - 1 + response, limit))
        return Row(length, length * (length + 1) // 2)

    update = longest(setup.groups // setup.updates)
    if setup.step is not None and setup.step.noise_groups is not None:  # one group a row
        update = Row(row_length(group), group * (group + 1) // 2)
    return StepRows(update, longest(setup.groups))
