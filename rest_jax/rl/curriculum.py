"""The curriculum: how region weights move from structure to reasoning (docs/method.md section 5).

    init(cfg) -> state        update(state, stats, format_score, cfg) -> state        region_weights(state, cfg) -> [R]

All pure and jittable; the state lives in the TrainState. Progress nu runs over `steps` updates in the chosen shape, or, for
`adaptive`, follows the EMA of the format score. `target: weight` adds to the base weights, as described for ResT:

    format max(w_min, w - alpha_f nu)    PARAM min(w_max, w + alpha_p nu)    THINK min(w_max, w + alpha_t nu)    NAME constant

`target: mass` gives each region a share of the total weight instead, and divides it by the region's token count.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from rest_jax.config import CurriculumConfig, WeightsConfig
from rest_jax.rl import weights
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import CurriculumState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The two config sections that decide the weights, and the run's length in steps (for `steps: null`)."""

    weights: WeightsConfig
    curriculum: CurriculumConfig
    run_steps: int

    @property
    def steps(self) -> int:
        """Steps until nu = 1."""
        part = round(self.curriculum.run_fraction * self.run_steps)
        return self.curriculum.steps or max(part, 1)

    @property
    def normalizer(self) -> str:
        """The normaliser in force. Shares of target `mass` hold over the batch; normalising each response would undo them."""
        return "none" if self.curriculum.target == "mass" else self.weights.normalizer


def init(cfg: Schedule) -> CurriculumState:
    """Nothing seen: every region has its constant, as moved by nu = 0."""
    state = CurriculumState(
        step=jnp.zeros((), jnp.int32),
        nu=jnp.zeros((), jnp.float32),
        entropy=jnp.zeros(NUM_REGIONS, jnp.float32),
        gini=jnp.zeros(NUM_REGIONS, jnp.float32),
        seen=jnp.zeros(NUM_REGIONS, bool),
        count=jnp.zeros(NUM_REGIONS, jnp.float32),
        weight=jnp.zeros(NUM_REGIONS, jnp.float32),
        format_score=jnp.zeros((), jnp.float32),
    )
    return dataclasses.replace(state, weight=region_weights(state, cfg))


def update(
    state: CurriculumState,
    stats: weights.RegionStats,
    format_score: Float[Array, ""],
    cfg: Schedule,
) -> CurriculumState:
    """Takes in one global batch. The first step runs at nu = 0; a region that is absent from the batch, or whose entropy there
    is not finite, keeps its averages.
    """
    present = (stats.count > 0) & jnp.isfinite(stats.entropy) & jnp.isfinite(stats.gini)
    decay = cfg.weights.ema_decay

    def smooth(old, new):
        return jnp.where(present, jnp.where(state.seen, decay * old + (1 - decay) * new, new), old)

    format_decay = cfg.curriculum.format_ema_decay
    format_ema = jnp.where(
        state.step == 0,
        format_score,
        format_decay * state.format_score + (1 - format_decay) * format_score,
    )
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        nu=SHAPES[cfg.curriculum.shape](state.step / cfg.steps, format_ema, cfg.curriculum),
        entropy=smooth(state.entropy, stats.entropy),
        gini=smooth(state.gini, stats.gini),
        seen=state.seen | present,
        count=smooth(state.count, stats.count),
        format_score=format_ema,
    )
    return dataclasses.replace(new, weight=region_weights(new, cfg))


def region_weights(state: CurriculumState, cfg: Schedule) -> Float[Array, " R"]:
    """Weights in force at the state's nu and averages. Rule `uniform` is plain GRPO: no curriculum moves it.

    NONE and regions zeroed by name are 0, and constants of 0 stay 0 (the released preset); all others are above 0.
    """
    if cfg.weights.rule == "uniform":
        weight = weights.base_weights(state.entropy, state.gini, state.seen, cfg.weights)
    else:
        weight = TARGETS[cfg.curriculum.target](state, cfg)
    zero = [Region.NONE, *(Region[name.upper()] for name in cfg.weights.zero)]
    return weight.at[jnp.array(zero)].set(0.0)


def _by_weight(state: CurriculumState, cfg: Schedule) -> Float[Array, " R"]:
    w, c, nu = cfg.weights, cfg.curriculum, state.nu
    weight = weights.base_weights(state.entropy, state.gini, state.seen, w)
    for region, start in ((Region.PARAM, c.start_param), (Region.THINK, c.start_think)):
        if start is not None:
            weight = weight.at[region].set(start)
    param = jnp.minimum(c.param_max or w.w_max, weight[Region.PARAM] + c.alpha_param * nu)
    think = jnp.minimum(c.think_max or w.w_max, weight[Region.THINK] + c.alpha_think * nu)
    for region in (Region.TAG, Region.SCAFFOLD):
        lowered = jnp.maximum(w.w_min, weight[region] - c.alpha_format * nu)
        weight = weight.at[region].set(jnp.where(weight[region] > 0, lowered, 0.0))
    for region, raised in ((Region.PARAM, param), (Region.THINK, think)):
        weight = weight.at[region].set(jnp.where(weight[region] > 0, raised, 0.0))
    return weight


def _by_mass(state: CurriculumState, cfg: Schedule) -> Float[Array, " R"]:
    c, nu, count = cfg.curriculum, state.nu, state.count.at[Region.NONE].set(0.0)

    def share(region):
        start, end = getattr(c, f"share_start_{region}"), getattr(c, f"share_end_{region}")
        return start + (end - start) * nu

    named = [share(r) for r in ("format", "name", "param", "think")]
    groups = [
        ((Region.TAG, Region.SCAFFOLD), named[0]),
        ((Region.NAME,), named[1]),
        ((Region.PARAM,), named[2]),
        ((Region.THINK,), named[3]),
        ((Region.RESPONSE, Region.OTHER), jnp.maximum(1.0 - sum(named), 0.0)),
    ]
    weight = jnp.zeros(NUM_REGIONS, jnp.float32)
    for members, part in groups:
        index = jnp.array(members)
        tokens = jnp.sum(count[index])
        # A group never seen has no tokens: its share goes to the others.
        weight = weight.at[index].set(jnp.where(tokens > 0, part / jnp.maximum(tokens, 1e-6), 0.0))
    mean = jnp.sum(weight * count) / jnp.maximum(jnp.sum(count), 1e-6)
    weight = jnp.where(
        mean > 0, weight / jnp.maximum(mean, 1e-12), jnp.asarray(weights.constants(cfg.weights))
    )
    return jnp.maximum(weight, cfg.weights.w_min)


TARGETS = {"weight": _by_weight, "mass": _by_mass}


def _linear(x, format_ema, cfg):
    return jnp.clip(x, 0.0, 1.0)


def _cosine(x, format_ema, cfg):
    return 0.5 * (1 - jnp.cos(jnp.pi * jnp.clip(x, 0.0, 1.0)))


def _sqrt(x, format_ema, cfg):
    return jnp.sqrt(jnp.clip(x, 0.0, 1.0))


def _step(x, format_ema, cfg):
    """`stages` equal stages, nu from 0 in the first to 1 in the last."""
    return jnp.minimum(jnp.floor(jnp.clip(x, 0.0, 1.0) * cfg.stages), cfg.stages - 1) / (
        cfg.stages - 1
    )


def _constant(x, format_ema, cfg):
    return jnp.zeros_like(x)


def _adaptive(x, format_ema, cfg):
    return jnp.clip(
        (format_ema - cfg.adaptive_low) / (cfg.adaptive_high - cfg.adaptive_low), 0.0, 1.0
    )


SHAPES = {
    "linear": _linear,
    "cosine": _cosine,
    "sqrt": _sqrt,
    "step": _step,
    "constant": _constant,
    "adaptive": _adaptive,
}
