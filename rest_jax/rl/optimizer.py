"""AdamW by optax, with schedule, clipping by global norm and a weight-decay mask. Nothing hand-written."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rest_jax.config import OptimizerConfig
from rest_jax.types import Params


class Optimizer(NamedTuple):
    """An optax.GradientTransformation that tells its learning rate."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    schedule: optax.Schedule  # the learning rate of an update by the number of those before it

    def rate(self, opt_state: Any) -> Float[Array, ""]:
        """Of the next update of a state: skipped ones are not among those before it."""
        counts = optax.tree.get(opt_state, "count", 0, filtering=_of_schedule)
        return jnp.asarray(self.schedule(counts), jnp.float32)


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


def decay_mask(params: Params) -> Params:
    """True for matrices. Norm scales and biases are left alone; under scanned layers they have a leading layer axis."""

    def matrix(path, leaf):
        names = {str(getattr(key, "key", key)) for key in path}
        return leaf.ndim >= 2 and not any(
            "norm" in n or n == "scale" or n.endswith("bias") for n in names
        )

    return jax.tree_util.tree_map_with_path(matrix, params)


def make_optimizer(cfg: OptimizerConfig, updates: int) -> Optimizer:
    """clip_by_global_norm -> AdamW. `updates`: optimiser updates of the run."""
    schedule = learning_rate(cfg, updates)
    adamw = optax.adamw(
        schedule,
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay_mask,
    )
    limit = cfg.max_grad_norm
    # The same state with and without clipping, so that a fork may change it.
    clip = optax.identity() if limit is None else optax.clip_by_global_norm(limit)
    return Optimizer(*optax.chain(clip, adamw), schedule)


def move_schedule(opt_state: Any, updates: int) -> Any:
    """The optimiser's state with the learning rate of a run that has made so many updates."""

    def move(x: Any) -> Any:
        if not isinstance(x, optax.ScaleByScheduleState):
            return x
        return x._replace(count=jnp.full_like(x.count, updates))

    return jax.tree.map(
        move, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
    )


def _of_schedule(path: Any, _: Any) -> bool:
    """Whether a field is one of a ScaleByScheduleState."""
    return getattr(path[-1], "tuple_name", "") == optax.ScaleByScheduleState.__name__
