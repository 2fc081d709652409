"""The supervised step: negative log-likelihood of gold responses, weighted by region (SFT, TSFT, RSFT).

    loss = sum_it w_it (-log p(a_it)) / number of target tokens of the global batch

w is 1, scaled up on tool-call tokens (TSFT) or on reasoning tokens (RSFT). The batch has the group layout with G = 1, and
micro-batches, sharding and optimiser are those of the policy update.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rest_jax.config import LossConfig, SftConfig
from rest_jax.distributed import batch_sharding
from rest_jax.models.decoder import Decoder
from rest_jax.rl.logprobs import LossSpec, response_loss
from rest_jax.rl.loss import TokenLoss, TokenStats
from rest_jax.rl.optimizer import Optimizer
from rest_jax.rl.packing import Rows
from rest_jax.rl.step import Update, make_update
from rest_jax.rl.update import Totals, UpdateSpec, add_router
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import AnyArray, Params, ResponseBatch, Sampling, TrainState

TOOL_CALL_REGIONS = (Region.SCAFFOLD, Region.NAME, Region.PARAM)


@struct.dataclass
class GoldBatch(ResponseBatch):
    """Prompts with their gold responses (end-of-turn included), G = 1."""

    region: Int[AnyArray, "P 1 Tr"]  # int8


@struct.dataclass
class SupervisedBatch(ResponseBatch):
    """Gold responses with the factor of each token's loss, its global denominator included, and that of a plain mean."""

    loss_weight: Float[Array, "P 1 Tr"]
    plain_weight: Float[Array, "P 1 Tr"]


class SupervisedInputs(NamedTuple):
    """What the loss of a gold token reads."""

    loss_weight: Array
    plain_weight: Array


def region_scale(cfg: SftConfig) -> Float[Array, " R"]:
    """Loss scale of each region."""
    scale = jnp.ones(NUM_REGIONS, jnp.float32).at[Region.NONE].set(0.0)
    scale = scale.at[jnp.array(TOOL_CALL_REGIONS)].set(cfg.tool_call_weight)
    return scale.at[Region.THINK].set(cfg.reasoning_weight)


def prepare_gold(gold: GoldBatch, cfg: SftConfig) -> SupervisedBatch:
    """Weights of the tokens, divided by the number of target tokens of the global batch."""
    mask = gold.mask
    plain = mask / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    scale = jnp.take(region_scale(cfg), gold.region.astype(jnp.int32))
    groups = gold.prompt, gold.prompt_length, gold.responses, gold.response_length
    return SupervisedBatch(*groups, loss_weight=scale * plain, plain_weight=plain)


def supervised_token_loss(seen: TokenStats, x: SupervisedInputs) -> TokenLoss:
    """Weighted negative log-likelihood of each token."""
    loss = -x.loss_weight * seen.logp
    sums = {
        "update/loss": loss,
        "update/nll": -x.plain_weight * seen.logp,
        "update/entropy": x.plain_weight * seen.entropy,
        "update/accuracy": x.plain_weight * seen.is_argmax,
    }
    sums = {name: jnp.where(x.plain_weight > 0, value, 0.0) for name, value in sums.items()}
    return TokenLoss(sums["update/loss"], sums, {})


def supervised_loss(
    params: Params, batch: SupervisedBatch, rows: Rows, decoder: Decoder, cfg: LossConfig
) -> tuple[Float[Array, ""], Totals]:
    """This micro-batch's share of the loss and of its metrics."""
    inputs = SupervisedInputs(rows.targets(batch.loss_weight), rows.targets(batch.plain_weight))
    spec = LossSpec(supervised_token_loss, Sampling(), cfg.vocab_chunk)
    balance = inputs.plain_weight if cfg.load_balance_coefficient > 0 else None
    out, router = response_loss(
        decoder, params, batch, dataclasses.replace(rows, balance=balance), inputs, spec
    )
    return add_router(out, router, cfg.load_balance_coefficient)


def make_prepare_gold(cfg: SftConfig, mesh: Mesh):
    """`prepare_gold` compiled."""
    rows = batch_sharding(mesh)
    return jax.jit(functools.partial(prepare_gold, cfg=cfg), in_shardings=rows, out_shardings=rows)


def make_supervised_update(
    decoder: Decoder,
    tx: Optimizer,
    cfg: LossConfig,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Update:
    """The update of the supervised loss on `SupervisedBatch`es."""
    loss_fn = functools.partial(supervised_loss, decoder=decoder, cfg=cfg)
    return make_update(UpdateSpec(loss_fn, tx, mesh), state_shardings)
