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
    loss_fn: LossFn, tx: optax.GradientTransformation, mesh: Mesh, state_shardings: TrainState
) -> Callable[[TrainState, Any, Sequence[MicroBatch]], tuple[TrainState, Metrics]]:
    """Function of one optimiser update over the micro-batches of a plan: (state, batch, plan) -> (state, metrics).

    The state is donated; gradients are float32 in the sharding of the parameters, metrics replicated.
    """
    at = state_shardings.params
    everywhere = NamedSharding(mesh, PartitionSpec())
    ways = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def gradient(params, batch, pick, slots):
        part = take_groups(batch, pick, slots, mesh)
        return jax.grad(loss_fn, has_aux=True)(params, part)

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
        return state, totals.sums | totals.maxima | norms

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
