"""Gradients over micro-batches, and the optimiser update: what the policy update and the supervised one share.

    for each micro-batch of the plan:  take its groups, run forward and backward, add up       (jitted, one shape each)
    then:                              optimiser update                                        (jitted, state donated)

Nothing here waits for the device: the host only dispatches. Denominators are in the batch already (`rl/loss.py`), so how
it is cut changes nothing but the order of sums.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rest_jax.rl.packing import MicroBatch, take_groups
from rest_jax.types import Params, TrainState

Metrics = dict[str, jax.Array]


@struct.dataclass
class Totals:
    """Metrics of a mini-batch, gathered over its micro-batches: `sums` add up, of `maxima` the largest stays."""

    sums: Metrics
    maxima: Metrics

    def join(self, other: "Totals") -> "Totals":
        """Of both together."""
        return Totals(
            jax.tree.map(jnp.add, self.sums, other.sums),
            jax.tree.map(jnp.maximum, self.maxima, other.maxima),
        )


SQUARES, COUNTS = "noise/squares", "noise/counts"


def gradient_noise(
    squares: Float[Array, ""], counts: Float[Array, ""], norm: Float[Array, ""], groups: int
) -> Metrics:
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


LossFn = Callable[[Params, Any], tuple[jax.Array, Totals]]  # (params, rows of the batch)


def apply_gradients(
    state: TrainState, grads: Params, tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimiser update."""
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "update/grad_norm": optax.tree.norm(grads),
            "update/update_norm": optax.tree.norm(updates),
        }
        params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(state, params=params, opt_state=opt_state), metrics


def make_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
    noise_groups: int | None = None,
) -> Callable[[TrainState, Any, Sequence[MicroBatch]], tuple[TrainState, Metrics]]:
    """Function of one optimiser update over the micro-batches of a plan: (state, batch, plan) -> (state, metrics).

    The state is donated; gradients are float32 in the sharding of the parameters, metrics replicated. `noise_groups`:
    groups of a mini-batch, for `gradient_noise` among the metrics; None: not measured.
    """
    at = state_shardings.params
    everywhere = NamedSharding(mesh, PartitionSpec())
    ways = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def gradient(params, batch, pick, slots):
        part = take_groups(batch, pick, slots, mesh)
        grads, totals = jax.grad(loss_fn, has_aux=True)(params, part)
        if noise_groups is not None:
            here = jnp.sum(pick >= 0).astype(jnp.float32)
            # what a skipped group adds is put in at the end: `noise_groups` less the groups computed
            found = {SQUARES: optax.tree.norm(grads, squared=True), COUNTS: here**2 - here}
            totals = Totals(totals.sums | found, totals.maxima)
        return grads, totals

    def add(grads, totals, params, batch, pick, slots):
        new, found = gradient(params, batch, pick, slots)
        return jax.tree.map(jnp.add, grads, new), totals.join(found)

    outs = (at, everywhere)
    first = jax.jit(gradient, static_argnames="slots", out_shardings=outs)
    more = jax.jit(add, static_argnames="slots", out_shardings=outs, donate_argnums=(0, 1))

    def nothing(params, batch):
        """Zero gradients and totals, for a mini-batch without a group that carries gradient."""
        pick = jnp.full((mesh.shape["data"] * mesh.shape["fsdp"], 1), -1, jnp.int32)
        shapes = jax.eval_shape(lambda p, b: gradient(p, b, pick, (32, 32)), params, batch)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    empty = jax.jit(nothing, out_shardings=outs)

    def finish(state, grads, totals):
        state, norms = apply_gradients(state, grads, tx)
        sums = dict(totals.sums)
        if noise_groups is not None:
            counts = sums.pop(COUNTS) + noise_groups
            norm = norms["update/grad_norm"]
            sums |= gradient_noise(sums.pop(SQUARES), counts, norm, noise_groups)
        return state, sums | totals.maxima | norms

    apply = jax.jit(
        finish,
        in_shardings=(state_shardings, at, everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )

    def update(state, batch, micro_batches):
        out = None
        for micro in micro_batches:
            pick = jax.device_put(micro.pick, ways)
            if out is None:
                out = first(state.params, batch, pick, slots=micro.slots)
            else:
                out = more(*out, state.params, batch, pick, slots=micro.slots)
        return apply(state, *(empty(state.params, batch) if out is None else out))

    return update
