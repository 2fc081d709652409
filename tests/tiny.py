"""A tiny policy and batches around it, shared by the tests of the rollout and of the step."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.config import CurriculumConfig, LossConfig, MeshConfig, OptimizerConfig, WeightsConfig
from rest_jax.distributed import activate, make_mesh
from rest_jax.models.cache import Cache, DecodeLayout, GatheredKeys, Pool
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder, init_params, unstack_layers
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.packing import BatchLengths, MicroBatch, Rows, make_rows, row_length
from rest_jax.rl.prepare import StepConfig
from rest_jax.rollout.engine import RolloutSettings, make_engine
from rest_jax.rollout.scheduler import Sampler
from rest_jax.types import PromptBatch, ResponseBatch, RolloutBatch, Sampling, ScoredBatch

FULL = Sampling()
VOCAB, STOP, PAD = 96, 5, 0
GROUP, TIME = 4, 12


@functools.cache
def decoder(
    remat: str = "none", layers: str = "scan", experts: int = 0, attention: str = "blocks"
) -> Decoder:
    """Two layers of the Qwen3 kind, float32; every dimension divides by 4. `experts`: two of them for every token."""
    sizes = ("qwen3_moe" if experts else "qwen3", VOCAB, 32, 2, 4, 4, 8, 16 if experts else 64)
    mixture = {"n_experts": experts, "experts_per_token": 2, "norm_topk": True} if experts else {}
    options: dict[str, Any] = {"remat": remat, "layers": layers, "attention": attention, **mixture}
    return Decoder(DecoderConfig(*sizes, qk_norm=True, tied=True, **options))


@functools.cache
def params(experts: int = 0):
    """Random weights with enough spread that the policy is neither flat nor certain."""
    fresh = init_params(decoder(experts=experts).cfg, jax.random.key(0))
    fresh = jax.tree.map(lambda x: x * 2 if x.ndim > 1 else x, fresh)
    if experts:
        # routers that prefer some experts, and experts that are heard
        mlp = fresh["blocks"]["mlp"]
        fresh["blocks"]["mlp"] = {
            name: x * (8 if name == "router" else 3) for name, x in mlp.items()
        }
    return fresh


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1):
    """Mesh over the first devices."""
    devices = jax.devices()[: data * fsdp * tensor * expert]
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, expert=expert), devices)


def prompts(count: int = 8, width: int = 16, seed: int = 0) -> PromptBatch:
    """Ragged random prompts, rows 100, 101, .."""
    rng = np.random.default_rng(seed)
    length = rng.integers(3, width + 1, count).astype(np.int32)
    tokens = rng.integers(6, VOCAB, (count, width)).astype(np.int32)
    tokens = np.where(np.arange(width) < length[:, None], tokens, PAD).astype(np.int32)
    return PromptBatch(tokens, length, np.arange(100, 100 + count, dtype=np.int32))


@functools.cache
def sampler(
    sampling: Sampling = FULL,
    shape: tuple[int, ...] = (1, 1, 1),
    group: int = GROUP,
    layers: str = "scan",
    experts: int = 0,
    attention: str = "blocks",
    **settings,
):
    """(params, prompts, rng, step) -> RolloutBatch on a mesh of that shape."""
    where = mesh(*shape)
    rollout_settings = RolloutSettings(group, TIME, (STOP,), PAD, sampling, **settings)
    made = decoder(layers=layers, experts=experts, attention=attention)
    engine = make_engine(made, rollout_settings, where)
    return Sampler(engine, rollout_settings, where)


def rollout(batch: PromptBatch, step: int = 0, **options) -> RolloutBatch:
    """NumPy rollout with the tiny policy."""
    weights, sample = params(options.get("experts", 0)), sampler(**options)
    if options.get("layers") == "unroll":
        weights = unstack_layers(weights)
    with activate(sample.mesh):
        return sample(weights, batch, jax.random.key(7), jnp.int32(step))


def scored(batch: PromptBatch, seed: int = 0, **options) -> ScoredBatch:
    """A rollout with random regions, rewards and format scores."""
    rng = np.random.default_rng(seed)
    sampled = rollout(batch, **options)
    mask = np.arange(TIME) < sampled.response_length[..., None]
    region = np.where(mask, rng.integers(1, 8, mask.shape), 0).astype(np.int8)
    reward = rng.normal(size=mask.shape[:2]).astype(np.float32)
    form = rng.integers(0, 2, mask.shape[:2]).astype(np.float32)
    parts = np.stack([form, reward - form, 0 * form, 0 * form], axis=-1)
    return ScoredBatch(sampled, region, reward, form, parts, exact=reward > 0.5)


def step_config(**changes) -> StepConfig:
    """One update, one micro-batch, ResT defaults."""
    base = StepConfig(
        loss=LossConfig(vocab_chunk=5),
        schedule=Schedule(WeightsConfig(), CurriculumConfig(), 10),
        sampling=Sampling(),
        updates=1,
        max_tokens_per_microbatch=None,
        fixed_length=TIME,
    )
    return dataclasses.replace(base, **changes)


def packed(batch: ResponseBatch, rows: int = 1) -> Rows:
    """All groups of a batch, dealt to so many rows."""
    lengths = BatchLengths.of(batch)
    pieces = [lengths.whole(p) for p in range(len(batch.prompt))]
    dealt = tuple(tuple(pieces[i::rows]) for i in range(rows))
    longest = max(sum(map(lengths.positions, row)) for row in dealt)
    made = make_rows(MicroBatch(dealt, row_length(longest), lengths))
    return jax.tree.map(jnp.asarray, made)


def predicting(rows: Rows, hidden: jax.Array, batch: ResponseBatch) -> jax.Array:
    """[P G Tr D]: of hidden states [W T D] of packed rows, those that predict each response token; zero where none is."""
    zeros = jnp.zeros(batch.responses.shape, hidden.dtype)
    return jax.vmap(lambda x: rows.put_targets(zeros, x), in_axes=-1, out_axes=-1)(hidden)


class NextToken(NamedTuple):
    """What the decoder takes with the next token of every decode slot."""

    positions: jax.Array
    layout: DecodeLayout
    cache: Cache


def empty_cache(kv, prompt_length, group_size: int, width: int) -> NextToken:
    """A cache of P data shards, each with one prompt and decode slots for its `group_size` responses of `width` tokens.

    `kv` is what a pass over `prompt_rows` with `return_kv=True` returned, `[L P Tp K H]` each; every response starts.
    """
    pool = Pool(*(x.transpose(0, 1, 3, 2, 4)[:, :, None] for x in kv))
    layers, prompts, _, heads, _, head_dim = pool.k.shape
    empty = jnp.zeros((layers, prompts, group_size, heads, width, head_dim), pool.k.dtype)
    slots = jnp.broadcast_to(jnp.arange(group_size, dtype=jnp.int32), (prompts, group_size))
    length = prompt_length.astype(jnp.int32)[:, None]
    seen = jnp.arange(pool.k.shape[-2]) < length[..., None]
    layout = DecodeLayout(
        GatheredKeys(seen, recent=jnp.zeros((*slots.shape, width), bool)),
        time=jnp.int32(0),
        entry=jnp.zeros_like(slots),
        member=slots,
        members=slots[:, None],
    )
    return NextToken(length + jnp.zeros_like(slots), layout, Cache(pool, empty, empty))


def next_token(given: NextToken, cache: Cache) -> NextToken:
    """What the next pass of the decoder takes, after one that returned this cache."""
    time, keys = given.layout.time, given.layout.keys
    keys = keys._replace(recent=keys.recent.at[:, :, time].set(True))
    layout = dataclasses.replace(given.layout, keys=keys, time=time + 1)
    return NextToken(given.positions + 1, layout, cache)


def optimizer():
    """Plain AdamW without clipping, so that a difference of gradients shows."""
    return make_optimizer(OptimizerConfig(learning_rate=1e-3, max_grad_norm=None), 10)
