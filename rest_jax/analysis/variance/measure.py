"""The theory of METHOD section 3, measured on one batch of rollouts: inequality, bound, gradient variance by weight rule.

`measure(decoder, params, scored, schedule)` -> `VarianceReport`. The policy must be the one that sampled, at temperature 1.

Rules compared, every one scaled so that sum_t w_t = T (Theorem 2's constraint, and the same total for all):
    uniform          1
    paper            inverse_bound of the batch's entropies, anchored, clipped and normalised as configured, nu = 0
    exact            the same with inverse_gini: the second moment of the score instead of its bound
    theorem2         1 / beta_r, the minimiser of Theorem 1's bound; not clipped
    inverse_score    1 / E_a|J_t^T s_t|^2: the same with the quantity that beta_r bounds
    configured       what the config trains with at nu = 0, when it is none of these
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rest_jax.analysis.variance.group_gradients import (
    GroupGradients,
    group_gradients,
    interval,
    noise,
    resample,
)
from rest_jax.analysis.variance.report import (
    TELLING,
    TOLERANCE,
    Inequality,
    RegionRow,
    RuleRow,
    Settings,
    VarianceReport,
)
from rest_jax.analysis.variance.token_gradients import TokenGradients, measure_tokens
from rest_jax.models.decoder import Decoder
from rest_jax.rl import curriculum, weights
from rest_jax.rl.advantages import ADVANTAGES, nonzero_advantage
from rest_jax.rl.packing import bucket
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import Params, ScoredBatch


def measure(
    decoder: Decoder,
    params: Params,
    scored: ScoredBatch,
    schedule: curriculum.Schedule,
    advantage: str = "grpo",
    settings: Settings | None = None,
) -> VarianceReport:
    """Measures one scored batch (NumPy) of at least two groups, sampled by `params` at temperature 1.

    ValueError for fewer groups, or when no group has an advantage. Cost: a forward and 7 + 5 backward passes a
    group, and a few passes a token looked at.
    """
    settings = settings or Settings()
    scored = trim(scored)
    groups, group_size = scored.reward.shape
    signal = np.asarray(nonzero_advantage(jnp.asarray(scored.reward)))
    if groups < 2 or not signal.any():
        raise ValueError(f"measure: {groups} groups, {signal.sum()} of them with an advantage")
    tokens = measure_tokens(decoder, params, scored, tokens=settings.tokens, seed=settings.seed)
    rules = rule_weights(scored, tokens, schedule)
    present = [r for r in weights.POLICY_REGIONS if (scored.region == r).any()]
    parts = [(scored.region == r).astype(np.float32) for r in present]
    a = np.asarray(ADVANTAGES[advantage](jnp.asarray(scored.reward)))
    total = int((scored.region != Region.NONE).sum())
    coefficient = np.stack([*rules.values(), *parts]) * (-a[..., None] * groups / total)
    found = group_gradients(
        decoder, params, scored.rollout, coefficient.astype(np.float32),
        chunk=settings.chunk, exact_floats=settings.exact_floats, seed=settings.seed,
    )  # fmt: skip
    overall = inequality(scored, scored.region != Region.NONE)
    regions = region_rows(scored, present, tokens, found.gram[len(rules) :])
    return VarianceReport(
        prompts=groups,
        group_size=group_size,
        groups_with_advantage=int(signal.sum()),
        exact_gradients=found.exact,
        gradient_dimensions=found.dimensions,
        tolerance=TOLERANCE,
        settings=settings,
        overall=overall,
        regions=regions,
        rules=rule_rows(scored, rules, tokens, found, settings),
    )


def trim(scored: ScoredBatch) -> ScoredBatch:
    """The batch cut to the prompt and response positions in use, in few sizes."""
    r = scored.rollout
    prompt = bucket(int(r.prompt_length.max()), r.prompt.shape[1])
    response = bucket(int(r.response_length.max()), r.responses.shape[2])
    cut = {f: getattr(r, f)[..., :response] for f in ("responses", "logp", "entropy", "gini")}
    rollout = dataclasses.replace(r, prompt=r.prompt[:, :prompt], **cut)
    return dataclasses.replace(scored, rollout=rollout, region=scored.region[..., :response])


def rule_weights(
    scored: ScoredBatch, tokens: TokenGradients, schedule: curriculum.Schedule
) -> dict[str, np.ndarray]:
    """Token weights `[P, G, T]` of every rule, uniform first; each sums to the number of tokens."""
    cfg = schedule.weights
    r, region = scored.rollout, jnp.asarray(scored.region)
    stats = weights.region_stats(region, jnp.asarray(r.entropy), jnp.asarray(r.gini))

    def by_rule(rule: str) -> np.ndarray:
        base = weights.base_weights(
            stats.entropy, stats.gini, stats.count > 0, cfg.model_copy(update={"rule": rule})
        )
        return np.asarray(weights.token_weights(region, base, cfg.normalizer))

    # entropies are floored before they are inverted, here as in the other rules
    bound = np.maximum(tokens.bound, -np.expm1(-cfg.entropy_floor))
    score = np.maximum(tokens.score.mean, 1e-12 * np.nanmax(tokens.score.mean))
    found = {
        "uniform": (scored.region != Region.NONE).astype(np.float32),
        "paper": by_rule("inverse_bound"),
        "exact": by_rule("inverse_gini"),
        "theorem2": theorem2_weights(scored.region, bound * tokens.jacobian.mean),
        "inverse_score": theorem2_weights(scored.region, score),
    }
    state = curriculum.update(
        curriculum.init(schedule), stats, jnp.mean(jnp.asarray(scored.format_score)), schedule
    )
    start = dataclasses.replace(state, nu=jnp.zeros_like(state.nu))
    base = curriculum.region_weights(start, schedule)
    configured = np.asarray(weights.token_weights(region, base, schedule.normalizer))
    found = {name: _to_total(w, scored.region) for name, w in found.items()}
    configured = _to_total(configured, scored.region)
    if not any(np.allclose(configured, w, rtol=1e-5) for w in found.values()):
        found["configured"] = configured
    return found


def theorem2_weights(region: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """w* = T / (sum_t 1/beta_t) * 1/beta_t with beta `[R]` by region: least sum_t beta_t w_t^2 where sum_t w_t = T.

    NONE has 0.
    """
    inverse = np.where(region == Region.NONE, 0.0, 1.0 / np.append(np.inf, beta[1:])[region])
    return _to_total(inverse, region)


def _to_total(weight: np.ndarray, region: np.ndarray) -> np.ndarray:
    weight = weight.astype(np.float64)
    return weight * ((region != Region.NONE).sum() / weight.sum())


def region_rows(
    scored: ScoredBatch, present: list[Region], tokens: TokenGradients, gram: np.ndarray
) -> dict[str, RegionRow]:
    """One row a region; `gram` [R' P P] of the regions' own parts of the uniform loss."""
    return {
        r.name.lower(): RegionRow(
            **dataclasses.asdict(inequality(scored, scored.region == r)),
            gradient_square=float(noise(gram[i]).mean_square),
            gradient_variance=float(noise(gram[i]).variance),
            sampled_tokens=int(tokens.count[r]),
            beta=tokens.beta.mean[r],
            beta_error=tokens.beta.error[r],
            jacobian=tokens.jacobian.mean[r],
            jacobian_error=tokens.jacobian.error[r],
            score=tokens.score.mean[r],
            score_error=tokens.score.error[r],
        )
        for i, r in enumerate(present)
    }


def inequality(scored: ScoredBatch, where: np.ndarray) -> Inequality:
    """Lemma 2 over some tokens, from the sampler's own float32 log-probs, entropies and Ginis."""
    r = scored.rollout
    logp, entropy, gini = (x[where].astype(np.float64) for x in (r.logp, r.entropy, r.gini))
    bound = -np.expm1(-entropy)
    sampled = 2.0 - 2.0 * np.exp(logp) - gini
    telling = bound > TELLING
    return Inequality(
        tokens=len(gini),
        entropy=entropy.mean(),
        gini=gini.mean(),
        bound=bound.mean(),
        sampled=sampled.mean(),
        sampled_error=np.sqrt(np.sum((sampled - gini) ** 2)) / len(gini),
        largest_ratio=(gini[telling] / bound[telling]).max() if telling.any() else None,
        largest_excess=(gini - bound).max(),
        violations=int((gini > bound + TOLERANCE).sum()),
    )


def rule_rows(
    scored: ScoredBatch,
    rules: dict[str, np.ndarray],
    tokens: TokenGradients,
    found: GroupGradients,
    settings: Settings,
) -> dict[str, RuleRow]:
    """One row a rule; the first, uniform, is what the others are compared with, on the same resamples."""
    groups = len(scored.reward)
    drawn = resample(groups, settings.resamples, settings.seed)
    beta = np.nan_to_num(tokens.beta.mean)[scored.region]
    uniform, uniform_drawn = noise(found.gram[0]), noise(found.gram[0], drawn)
    rows = {}
    for i, (name, weight) in enumerate(rules.items()):
        here, again = noise(found.gram[i]), noise(found.gram[i], drawn)
        rows[name] = RuleRow(
            weights=_realised(scored.region, weight),
            bound=float(np.sum(beta * weight**2) / np.sum(beta * rules["uniform"] ** 2)),
            variance=float(here.variance),
            mean_square=float(here.mean_square),
            share=float(here.share),
            share_interval=interval(again.share),
            relative=float(here.share / uniform.share),
            relative_interval=interval(again.share / uniform_drawn.share),
            noise_scale=float(groups * here.variance / here.signal) if here.signal > 0 else None,
            cosine=float(found.cosine[i]),
        )
    return rows


def _realised(region: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    count = np.bincount(region.ravel(), minlength=NUM_REGIONS)
    total = np.bincount(region.ravel(), weights=weight.ravel(), minlength=NUM_REGIONS)
    return {r.name.lower(): total[r] / count[r] for r in weights.POLICY_REGIONS if count[r]}
