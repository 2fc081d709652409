"""AdamW by optax, with schedule, clipping by global norm and a weight-decay mask. Nothing hand-written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rest_jax.config import OptimizerConfig
from rest_jax.types import Params


def learning_rate(cfg: OptimizerConfig, updates: int) -> optax.Schedule:
    """The rate of an update by the number of those before it: over the first `warmup_fraction` of the run's optimiser updates
    1/w, 2/w, .. 1 of the peak, so that no update is without effect, then constant, cosine or linear decay.
    """
    warmup = round(cfg.warmup_fraction * updates)
    rest = max(updates - warmup, 1)
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
    main = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=cfg.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
    }[cfg.schedule]()
    if warmup == 0:
        return main
    return optax.join_schedules([lambda count: peak * (count + 1) / warmup, main], [warmup])


def learning_rates(cfg: OptimizerConfig, updates: int) -> np.ndarray:
    """float32 [updates]: the rate of each optimiser update of a run, for its metrics."""
    schedule = learning_rate(cfg, updates)
    rates = jax.vmap(schedule)(jnp.arange(updates))
    return np.broadcast_to(np.asarray(rates, np.float32), (updates,))


def decay_mask(params: Params) -> Params:
    """True for matrices. Norm scales and biases are left alone; under scanned layers they have a leading layer axis."""

    def matrix(path, leaf):
        names = {str(getattr(key, "key", key)) for key in path}
        return leaf.ndim >= 2 and not any(
            "norm" in n or n == "scale" or n.endswith("bias") for n in names
        )

    return jax.tree_util.tree_map_with_path(matrix, params)


def make_optimizer(cfg: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """clip_by_global_norm -> AdamW. `updates`: optimiser updates of the run."""
    adamw = optax.adamw(
        learning_rate(cfg, updates),
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay_mask,
    )
    limit = cfg.max_grad_norm
    # The same state with and without clipping, so that a fork may change it.
    clip = optax.identity() if limit is None else optax.clip_by_global_norm(limit)
    return optax.chain(clip, adamw)


def move_schedule(opt_state: Any, updates: int) -> Any:
    """The optimiser's state with the learning rate of a run that has made so many updates."""

    def move(x: Any) -> Any:
        if not isinstance(x, optax.ScaleByScheduleState):
            return x
        return x._replace(count=jnp.full_like(x.count, updates))

    return jax.tree.map(
        move, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
    )
