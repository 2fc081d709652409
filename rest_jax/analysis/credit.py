"""Exact credit: which tokens of a completion decide its reward, measured by sampling on from where they stand.

    Var(R) = sum_t E[Var(R | s_t) - Var(R | s_t+1)]        (law of total variance; s_t: the prompt and the tokens before token t)

Token t is credited with Var(R | s_t) - Var(R | s_t+1), the reward's variance that is gone once it is known. From every state K
continuations are sampled: the state is a prompt and its continuations are a group, prefilled once. A state that several
completions share is sampled once. Nothing is decided behind the last token, and nothing by a token that was certain
(1 - sum_v p^2 at most `CERTAIN`), so states are those before uncertain tokens. Credits of a completion add up to Var(R | prompt).

`measure_credit` is the command `rest-jax credit MODEL DATA`; `credit` is its arithmetic, for any source of rewards.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy
from etils import epath

from rest_jax.analysis import plotting
from rest_jax.analysis.arms import make_arms
from rest_jax.analysis.draws import Opened, Prompts, make_draw, open_data
from rest_jax.analysis.measured import in_words, result_folder, write_result
from rest_jax.config import Config
from rest_jax.data.loader import bucketed, pad
from rest_jax.distributed import is_first_process, say
from rest_jax.errors import UserError
from rest_jax.files import Location
from rest_jax.models.policy import check_positions
from rest_jax.rl import weights
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.rollout.scoring import score_records
from rest_jax.run.metrics import summary_table
from rest_jax.run.progress import Progress
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import PromptBatch, RolloutBatch, Sampling, ScoredBatch

CERTAIN = 1e-4  # 1 - sum p^2 of a token that decides nothing; what it could decide is at most that share of the reward's range
JSON_FILE, PICTURE = "credit.json", "credit.png"
_AT_ONCE = 256  # states that are continued in one rollout
_RESAMPLES = 200  # of the prompts, for intervals of correlations
END = -1  # the state behind which nothing is decided


class States(NamedTuple):
    """The N different states of a batch of completions before their uncertain tokens."""

    prompt: np.ndarray  # int [N]
    prefix: list[np.ndarray]  # int32 [n] each: the tokens drawn so far
    # int [P, G, T]: of an uncertain token, the state it was drawn in; END of others
    before: np.ndarray
    # int [P, G, T]: the state before the next uncertain token; END where there is none
    after: np.ndarray


# continuations of states -> their rewards [N, K]
Continue = Callable[[States], np.ndarray]


def find_states(rollout: RolloutBatch, certain: float = CERTAIN) -> States:
    """The states of the completions (NumPy)."""
    index: dict[tuple[int, bytes], int] = {}
    prefixes = []
    before = np.full(rollout.responses.shape, END)
    after = before.copy()
    for p, g in np.ndindex(*rollout.response_length.shape):
        length = int(rollout.response_length[p, g])
        ids = rollout.responses[p, g, :length]
        previous = None
        for t in np.flatnonzero(rollout.gini[p, g, :length] > certain):
            prefix = ids[:t]
            state = index.setdefault((p, prefix.tobytes()), len(index))
            if state == len(prefixes):
                prefixes.append(prefix)
            before[p, g, t] = state
            if previous is not None:
                after[p, g, previous] = state
            previous = t
    prompt = np.array([p for p, _ in index], np.int64)
    return States(prompt, prefixes, before, after)


@dataclasses.dataclass(frozen=True)
class Credit:
    """What every token decides, float64 [P, G, T]; zero on tokens that were certain."""

    credit: np.ndarray
    uncertain: np.ndarray  # bool
    # the mean reward of the continuations from before an uncertain token; NaN of others
    value: np.ndarray
    error: np.ndarray  # standard error: of the continuations alone
    halves: np.ndarray  # [2, P, G, T]: from each half of the continuations


def credit(states: States, rewards: np.ndarray) -> Credit:
    """From the rewards [N, K] of K continuations of each state. ValueError for fewer than four."""
    count = rewards.shape[1]
    if count < 4:
        raise ValueError(f"{count} continuations: four are the least, two for each half")

    def decided(variance: np.ndarray) -> np.ndarray:
        value = np.append(variance, 0.0)  # that of END
        return np.where(states.before == END, 0.0, value[states.before] - value[states.after])

    halves = [_variance(half) for half in np.array_split(rewards, 2, axis=1)]
    square = np.append(_variance_error(rewards) ** 2, 0.0)
    known = states.before != END
    value = np.append(rewards.mean(axis=1, dtype=np.float64), np.nan)[states.before]
    error = np.sqrt(np.where(known, square[states.before] + square[states.after], 0.0))
    halves = np.stack([decided(x) for x in halves])
    return Credit(decided(_variance(rewards)), known, value, error, halves)


def _variance(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64).var(axis=1, ddof=1)


def _variance_error(x: np.ndarray) -> np.ndarray:
    """Standard error of the unbiased variance of each row: sqrt((m4 - s^4 (K - 3) / (K - 1)) / K)."""
    k = x.shape[1]
    square = _variance(x)
    fourth = np.mean((x - x.mean(axis=1, keepdims=True)) ** 4, axis=1)
    return np.sqrt(np.maximum(fourth - square**2 * (k - 3) / (k - 1), 0.0) / k)


def region_rows(found: Credit, region: np.ndarray) -> dict[str, dict[str, Any]]:
    """By region: `tokens`, the `share` of the decided variance with its standard error and 95 % interval (jackknife over
    prompts, Student's t), and how many times the mean a token of it decides (`per_token`).
    """
    parts = np.stack([np.where(region == r, found.credit, 0.0).sum((1, 2)) for r in Region])
    prompts, total = parts.shape[1], parts.sum()
    tokens = np.bincount(region.ravel(), minlength=NUM_REGIONS)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = parts.sum(1) / total
        without = (parts.sum(1, keepdims=True) - parts) / (total - parts.sum(0))
        each = share / (tokens / tokens[Region.NONE + 1 :].sum())
    error = np.sqrt((prompts - 1) * without.var(axis=1))
    reach = scipy.stats.t.ppf(0.975, prompts - 1) * error
    return {
        r.name.lower(): {
            "tokens": int(tokens[r]),
            "share": share[r],
            "share_error": error[r],
            "share_interval": [share[r] - reach[r], share[r] + reach[r]],
            "per_token": each[r],
        }
        for r in weights.POLICY_REGIONS
        if tokens[r]
    }


def totals(found: Credit, reward: np.ndarray) -> dict[str, Any]:
    """Two checks, as means over prompts with standard errors. The variance of the reward of a prompt: `decided`, the sum of a
    completion's credits, and `direct`, that of the completions' own rewards [P, G], which are other draws, with their
    `difference`. And `continued`, the rewards of the continuations of a completion's states less its own.
    """
    own = found.credit.sum(-1).mean(1)
    direct = _variance(reward)
    states = np.maximum(found.uncertain.sum(-1), 1)
    continued = np.where(found.uncertain, found.value - reward[..., None], 0.0).sum(-1) / states

    def mean(x: np.ndarray) -> dict[str, float]:
        return {"mean": float(x.mean()), "error": float(x.std(ddof=1) / np.sqrt(len(x)))}

    return {
        "decided": mean(own),
        "direct": mean(direct),
        "difference": mean(own - direct),
        "continued": mean(continued.mean(1)),
    }


def rank_rows(
    found: Credit, region: np.ndarray, rules: Mapping[str, np.ndarray], seed: int
) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation of each rule's token weights [P, G, T] with the credits, over all tokens and over the uncertain
    ones (`uncertain`), with 95 % intervals (bootstrap over prompts); rules that weigh all tokens alike have none.

    `between halves` is that of the credits from both halves of the continuations, r. `perfect` is about what weights equal to the
    true credits would have, sqrt(2 r / (1 + r)) (Spearman and Brown, 1910). A credit belongs to the token that was drawn, so
    no rule that only sees its state can get there.
    """
    drawn = _resamples(len(region), seed)
    masks = {"correlation": region != Region.NONE, "uncertain": found.uncertain}

    def correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
        x, y = a[where], b[where]
        if not x.size or np.ptp(x) == 0 or np.ptp(y) == 0:
            return np.nan
        return float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])

    def perfect(r: float) -> float:
        return float(np.sqrt(max(2 * r / (1 + r), 0.0))) if r > -1 else 0.0

    differ = (item for item in rules.items() if np.ptp(item[1][masks["correlation"]]) > 0)
    pairs = {name: (weight, found.credit) for name, weight in differ}
    rows: dict[str, dict[str, Any]] = {name: {} for name in (*pairs, "between halves", "perfect")}
    pairs["between halves"] = (found.halves[0], found.halves[1])
    for over, mask in masks.items():
        for name, (a, b) in pairs.items():
            again = [correlation(a[index], b[index], mask[index]) for index in drawn]
            found_here = correlation(a, b, mask), _ends(np.array(again))
            rows[name] |= dict(zip((over, f"{over}_interval"), found_here, strict=True))
        half, ends = (rows["between halves"][key] for key in (over, f"{over}_interval"))
        rows["perfect"] |= {over: perfect(half), f"{over}_interval": [perfect(x) for x in ends]}
    return rows


def _resamples(groups: int, seed: int) -> np.ndarray:
    """[resamples, P]: the prompts of each."""
    return np.random.default_rng(seed).integers(0, groups, (_RESAMPLES, groups))


def _ends(x: np.ndarray) -> list[float]:
    if np.isnan(x).all():
        return [np.nan, np.nan]
    return [float(v) for v in np.nanquantile(x, [0.025, 0.975])]


# --- the command ------------------------------------------------------------------------------------------------------


def measure_credit(
    config: Config,
    data: str,
    *,
    methods: Sequence[str],
    prompts: int,
    continuations: int,
    limit: int | None,
    output: str | None,
) -> int:
    """Measures and writes credit.json and credit.png; prints tables. UserError for what cannot be measured.

    `rollout.group_size` completions of each of `prompts` prompts, drawn by the config's seed from the first `limit` records
    of `data`, `continuations` of each of their states, and the methods whose token weights are held against the credits.
    `output` None: `credit/` in the run's folder, for other models in the config's output folder.
    """
    if continuations < 4:
        raise UserError(f"--continuations {continuations}: four are the least; 32 say something")
    if prompts < 2:
        raise UserError(f"--prompts {prompts}: an interval over prompts needs at least 2")
    arms = make_arms(config, methods, groups=prompts)
    opened = open_data(config, data, limit, prompts)
    chosen, key = opened.choose(prompts, config.seed), jax.random.key(config.seed)
    say(f"sampling {config.rollout.group_size} completions of each of {prompts} prompts")
    scored = make_draw(opened)(chosen, key)
    states = find_states(scored.rollout)
    if not states.prefix:
        raise UserError(
            f"all tokens of {scored.reward.size} completions are certain, so none decides anything; take another policy, or "
            "raise --prompts"
        )
    say(f"sampling {continuations} continuations of each of {len(states.prefix)} states")
    rewards = make_continue(opened, chosen, continuations, jax.random.fold_in(key, 1))(states)
    found = credit(states, rewards)
    if not found.credit.any():
        raise UserError(
            f"all {continuations} continuations of each of {len(states.prefix)} states have the same reward, so no token decides "
            "anything; raise --prompts or --continuations, or take a policy with a format of its own"
        )
    report = {"model": config.model.source, "data": data, "prompts": prompts}
    report |= {"group_size": config.rollout.group_size, "continuations": continuations}
    weight = {arm.name: arm(scored, opened.policy.tokenizer)[0] for arm in arms}
    report |= summarise(found, scored, weight, config.seed)
    report["completions"] = token_lines(found, scored, opened)
    report["states"] = len(states.prefix)
    say(f"\n{tables(report)}\n")
    if is_first_process():
        paths = write(report, result_folder(config, output, "credit"))
        say(f"written: {', '.join(map(str, paths))}")
    return 0


def make_continue(opened: Opened, prompts: Prompts, count: int, rng: jax.Array) -> Continue:
    """The rewards of `count` continuations of each state, with as many tokens as its completion had left."""
    config, policy = opened.config, opened.policy
    most, pad_id = config.rollout.max_response_tokens, policy.tokenizer.pad_id
    asked = [row[:n] for row, n in zip(prompts.batch.tokens, prompts.batch.length, strict=True)]
    sampler = make_sampler(policy, config.rollout, count, Sampling())
    params = rollout_cast(policy)(policy.params)

    def sample(states: States, chosen: np.ndarray) -> np.ndarray:
        """float [n, count]: of some states, all of which every process has."""
        heads = [np.concatenate([asked[states.prompt[i]], states.prefix[i]]) for i in chosen]
        padded = pad(heads, bucketed(heads), pad_id)
        left = np.array([most - len(states.prefix[i]) for i in chosen])
        limits = np.repeat(left[:, None], count, axis=1).astype(np.int32)
        # the number of a state keys its draws
        batch = PromptBatch(*padded, chosen.astype(np.int32))
        drawn = sampler(params, batch, rng, 0, limits=limits)
        whole = _with_prefixes(drawn, [states.prefix[i] for i in chosen], most, pad_id)
        records = [prompts.records[states.prompt[i]] for i in chosen]
        scored, _ = score_records(whole, records, policy.tokenizer, opened.template, config.reward)
        return np.asarray(scored.reward, np.float64)

    def continue_all(states: States) -> np.ndarray:
        longest = max(map(len, states.prefix)) + int(prompts.batch.length.max())
        check_positions(policy.config, longest, most)
        rewards = np.zeros((len(states.prefix), count))
        # those of one length together
        order = np.argsort([len(x) for x in states.prefix], kind="stable")
        progress = Progress(len(order), unit="state")
        for start in range(0, len(order), _AT_ONCE):
            chosen = order[start : start + _AT_ONCE]
            rewards[chosen] = sample(states, chosen)
            progress.update(start + len(chosen), f"{count} continuations")
        progress.close()
        return rewards

    return continue_all


def _with_prefixes(
    drawn: RolloutBatch, prefixes: Sequence[np.ndarray], most: int, pad_id: int
) -> RolloutBatch:
    """The completions that the prefixes and what was drawn behind them make; only ids and lengths mean something."""
    shape = (*drawn.response_length.shape, most)
    ids, length = np.full(shape, pad_id, np.int32), np.array(drawn.response_length)
    for i, prefix in enumerate(prefixes):
        left = most - len(prefix)
        ids[i, :, : len(prefix)] = prefix
        ids[i, :, len(prefix) :] = drawn.responses[i, :, :left]
        length[i] += len(prefix)
    nothing = np.zeros(shape, np.float32)
    return dataclasses.replace(
        drawn, responses=ids, response_length=length, logp=nothing, entropy=nothing, gini=nothing
    )


def summarise(
    found: Credit, scored: ScoredBatch, rules: Mapping[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """What credit.json has of a measurement, but for where it was made and single tokens."""
    return {
        "variance": totals(found, np.asarray(scored.reward, np.float64)),
        "tokens": int(scored.rollout.response_length.sum()),
        "uncertain": int(found.uncertain.sum()),
        "regions": region_rows(found, scored.region),
        "rules": rank_rows(found, scored.region, rules, seed),
    }


def token_lines(found: Credit, scored: ScoredBatch, opened: Opened) -> list[dict[str, Any]]:
    """Every completion with its tokens: text, region, credit and its standard error (None: it was certain)."""
    tokenizer, r = opened.policy.tokenizer, scored.rollout
    lines = []
    for p, g in np.ndindex(*scored.reward.shape):
        own = (p, g, slice(0, int(r.response_length[p, g])))
        lines.append(
            {
                "prompt": p,
                "reward": float(scored.reward[p, g]),
                "text": [tokenizer.text([i]) for i in r.responses[own].tolist()],
                "region": [Region(x).name.lower() for x in scored.region[own]],
                "credit": found.credit[own].tolist(),
                "error": np.where(found.uncertain[own], found.error[own], np.nan).tolist(),
            }
        )
    return lines


def tables(report: Mapping[str, Any]) -> str:
    """Shares by region and rank correlations of rules as text, with what they rest on."""
    by_region: list[list[Any]] = [["region", "tokens", "share", "+-", "95 %", "a token / mean"]]
    for name, row in report["regions"].items():
        share, error = (in_words("{:.1%}", row[key]) for key in ("share", "share_error"))
        ends = in_words("{:.1%} to {:.1%}", *row["share_interval"])
        by_region.append([name, row["tokens"], share, error, ends, row["per_token"]])
    by_rule: list[list[Any]] = [["rule", "rank correlation", "95 %", "of uncertain tokens", "95 %"]]
    for name, row in report["rules"].items():
        cells = []
        for over in ("correlation", "uncertain"):
            cells += [row[over], in_words("{:.3f} to {:.3f}", *row[f"{over}_interval"])]
        by_rule.append([name, *cells])
    sums = {
        key: f"{value['mean']:.4g} +- {value['error']:.2g}"
        for key, value in report["variance"].items()
    }
    continued = sums.pop("continued")
    return "\n\n".join(
        [
            summary_table(by_region),
            summary_table(by_rule),
            f"variance of the reward of a prompt: {'; '.join(f'{key} {value}' for key, value in sums.items())}\n"
            f"rewards of the continuations of a completion's states less its own: {continued}\n"
            f"{report['uncertain']} of {report['tokens']} tokens were uncertain; {report['states']} states x "
            f"{report['continuations']} continuations",
        ]
    )


def write(report: dict[str, Any], folder: Location) -> list[epath.Path]:
    """Writes both files, each atomically, over those of an earlier measurement; returns their paths."""
    path = write_result(report, folder, JSON_FILE)
    figure = plotting.new_figure(9, 3.4)
    axes = figure.subplots()
    regions = report["regions"]
    at = np.arange(len(regions))
    share = np.array([row["share"] for row in regions.values()])
    ends = np.array([row["share_interval"] for row in regions.values()])
    tokens = np.array([row["tokens"] for row in regions.values()]) / report["tokens"]
    whiskers = np.nan_to_num(np.maximum([share - ends[:, 0], ends[:, 1] - share], 0))
    axes.bar(at - 0.2, share, 0.4, yerr=whiskers, capsize=3, label="of the reward's variance, 95 %",
             color=[plotting.REGION_COLOURS[name] for name in regions])  # fmt: skip
    axes.bar(at + 0.2, tokens, 0.4, label="of the tokens", color=plotting.LIGHT)
    axes.set_xticks(at, list(regions))
    axes.set_title("What decides the reward: share by region", fontsize="medium")
    axes.legend(fontsize="small")
    plotting.tidy(axes)
    return [path, plotting.save(figure, path.parent / PICTURE)]
