"""The device side of an optimiser update: forward pass, loss with its metrics, gradient, AdamW. Pure functions.

    policy_loss(params, batch, rows) -> loss, Totals               one micro-batch
    add_gradient(total, params, batch, rows)                       its gradient, added to what earlier micro-batches gave
    apply_gradient(state, ...)       -> TrainState, Totals         one optimiser update

`params` are what is trained; with LoRA that is the adapters, and `frozen` the weights beside them, which have no gradient.
`rl/step.py` compiles them and loops over micro-batches. Denominators are in the batch already (`rl/loss.py`), so how it is
cut changes nothing but the order of sums.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rest_jax.config import LossConfig
from rest_jax.distributed import num_data_shards
from rest_jax.models.decoder import Decoder, with_adapters
from rest_jax.models.moe import RouterRecord
from rest_jax.rl import masked
from rest_jax.rl.balance import RouterSums, balance_loss, router_metrics, sum_router
from rest_jax.rl.logprobs import LossAndMetrics, LossSpec, response_loss
from rest_jax.rl.loss import TokenInputs, policy_rule, policy_token_loss
from rest_jax.rl.optimizer import Optimizer
from rest_jax.rl.packing import Rows, empty_rows
from rest_jax.types import Params, ResponseBatch, Sampling, TrainBatch, TrainState


@struct.dataclass
class Totals:
    """Metrics of a mini-batch over its micro-batches: `sums` add up, of `maxima` the largest stays. `router`: what its
    metrics are made of; None without experts, and after the update.
    """

    sums: dict[str, jax.Array]
    maxima: dict[str, jax.Array]
    router: RouterSums | None = None

    def join(self, other: "Totals") -> "Totals":
        """Of both together."""
        return Totals(
            jax.tree.map(jnp.add, self.sums, other.sums),
            jax.tree.map(jnp.maximum, self.maxima, other.maxima),
            jax.tree.map(jnp.add, self.router, other.router),
        )

    def with_noise(self, squares: Float[Array, ""], counts: Float[Array, ""]) -> "Totals":
        """With the parts of `gradient_noise` among the sums."""
        return dataclasses.replace(self, sums=self.sums | {SQUARES: squares, COUNTS: counts})

    def without_tokens(self) -> "Totals":
        """Of an update that computed none: no mean over tokens and no greatest of them has been measured."""
        return Totals({name: self.sums[name] for name in self.sums if name in OF_ANY_UPDATE}, {})


LossFn = Callable[[Params, Any, Rows], tuple[jax.Array, Totals]]  # (params, batch, rows)


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """What an update does. `noise_groups`: groups of a mini-batch, to measure `gradient_noise`; None: not measured."""

    loss_fn: LossFn
    tx: Optimizer
    mesh: Mesh
    noise_groups: int | None = None


def policy_loss(
    params: Params,
    batch: TrainBatch,
    rows: Rows,
    decoder: Decoder,
    cfg: LossConfig,
    sampling: Sampling,
) -> tuple[Float[Array, ""], Totals]:
    """This micro-batch's share of the mini-batch's loss and of its metrics."""
    inputs = TokenInputs(
        logp_old=rows.targets(batch.logp_old),
        advantage=rows.advantages(batch.advantage, batch.widths[1]),
        loss_weight=rows.targets(batch.loss_weight),
        regulariser=rows.targets(batch.regulariser),
        mask=rows.predicts,
        logp_ref=None if batch.logp_ref is None else rows.targets(batch.logp_ref),
    )
    spec = LossSpec(
        functools.partial(policy_token_loss, cfg=cfg),
        sampling,
        cfg.vocab_chunk,
        needs_entropy_gradient=cfg.entropy_coefficient > 0,
    )
    look_ahead = None
    if policy_rule(cfg).rule.reads_sequence:
        look_ahead = functools.partial(add_sequence_ratio, batch=batch, rows=rows)
    balance = inputs.regulariser if cfg.load_balance_coefficient > 0 else None
    out, router = response_loss(
        decoder, params, batch, dataclasses.replace(rows, balance=balance), inputs, spec, look_ahead
    )
    return add_router(out, router, cfg.load_balance_coefficient)


def add_sequence_ratio(
    inputs: TokenInputs, logp: Float[Array, "W T"], batch: TrainBatch, rows: Rows
) -> TokenInputs:
    """With the mean of logp - logp_old over the tokens of each completion, which lie in one row."""
    empty = jnp.zeros(batch.responses.shape, jnp.float32)
    log_ratio = rows.put_targets(empty, jnp.where(inputs.mask, logp - inputs.logp_old, 0.0))
    mean = masked.mean_over_mask(log_ratio, batch.mask, axis=-1)
    return inputs._replace(sequence_log_ratio=rows.completions(mean, batch.widths[1]))


def add_router(
    out: LossAndMetrics, router: RouterRecord | None, coefficient: float
) -> tuple[Float[Array, ""], Totals]:
    """The loss and its metrics with what the routers add."""
    total, sums, maxima = out
    if router is None:
        return total, Totals(sums, maxima)
    if coefficient > 0:
        balance = balance_loss(router)
        total = total + coefficient * balance
        own = jax.lax.stop_gradient(balance)
        loss = sums["update/loss"] + coefficient * own
        sums = sums | {"update/loss": loss, "update/balance_loss": own}
    return total, Totals(sums, maxima, sum_router(router))


def micro_gradient(
    params: Params,
    batch: ResponseBatch,
    rows: Rows,
    spec: UpdateSpec,
    frozen: Params | None = None,
) -> tuple[Params, Totals]:
    """Gradient (float32) and metrics of a micro-batch."""
    gradient, totals = jax.grad(_loss(spec, frozen), has_aux=True)(params, batch, rows)
    if spec.noise_groups is not None:
        groups = jnp.sum(rows.groups).astype(jnp.float32)
        # What a skipped group adds is put in at the end: `noise_groups` less the groups computed.
        totals = totals.with_noise(optax.tree.norm(gradient, squared=True), groups**2 - groups)
    return gradient, totals


def add_gradient(
    total: tuple[Params, Totals],
    params: Params,
    batch: ResponseBatch,
    rows: Rows,
    spec: UpdateSpec,
    frozen: Params | None = None,
) -> tuple[Params, Totals]:
    """`micro_gradient`, added to the gradient and the metrics so far (which a compiled call donates)."""
    gradient, totals = micro_gradient(params, batch, rows, spec, frozen)
    return jax.tree.map(jnp.add, total[0], gradient), total[1].join(totals)


def zero_gradient(
    params: Params, batch: ResponseBatch, spec: UpdateSpec, frozen: Params | None = None
) -> tuple[Params, Totals]:
    """What the first micro-batch is added to; the maxima are of quantities that are not negative."""
    rows = empty_rows(num_data_shards(spec.mesh))
    _, totals = jax.eval_shape(_loss(spec, frozen), params, batch, rows)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, totals))
    return zero if spec.noise_groups is None else (zero[0], zero[1].with_noise(*jnp.zeros(2)))


def _loss(spec: UpdateSpec, frozen: Params | None) -> LossFn:
    """The loss as a function of what is trained."""
    return lambda params, batch, rows: spec.loss_fn(with_adapters(params, frozen), batch, rows)


@jax.named_scope("optimizer")
def apply_gradient(
    state: TrainState, gradient: Params, totals: Totals, spec: UpdateSpec
) -> tuple[TrainState, Totals]:
    """One optimiser update, with its learning rate and the norms of gradient, change and parameters among the metrics. Where loss
    or gradient is not finite, parameters and optimiser state stay as they are.
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(totals.sums["update/loss"])
    updates, opt_state = spec.tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        functools.partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state)
    )
    sums = totals.sums | {
        "update/grad_norm": norm,
        "update/update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
        "update/param_norm": optax.tree.norm(params),
        "update/learning_rate": spec.tx.rate(state.opt_state),
        NOT_FINITE: 1.0 - finite,
    }
    if spec.noise_groups is not None:
        counts = sums.pop(COUNTS) + spec.noise_groups
        sums |= gradient_noise(sums.pop(SQUARES), counts, norm, spec.noise_groups)
    if totals.router is not None:
        sums |= router_metrics(totals.router)
    state = dataclasses.replace(state, params=params, opt_state=opt_state)
    return state, Totals(sums, totals.maxima)


def apply_with_host_moments(
    state: TrainState, gradient: Params, totals: Totals, spec: UpdateSpec
) -> tuple[TrainState, Totals]:
    """`apply_gradient` of a state whose moments are in host memory: they come for the update, and the shardings of the result
    send them back.
    """
    moments = jax.device_put(state.opt_state, jax.memory.Space.Device)
    return apply_gradient(dataclasses.replace(state, opt_state=moments), gradient, totals, spec)


NOT_FINITE = "update/not_finite"  # 1 for an update that was skipped
# What is true of an update without any token as well: losses, which are sums, and what its gradient and the optimiser give.
OF_ANY_UPDATE = frozenset(
    {
        "update/loss",
        "update/policy_loss",
        "update/balance_loss",
        "update/grad_norm",
        "update/grad_variance",
        "update/grad_noise",
        "update/update_norm",
        "update/param_norm",
        "update/learning_rate",
        NOT_FINITE,
    }
)
SQUARES, COUNTS = "noise/squares", "noise/counts"


def gradient_noise(
    squares: Float[Array, ""], counts: Float[Array, ""], norm: Float[Array, ""], groups: int
) -> dict[str, jax.Array]:
    """Sampling variance of a mini-batch gradient from its parts: `update/grad_variance`, the trace of its covariance, and
    `update/grad_noise`, that over its own squared norm (1: nothing but noise; scale-free).

    The gradient is the sum of `groups` independent group terms, denominators taken as given. `squares` = sum_k |S_k|^2 over
    micro-batches of n_k groups, `counts` = sum_k n_k^2 (a skipped group: n 1, S 0), `norm` = |sum_k S_k|. From
    E|S_k|^2 = n_k t + n_k^2 |mu|^2 and E norm^2 = n t + n^2 |mu|^2 follows the unbiased n t (McCandlish et al. 2018,
    appendix A, for unequal parts).
    """
    share = counts / groups**2
    variance = (squares - share * norm**2) / jnp.maximum(1 - share, 1e-12)
    return {
        "update/grad_variance": variance,
        "update/grad_noise": variance / jnp.maximum(norm**2, 1e-30),
    }
