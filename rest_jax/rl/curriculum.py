"""The curriculum: how weight moves from structure to reasoning (docs/method.md section 5).

    init(cfg) -> state        update(state, stats, format_score, cfg) -> state        region_weights(state, cfg) -> [R]

All pure and jittable; the state lives in the TrainState. Progress nu runs over `steps` updates in the chosen shape, or, for
`adaptive`, follows the EMA of the format score. With base weights b_r and token counts n_r of the start, `target: share` gives
region r a share of the total weight, and its tokens share / (n_r / N) by the EMA of the counts:

    start s_r = b_r n_r / sum_u b_u n_u    TAG, SCAFFOLD s_r (1 - alpha_f nu)    NAME, RESPONSE, OTHER s_r
    PARAM, THINK s_r and what format gave up, in proportion to their s_r or to `freed_to`

`target: mass` takes the shares from the config. `target: weight` moves the base weights, as described for ResT:

    format max(w_min, b - alpha_f nu)    PARAM min(w_max, b + alpha_p nu)    THINK min(w_max, b + alpha_t nu)    NAME constant
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rest_jax.config import Config, CurriculumConfig, WeightsConfig
from rest_jax.rl import weights
from rest_jax.rl.masked import EPS
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import CurriculumState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The two config sections that decide the weights, and the run's length in steps (for `steps: null`)."""

    weights: WeightsConfig
    curriculum: CurriculumConfig
    run_steps: int

    @classmethod
    def of(cls, config: Config, steps: int) -> "Schedule":
        """That of a run of so many steps; a rule of single tokens leaves all regions at 1."""
        return cls(config.weights.of_regions, config.curriculum, steps)

    @property
    def steps(self) -> int:
        """Steps until nu = 1."""
        part = round(self.curriculum.run_fraction * self.run_steps)
        return self.curriculum.steps or max(part, 1)

    @property
    def normalizer(self) -> str:
        """The normaliser of the token weights."""
        return self.weights.normalizer


def init(cfg: Schedule) -> CurriculumState:
    """Nothing measured: every region has weight 1, or its number under rule `constant`."""
    state = CurriculumState(
        step=jnp.zeros((), jnp.int32),
        nu=jnp.zeros((), jnp.float32),
        entropy=jnp.zeros(NUM_REGIONS, jnp.float32),
        gini=jnp.zeros(NUM_REGIONS, jnp.float32),
        base_count=jnp.zeros(NUM_REGIONS, jnp.float32),
        seen=jnp.zeros(NUM_REGIONS, jnp.int32),
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
    is not finite, keeps what was measured of it and its averages.
    """
    present = (stats.count > 0) & jnp.isfinite(stats.entropy) & jnp.isfinite(stats.gini)
    format_decay = cfg.curriculum.format_ema_decay
    format_ema = jnp.where(
        state.step == 0,
        format_score,
        format_decay * state.format_score + (1 - format_decay) * format_score,
    )
    measured = MEASURES[cfg.weights.entropy](state, stats, present, cfg.weights)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        nu=SHAPES[cfg.curriculum.shape](state.step / cfg.steps, format_ema, cfg.curriculum),
        entropy=measured.entropy,
        gini=measured.gini,
        base_count=measured.count,
        seen=state.seen + present,
        count=_smooth(state, present, cfg.weights.count_decay)(state.count, stats.count),
        format_score=format_ema,
    )
    return dataclasses.replace(new, weight=region_weights(new, cfg))


def _smooth(state, present, decay):
    """The step of a moving average that begins where a region is first seen."""

    def smooth(old, new):
        moved = jnp.where(state.seen > 0, decay * old + (1 - decay) * new, new)
        return jnp.where(present, moved, old)

    return smooth


def _running(state, stats, present, cfg):
    smooth = _smooth(state, present, cfg.ema_decay)
    return weights.RegionStats(
        entropy=smooth(state.entropy, stats.entropy),
        gini=smooth(state.gini, stats.gini),
        count=smooth(state.base_count, stats.count),
    )


def _start(state, stats, present, cfg):
    """Means over the tokens of the first `entropy_steps` batches in which a region occurs, early or late; then fixed."""
    taken = present & (state.seen < cfg.entropy_steps)
    tokens = state.seen * state.base_count
    part = stats.count / jnp.maximum(tokens + stats.count, 1)

    def mean(old, new, part):
        return jnp.where(taken, old + part * (new - old), old)

    return weights.RegionStats(
        entropy=mean(state.entropy, stats.entropy, part),
        gini=mean(state.gini, stats.gini, part),
        count=mean(state.base_count, stats.count, 1 / (state.seen + 1)),
    )


MEASURES = {"start": _start, "running": _running}


def region_weights(state: CurriculumState, cfg: Schedule) -> Float[Array, " R"]:
    """Weights in force at the state's nu and averages. Rule `uniform` is plain GRPO: no curriculum moves it.

    NONE and regions zeroed by name are 0, and constants of 0 stay 0 (the released preset); all others are above 0. A region
    not yet seen has its base weight. Zeroing a region leaves the proportions of the others as they are.
    """
    measured = weights.RegionStats(state.entropy, state.gini, state.base_count)
    weight = weights.base_weights(measured, cfg.weights)
    if cfg.weights.rule != "uniform":
        weight = TARGETS[cfg.curriculum.target](weight, state, cfg)
    zero = [Region.NONE, *(Region[name.upper()] for name in cfg.weights.zero)]
    return weight.at[jnp.array(zero)].set(0.0)


FORMAT = np.array([Region.TAG, Region.SCAFFOLD])
GAINING = np.array([Region.PARAM, Region.THINK])


def _by_share(base, state, cfg):
    c = cfg.curriculum
    start = base * state.base_count
    start = start / jnp.maximum(jnp.sum(start), EPS)
    gained = start[GAINING]
    parts = gained if c.freed_to is None else jnp.where(gained > 0, jnp.array(c.freed_to), 0.0)
    total = jnp.sum(parts)
    # Format keeps its share until a region has been seen that gets what it gives up.
    fall = jnp.where(total > 0, c.alpha_format * state.nu, 0.0)
    freed = fall * jnp.sum(start[FORMAT]) * parts / jnp.where(total > 0, total, 1.0)
    share = start.at[FORMAT].multiply(1 - fall).at[GAINING].add(freed)
    return _weights_of_shares(share, base, state, cfg.weights)


def _by_mass(base, state, cfg):
    c, nu = cfg.curriculum, state.nu

    def share(region):
        start, end = getattr(c, f"share_start_{region}"), getattr(c, f"share_end_{region}")
        return start + (end - start) * nu

    named = [share(r) for r in ("format", "name", "param", "think")]
    groups = [
        (FORMAT, named[0]),
        ([Region.NAME], named[1]),
        ([Region.PARAM], named[2]),
        ([Region.THINK], named[3]),
        ([Region.RESPONSE, Region.OTHER], jnp.maximum(1.0 - sum(named), 0.0)),
    ]
    shares = jnp.zeros(NUM_REGIONS, jnp.float32)
    for members, part in groups:
        count = state.count[np.array(members)]
        shares = shares.at[np.array(members)].set(part * count / jnp.maximum(jnp.sum(count), EPS))
    # The share of a group never seen goes to the others.
    shares = shares / jnp.maximum(jnp.sum(shares), EPS)
    return _weights_of_shares(shares, base, state, cfg.weights)


def _weights_of_shares(share, base, state, cfg):
    """share / (n_r / N), clipped; base weights of 0 and those of regions never seen stay."""
    tokens = jnp.sum(state.count)
    weight = jnp.clip(share * tokens / jnp.maximum(state.count, EPS), cfg.w_min, cfg.w_max)
    return jnp.where((state.seen > 0) & (base > 0), weight, base)


def _by_weight(base, state, cfg):
    w, c, nu = cfg.weights, cfg.curriculum, state.nu
    lowered = jnp.maximum(w.w_min, base[FORMAT] - c.alpha_format * nu)
    most = jnp.array([c.param_max or w.w_max, c.think_max or w.w_max])
    raised = jnp.minimum(most, base[GAINING] + jnp.array([c.alpha_param, c.alpha_think]) * nu)
    weight = base.at[FORMAT].set(lowered).at[GAINING].set(raised)
    return jnp.where(base > 0, weight, 0.0)


TARGETS = {"share": _by_share, "weight": _by_weight, "mass": _by_mass}


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
