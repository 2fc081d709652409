"""The theory of docs/method.md section 3, measured on one batch of a policy's own completions.

`measure_variance` is the command `rest-jax variance MODEL DATA`: it samples G completions of each of some prompts at
temperature 1, scores them at the final reward scale, measures, prints three tables and writes variance.json and
variance.png. `measure_batch` measures any scored batch.

Rules compared, every one scaled so that sum_t w_t = T (Theorem 2's constraint, and the same total for all):
    uniform          1
    paper            inverse_bound of the batch's entropies, scaled, clipped and normalised as configured, nu = 0
    exact            the same with inverse_gini: the second moment of the score instead of its bound
    theorem2         1 / beta_r, the minimiser of Theorem 1's bound; not clipped
    inverse_score    1 / E_a|J_t^T s_t|^2: the same with the quantity that beta_r bounds
    configured       what the config trains with at nu = 0, when it is none of these
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.analysis.draws import make_draw, open_data
from rest_jax.analysis.measured import plain, result_folder
from rest_jax.analysis.variance.gradients import (
    GroupGradients,
    TokenGradients,
    gram_noise,
    group_gradients,
    token_gradients,
)
from rest_jax.analysis.variance.report import variance_tables, write_variance
from rest_jax.config import Config
from rest_jax.distributed import is_first_process, say
from rest_jax.errors import UserError
from rest_jax.models.decoder import Decoder
from rest_jax.rl import curriculum, weights
from rest_jax.rl.packing import bucket
from rest_jax.rl.prepare import StepConfig, compute_advantage, step_config, weigh_tokens
from rest_jax.rl.view import TokenView, make_view, nonzero_advantage
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import Params, ScoredBatch

RESAMPLES = 2000  # of the groups, for intervals
# Of 1 - sum p^2 <= 1 - exp(-H): the rounding of a float32 softmax, its sums included.
TOLERANCE = 1e-5
TELLING = 1e-3  # the least 1 - exp(-H) at which the ratio of the two sides is more than rounding


def measure_variance(
    config: Config,
    data: str,
    *,
    prompts: int,
    tokens: int,
    limit: int | None,
    output: str | None,
) -> int:
    """Measures and writes; 1 when a token breaks the inequality, else 0. UserError for what cannot be measured.

    `prompts` are drawn by the config's seed from the first `limit` records of `data`. `output` None: `variance/` in the
    run's folder, for other models in the config's output folder.
    """
    if prompts < 2:
        raise UserError(f"--prompts {prompts}: a variance over groups needs at least 2")
    opened = open_data(config, data, limit, prompts)
    chosen, policy = opened.choose(prompts, config.seed), opened.policy
    group_size = config.rollout.group_size
    say(f"sampling {group_size} completions of each of {prompts} prompts")
    scored = make_draw(opened)(chosen, jax.random.key(config.seed))
    # all devices compute one group together, which is not how the attention kernel is split
    decoder = Decoder(dataclasses.replace(policy.config, attention="blocks"))
    measured = measure_batch(decoder, policy.params, scored, config, tokens)
    report = {"model": config.model.source, "data": data, **measured}
    say(f"\n{variance_tables(report)}\n")
    if is_first_process():
        paths = write_variance(report, result_folder(config, output, "variance"))
        say(f"written: {', '.join(map(str, paths))}")
    return 1 if report["overall"]["violations"] else 0


def measure_batch(
    decoder: Decoder, params: Params, scored: ScoredBatch, config: Config, tokens: int
) -> dict[str, Any]:
    """Measures one scored batch (NumPy) that `params` sampled at temperature 1, `tokens` tokens of each region for beta.

    Returns the content of variance.json: plain values, None for what is not finite. `overall` is an `inequality`, `regions`
    and `rules` have the rows of `region_rows` and `rule_rows`. UserError when no group has an advantage. Cost: a forward and
    7 + 5 backward passes a group, and a forward and two backward passes a token drawn.
    """
    scored = trim(scored)
    groups, group_size = scored.reward.shape
    active = int(np.sum(nonzero_advantage(jnp.asarray(scored.reward))))
    if not active:
        raise UserError(
            f"none of {groups} groups of {group_size} completions has rewards that differ, so there is no gradient "
            "to measure; raise --prompts or rollout.group_size, or take a policy with a format of its own"
        )
    say(f"measuring the gradients of {active} groups with advantage")
    token_stats = token_gradients(decoder, params, scored, tokens, config.seed)
    rules = rule_weights(scored, token_stats, config)
    present = [r for r in weights.POLICY_REGIONS if (scored.region == r).any()]
    parts = [(scored.region == r).astype(np.float32) for r in present]
    advantage = np.asarray(view_at_start(scored, config)[0].token_advantage)
    total = int((scored.region != Region.NONE).sum())
    coefficient = np.stack([*rules.values(), *parts]) * (-advantage * groups / total)
    coefficient, chunk = coefficient.astype(np.float32), config.loss.vocab_chunk
    gradients = group_gradients(decoder, params, scored.rollout, coefficient, chunk, config.seed)
    return plain(
        {
            "prompts": groups,
            "group_size": group_size,
            "groups_with_advantage": active,
            "exact_gradients": gradients.exact,
            "gradient_dimensions": gradients.dimensions,
            "tolerance": TOLERANCE,
            "overall": inequality(scored, scored.region != Region.NONE),
            "regions": region_rows(scored, present, token_stats, gradients.gram[len(rules) :]),
            "rules": rule_rows(scored, rules, token_stats, gradients, config.seed),
        }
    )


def view_at_start(scored: ScoredBatch, config: Config) -> tuple[TokenView, StepConfig]:
    """What the rules of the config read of the batch at nu = 0, the advantage included; and the rules."""
    cfg = step_config(config, config.train.steps or 1)
    given = jax.tree.map(jnp.asarray, scored)
    view = make_view(given, given.rollout, curriculum.init(cfg.schedule), cfg.seed)
    return dataclasses.replace(view, advantage=compute_advantage(view, cfg)), cfg


def trim(scored: ScoredBatch) -> ScoredBatch:
    """The batch cut to the prompt and response positions in use, in few sizes."""
    r = scored.rollout
    prompt = bucket(int(r.prompt_length.max()), r.prompt.shape[1])
    response = bucket(int(r.response_length.max()), r.responses.shape[2])
    cut = {f: getattr(r, f)[..., :response] for f in ("responses", "logp", "entropy", "gini")}
    rollout = dataclasses.replace(r, prompt=r.prompt[:, :prompt], **cut)
    return dataclasses.replace(scored, rollout=rollout, region=scored.region[..., :response])


def rule_weights(
    scored: ScoredBatch, tokens: TokenGradients, config: Config
) -> dict[str, np.ndarray]:
    """Token weights `[P, G, T]` of every rule, uniform first; each sums to the number of tokens."""
    view, step = view_at_start(scored, config)
    cfg, schedule = config.weights, step.schedule
    r, region = scored.rollout, jnp.asarray(scored.region)
    stats = weights.region_stats(region, jnp.asarray(r.entropy), jnp.asarray(r.gini))

    def by_entropy(rule: str) -> np.ndarray:
        own = cfg.model_copy(update={"rule": rule})
        base = weights.base_weights(stats, own)
        return _to_total(weights.token_weights(region, base, cfg.normalizer), scored.region)

    # entropies are floored before they are inverted, here as in the other rules
    bound = np.maximum(tokens.bound, -np.expm1(-cfg.entropy_floor))
    score = np.maximum(tokens.score, 1e-12 * np.nanmax(tokens.score))
    rules = {
        "uniform": (scored.region != Region.NONE).astype(np.float64),
        "paper": by_entropy("inverse_bound"),
        "exact": by_entropy("inverse_gini"),
        "theorem2": theorem2_weights(scored.region, bound * tokens.jacobian),
        "inverse_score": theorem2_weights(scored.region, score),
    }
    format_score = jnp.mean(jnp.asarray(scored.format_score))
    state = curriculum.update(curriculum.init(schedule), stats, format_score, schedule)
    state = dataclasses.replace(state, nu=jnp.zeros_like(state.nu))
    base = curriculum.region_weights(state, schedule)
    configured = _to_total(weigh_tokens(view, base, step), scored.region)
    if not any(np.allclose(configured, w, rtol=1e-5) for w in rules.values()):
        rules["configured"] = configured
    return rules


def theorem2_weights(region: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """w* = T / (sum_t 1/beta_t) * 1/beta_t with beta `[R]` by region: least sum_t beta_t w_t^2 where sum_t w_t = T.

    NONE has 0.
    """
    inverse = np.where(region == Region.NONE, 0.0, 1.0 / np.append(np.inf, beta[1:])[region])
    return _to_total(inverse, region)


def _to_total(weight: Any, region: np.ndarray) -> np.ndarray:
    weight = np.asarray(weight, np.float64)
    return weight * ((region != Region.NONE).sum() / weight.sum())


def inequality(scored: ScoredBatch, where: np.ndarray) -> dict[str, Any]:
    """Lemma 2 over the tokens `where`, from the sampler's own float32 log-probs, entropies and Ginis:

    means of `entropy` (nats), `gini` (1 - sum p^2 = E|onehot - p|^2), its `bound` 1 - exp(-H) and `sampled`, |onehot(a) - p|^2
    of the actions drawn; the `largest_ratio` gini / bound of a single token (None when every bound is below `TELLING`);
    `violations`, the tokens whose gini exceeds their bound by more than `TOLERANCE`.

    |onehot(a) - p|^2 = 1 - 2 p_a + sum p^2 has the mean 1 - sum p^2 over a ~ p. So over all tokens `sampled` is `gini` within
    `sampled_error` (which counts the draw of actions alone: given their contexts, the deviations of different tokens are
    uncorrelated). Within a region it need not be: which region a token belongs to depends on the action drawn.
    """
    r = scored.rollout
    logp, entropy, gini = (x[where].astype(np.float64) for x in (r.logp, r.entropy, r.gini))
    bound = -np.expm1(-entropy)
    sampled = 2.0 - 2.0 * np.exp(logp) - gini
    telling = bound > TELLING
    return {
        "tokens": len(gini),
        "entropy": entropy.mean(),
        "gini": gini.mean(),
        "bound": bound.mean(),
        "sampled": sampled.mean(),
        "sampled_error": np.sqrt(np.sum((sampled - gini) ** 2)) / len(gini),
        "largest_ratio": (gini[telling] / bound[telling]).max() if telling.any() else None,
        "violations": int((gini > bound + TOLERANCE).sum()),
    }


def region_rows(
    scored: ScoredBatch, present: list[Region], tokens: TokenGradients, gram: np.ndarray
) -> dict[str, dict[str, Any]]:
    """By region: its `TokenGradients`, its `inequality`, and `gradient_square`, |g|^2 of its part of the uniform loss, from
    `gram` [R' P P] of those parts.
    """
    return {
        region.name.lower(): {
            **{name: values[region] for name, values in dataclasses.asdict(tokens).items()},
            **inequality(scored, scored.region == region),
            "gradient_square": gram_noise(own).mean_square,
        }
        for region, own in zip(present, gram, strict=True)
    }


def rule_rows(
    scored: ScoredBatch,
    rules: dict[str, np.ndarray],
    tokens: TokenGradients,
    gradients: GroupGradients,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """By weight rule, the mini-batch gradient: realised mean `weights` by region; Theorem 1's `bound` sum_t beta_t w_t^2,
    uniform = 1; `variance`, `mean_square` |g|^2 and their ratio `share`, also `relative` to that of the first rule, uniform,
    with a 95 % bootstrap interval over groups; the `noise_scale`, prompts at which noise and signal are equal (None: no
    signal seen in this batch); the `cosine` with the gradient of uniform.
    """
    groups = len(scored.reward)
    beta = np.nan_to_num(tokens.beta)[scored.region]
    count = np.bincount(scored.region.ravel(), minlength=NUM_REGIONS)
    uniform = gram_noise(gradients.gram[0]).share
    intervals = relative_intervals(gradients.gram[: len(rules)], seed)
    rows = {}
    for i, (name, weight) in enumerate(rules.items()):
        noise = gram_noise(gradients.gram[i])
        total = np.bincount(scored.region.ravel(), weight.ravel(), minlength=NUM_REGIONS)
        rows[name] = {
            "weights": {
                r.name.lower(): total[r] / count[r] for r in weights.POLICY_REGIONS if count[r]
            },
            "bound": np.sum(beta * weight**2) / np.sum(beta * rules["uniform"] ** 2),
            "variance": noise.variance,
            "mean_square": noise.mean_square,
            "share": noise.share,
            "relative": noise.share / uniform,
            "relative_interval": intervals[i],
            "noise_scale": groups * noise.variance / noise.signal if noise.signal > 0 else None,
            "cosine": gradients.cosine[i],
        }
    return rows


def relative_intervals(gram: np.ndarray, seed: int) -> np.ndarray:
    """95 % bootstrap intervals over groups, float64 [K, 2]: of each share in `gram` [K, P, P] over the first.

    Resamples of one and the same group, which say nothing of a variance, are left out.
    """
    groups = gram.shape[1]
    drawn = np.random.default_rng(seed).integers(0, groups, (RESAMPLES, groups))
    count = np.stack([np.bincount(each, minlength=groups) for each in drawn])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.stack([gram_noise(g, count).share for g in gram])
        return np.nanquantile(share / share[0], [0.025, 0.975], axis=-1).T
