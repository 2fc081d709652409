"""The supervised step: negative log-likelihood of gold answers, weighted by region (SFT, TSFT, RSFT).

    loss = sum_it w_it (-log p(a_it)) / number of answer tokens of the global batch

w is 1, scaled up on tool-call tokens (TSFT) or on reasoning tokens (RSFT). The batch has the group layout with G = 1, and
micro-batches, sharding and optimiser are those of the policy update.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rest_jax import masked
from rest_jax.answer import NUM_REGIONS, Region
from rest_jax.config import SftConfig
from rest_jax.models.decoder import Decoder
from rest_jax.rl.forward import response_logprobs
from rest_jax.rl.logprobs import Sampling
from rest_jax.rl.packing import split_groups
from rest_jax.rl.step import Metrics, Totals, accumulate, apply_gradients
from rest_jax.types import AnyArray, TrainState, response_mask

TOOL_CALL_REGIONS = (Region.SCAFFOLD, Region.NAME, Region.PARAM)


@struct.dataclass
class GoldBatch:
    """Prompts with their gold answers, G = 1. Shift convention as in `types`."""

    prompt: Int[AnyArray, "P Tp"]  # int32
    prompt_length: Int[AnyArray, " P"]  # int32
    answer: Int[AnyArray, "P 1 Tr"]  # int32, end-of-turn included
    answer_length: Int[AnyArray, "P 1"]  # int32
    region: Int[AnyArray, "P 1 Tr"]  # int8


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """The static side of a supervised step; `micro` micro-batches an update."""

    sft: SftConfig
    micro: int
    vocab_chunk: int


def region_scale(cfg: SftConfig) -> Float[Array, " R"]:
    """Loss scale of each region."""
    scale = jnp.ones(NUM_REGIONS, jnp.float32).at[Region.NONE].set(0.0)
    scale = scale.at[jnp.array(TOOL_CALL_REGIONS)].set(cfg.tool_call_weight)
    return scale.at[Region.THINK].set(cfg.reasoning_weight)


def token_coefficients(batch: GoldBatch, cfg: SftConfig) -> Float[Array, "P 1 Tr"]:
    """w / tokens, over the whole global batch."""
    mask = response_mask(batch.answer_length, batch.answer.shape[-1])
    weight = jnp.take(region_scale(cfg), batch.region.astype(jnp.int32)) * mask
    return weight / jnp.maximum(jnp.sum(mask), 1)


def make_supervised_step(
    decoder: Decoder,
    tx: optax.GradientTransformation,
    cfg: SupervisedConfig,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Callable[[TrainState, GoldBatch], tuple[TrainState, Metrics]]:
    """jit of one optimiser update: (state, batch) -> (state, metrics). The state is donated."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def loss_fn(params, batch, coefficient, plain):
        logp, entropy, _ = response_logprobs(
            decoder, params, batch.prompt, batch.prompt_length, batch.answer, batch.answer_length,
            Sampling(), cfg.vocab_chunk,
        )  # fmt: skip
        total = masked.masked_sum(-coefficient * logp, coefficient > 0)
        sums = {
            "update/loss": total,
            "update/entropy": masked.masked_sum(plain * entropy, plain > 0),
        }
        return total, Totals(sums, {})

    def step(state, batch):
        plain = token_coefficients(batch, SftConfig())
        parts = split_groups((batch, token_coefficients(batch, cfg.sft), plain), cfg.micro, mesh)
        grads, totals = accumulate(loss_fn, state.params, parts, state_shardings.params)
        params, opt_state, norms = apply_gradients(state, grads, tx)
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        tokens = jnp.sum(batch.answer_length)
        return state, totals.sums | norms | {"update/tokens": tokens}

    return jax.jit(
        step,
        in_shardings=(state_shardings, rows),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
