"""The supervised step: negative log-likelihood of gold answers, weighted by region (SFT, TSFT, RSFT).

    loss = sum_it w_it (-log p(a_it)) / number of answer tokens of the global batch

w is 1, scaled up on tool-call tokens (TSFT) or on reasoning tokens (RSFT). The batch has the group layout with G = 1, and
micro-batches, sharding and optimiser are those of the policy update.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rest_jax.config import SftConfig
from rest_jax.distributed import num_data_shards
from rest_jax.models.decoder import Decoder
from rest_jax.rl import masked
from rest_jax.rl.forward import response_loss
from rest_jax.rl.gradients import Metrics, Totals, make_update
from rest_jax.rl.packing import plan
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import AnyArray, Params, Sampling, TrainState, response_mask

TOOL_CALL_REGIONS = (Region.SCAFFOLD, Region.NAME, Region.PARAM)


@struct.dataclass
class GoldBatch:
    """Prompts with their gold answers, G = 1. Shift convention as in `types`."""

    prompt: Int[AnyArray, "P Tp"]  # int32
    prompt_length: Int[AnyArray, " P"]  # int32
    responses: Int[AnyArray, "P 1 Tr"]  # int32, the answers, end-of-turn included
    response_length: Int[AnyArray, "P 1"]  # int32
    region: Int[AnyArray, "P 1 Tr"]  # int8


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """The static side of a supervised step; `max_tokens_per_microbatch` as in `step.StepConfig`."""

    sft: SftConfig
    max_tokens_per_microbatch: int | None
    vocab_chunk: int


def region_scale(cfg: SftConfig) -> Float[Array, " R"]:
    """Loss scale of each region."""
    scale = jnp.ones(NUM_REGIONS, jnp.float32).at[Region.NONE].set(0.0)
    scale = scale.at[jnp.array(TOOL_CALL_REGIONS)].set(cfg.tool_call_weight)
    return scale.at[Region.THINK].set(cfg.reasoning_weight)


@struct.dataclass
class SupervisedBatch:
    """Gold answers with their coefficients: those of the loss, and those of a plain mean."""

    gold: GoldBatch
    loss: Float[Array, "P 1 Tr"]
    plain: Float[Array, "P 1 Tr"]


def token_coefficients(batch: GoldBatch, cfg: SftConfig) -> Float[Array, "P 1 Tr"]:
    """w / tokens, over the whole global batch."""
    mask = response_mask(batch.response_length, batch.responses.shape[-1])
    weight = jnp.take(region_scale(cfg), batch.region.astype(jnp.int32)) * mask
    return weight / jnp.maximum(jnp.sum(mask), 1)


def loss_terms(
    params: Params, part: SupervisedBatch, decoder: Decoder, cfg: SupervisedConfig
) -> tuple[Float[Array, ""], Totals]:
    """This micro-batch's share of the loss and of its metrics."""
    b = part.gold
    total, _, entropy = response_loss(
        decoder, params, b.prompt, b.prompt_length, b.responses, b.response_length, part.loss,
        lambda logp, entropy, coefficient: -coefficient * logp, Sampling(), cfg.vocab_chunk,
    )  # fmt: skip
    mean = masked.masked_sum(part.plain * entropy, part.plain > 0)
    return total, Totals({"update/loss": total, "update/entropy": mean}, {})


def make_supervised_step(
    decoder: Decoder,
    tx: optax.GradientTransformation,
    cfg: SupervisedConfig,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, gold on the mesh, lengths of the whole batch) -> (state, metrics): one optimiser update. The state is donated.

    `lengths`: prompt lengths [P] and answer lengths [P, 1] of all processes' rows, NumPy.
    """
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def with_coefficients(gold):
        return SupervisedBatch(
            gold, token_coefficients(gold, cfg.sft), token_coefficients(gold, SftConfig())
        )

    prepare = jax.jit(with_coefficients, in_shardings=rows, out_shardings=rows)
    loss_fn = functools.partial(loss_terms, decoder=decoder, cfg=cfg)
    update = make_update(loss_fn, tx, mesh, state_shardings)
    add_one = jax.jit(lambda step: step + 1, out_shardings=everywhere)

    def step(state, gold, lengths):
        widths = gold.prompt.shape[1], gold.responses.shape[2]
        prompts, answers = lengths
        (mini,) = plan(
            prompts,
            answers,
            widths,
            ways=num_data_shards(mesh),
            budget=cfg.max_tokens_per_microbatch,
        )
        state, metrics = update(state, prepare(gold), mini)
        state = dataclasses.replace(state, step=add_one(state.step))
        return state, metrics | {"update/tokens": answers.sum()}

    return step
