"""One-step gain: how far a method's gradient of one batch leads towards a higher reward, of the same batch for all methods.

    gain(g) = <g, grad J> / |g|        the slope of the expected reward J along the unit step that plain gradient ascent takes
    of a first Adam step: the same of sign(g), which is what Adam makes of its first gradient

    cosine     of g to the gradient of uniform weights of the same batch: whether a method takes another direction at all

grad J is the leave-one-out REINFORCE gradient (1 / P G) sum_i (R_i - mean_j!=i R_j) grad log pi(y_i) of an independent, larger
sample (Kool et al. 2019; unbiased). It is measured in parts, so that intervals hold its noise as well as that of the batches.

`measure_gain` is the command `rest-jax gain MODEL DATA`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from rest_jax.analysis import plotting
from rest_jax.analysis.arms import UNIFORM, make_arms
from rest_jax.analysis.draws import Opened, make_draw, open_data
from rest_jax.analysis.measured import in_words, result_folder, write_result
from rest_jax.config import Config
from rest_jax.distributed import is_first_process, say
from rest_jax.errors import UserError
from rest_jax.files import Location
from rest_jax.models.decoder import Decoder
from rest_jax.rl.logprobs import PassSpec, response_logprobs
from rest_jax.rl.packing import (
    BatchLengths,
    Packing,
    assign_minibatches,
    make_rows,
    plan_microbatches,
)
from rest_jax.run.metrics import summary_table
from rest_jax.run.progress import Progress
from rest_jax.types import Params, ResponseBatch, RolloutBatch, Sampling, ScoredBatch

PARTS = 8  # of the sample that grad J is measured on
JSON_FILE, PICTURE = "gain.json", "gain.png"
_RESAMPLES = 2000
_MOST_FLOATS = 2**29  # of the gradients that exist at once
_QUANTITIES = ("gain", "adam")

# (coefficients [K P G T], rollout) -> K gradients of sum_t c_t log pi(a_t), one after another
Ascend = Callable[[np.ndarray, RolloutBatch], Iterator[Params]]


def make_ascend(decoder: Decoder, params: Params, config: Config) -> Ascend:
    """Gradients at `params`, in micro-batches of `train.max_tokens_per_microbatch` positions."""
    chunk, packing = config.loss.vocab_chunk, Packing(1, config.train.max_tokens_per_microbatch)
    size = sum(x.size for x in jax.tree.leaves(params))
    at_once = max(1, _MOST_FLOATS // size)

    @jax.jit
    def gradients(params, coefficient, batch, rows):
        def logp(params):
            return response_logprobs(decoder, params, batch, rows, PassSpec(Sampling(), chunk))[0]

        _, pull = jax.vjp(logp, params)
        # Not several at once: that is slower on a CPU, and there XLA's YNN fusions (jaxlib 0.10.2) get the gradient through
        # attention over several blocks wrong for all but the first.
        return jax.lax.map(lambda c: pull(c)[0], coefficient)

    def ascend(coefficient: np.ndarray, rollout: RolloutBatch) -> Iterator[Params]:
        batch = ResponseBatch(
            rollout.prompt, rollout.prompt_length, rollout.responses, rollout.response_length
        )
        lengths, minibatch = BatchLengths.of(rollout), assign_minibatches(len(rollout.prompt), 1)
        for start in range(0, len(coefficient), at_once):
            own, total = coefficient[start : start + at_once], None
            active = np.any(own != 0, axis=(0, 2, 3))
            for micro_batch in plan_microbatches(lengths, minibatch, active, packing)[0]:
                found = gradients(params, own, batch, make_rows(micro_batch))
                total = found if total is None else jax.tree.map(jnp.add, total, found)
                # XLA's devices on a CPU share threads, and programs with collectives that run at once take each other's
                jax.block_until_ready(total)
            for k in range(len(own)):
                if total is None:
                    yield jax.tree.map(jnp.zeros_like, params)
                else:
                    yield jax.block_until_ready(_select(total, k))

    return ascend


def reinforce(reward: np.ndarray) -> np.ndarray:
    """Coefficients of grad J, float32 [P, G]: (R_i - mean of the others) / (P G), from rewards [P, G]."""
    group = reward.shape[1]
    return (
        group / (group - 1) * (reward - reward.mean(axis=1, keepdims=True)) / reward.size
    ).astype(np.float32)


@jax.jit
def _select(gradients: Params, k: int) -> Params:
    """The k-th of gradients, in one program: one for each array would be as many with collectives under way at once."""
    return jax.tree.map(lambda x: x[k], gradients)


@jax.jit
def _compare(
    gradient: Params, first: Params, parts: list[Params]
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """((gain, Adam's) along each part of grad J, float32 [M] each, cosine to the first gradient)."""
    return _along(gradient, parts), _cosine(first, gradient)


def _along(gradient: Params, parts: list[Params]) -> tuple[jax.Array, jax.Array]:
    """Zero for a gradient of zero."""
    sign = jax.tree.map(jnp.sign, gradient)

    def slope(step: Params) -> jax.Array:
        norm = optax.tree.norm(step)
        along = jnp.stack([optax.tree.vdot(step, part) for part in parts])
        return jnp.where(norm > 0, along / jnp.where(norm > 0, norm, 1.0), 0.0)

    return slope(gradient), slope(sign)


def _cosine(one: Params, other: Params) -> jax.Array:
    """float32; NaN where a gradient is zero."""
    norms = optax.tree.norm(one) * optax.tree.norm(other)
    return jnp.divide(optax.tree.vdot(one, other), norms)


class Measured(NamedTuple):
    """Of each arm and batch."""

    slopes: np.ndarray  # float64 [2 quantities, arms, batches, PARTS]
    cosine: np.ndarray  # float64 [arms, batches], to the first arm


def measure(
    ascend: Ascend,
    draw: Callable[[int, int], ScoredBatch],
    weigh: Callable[[ScoredBatch], np.ndarray],
    batches: int,
    size: int,
) -> Measured:
    """`draw(prompts, number)`: an independent batch; `weigh`: the coefficients [arms, P, G, T] of one; `size`: prompts of the
    sample for grad J.
    """
    parts, slopes, cosines = [], [], []
    progress = Progress(PARTS + batches, unit="batch")
    for m in range(PARTS):
        scored = draw(-(-size // PARTS), m)
        each = np.broadcast_to(reinforce(scored.reward)[None, ..., None], (1, *scored.region.shape))
        parts += list(
            ascend(np.where(scored.region != 0, each, 0.0).astype(np.float32), scored.rollout)
        )
        progress.update(m + 1, "grad J")
    for b in range(batches):
        scored = draw(0, PARTS + b)
        coefficient = weigh(scored)
        # arms may be equal: placebos of the same range, a method and its ablation at the start of the curriculum
        keys = [own.tobytes() for own in coefficient]
        firsts = [k for k, key in enumerate(keys) if keys.index(key) == k]
        gradients = ascend(coefficient[firsts], scored.rollout)
        first, compared = None, {}
        for k, gradient in zip(firsts, gradients, strict=True):
            first = gradient if first is None else first
            compared[keys[k]] = jax.device_get(_compare(gradient, first, parts))
        along, cosine = zip(*(compared[key] for key in keys), strict=True)
        slopes.append(along)
        cosines.append(cosine)
        progress.update(PARTS + b + 1, f"{len(coefficient)} arms, {len(firsts)} of them distinct")
    progress.close()
    return Measured(
        np.array(slopes, np.float64).transpose(2, 1, 0, 3), np.array(cosines, np.float64).T
    )


def gain_rows(
    found: Measured, names: Sequence[str], seed: int, placebo_of: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Of each arm and quantity the mean slope and how it compares with that of the first arm, less one, with a 95 % interval
    (bootstrap over batches and parts of grad J, both arms on the same resamples); the mean cosine to the first arm over the
    batches in which both have a gradient. NaN where the first arm's own slope is not shown to be above zero, or where there is
    no such batch.

    `placebo_of`: placebo -> its method, both in `names`. A placebo's row has the lead of its method over it besides, in the unit
    of the comparison with the first arm, on the same resamples.
    """
    _, _, batches, parts = found.slopes.shape
    rng = np.random.default_rng(seed)
    b = rng.integers(0, batches, (_RESAMPLES, batches))
    m = rng.integers(0, parts, (_RESAMPLES, parts))
    known = np.isfinite(found.cosine)
    with np.errstate(invalid="ignore"):
        cosine = np.where(known, found.cosine, 0.0).sum(axis=1) / known.sum(axis=1)
    cosines = zip(names, cosine, strict=True)
    rows: dict[str, dict[str, Any]] = {name: {"cosine": cosine} for name, cosine in cosines}
    for quantity, values in zip(_QUANTITIES, found.slopes, strict=True):
        mean = values.mean((1, 2))
        again = np.stack(
            [values[:, b[i]][:, :, m[i]].mean((1, 2)) for i in range(_RESAMPLES)], axis=1
        )  # [arms, resamples]
        upwards = np.quantile(again[0], 0.025) > 0
        first = (mean[0], again[0]) if upwards else (np.nan, np.nan)
        relative, resampled = mean / first[0] - 1, again / first[1] - 1
        for k, name in enumerate(names):
            rows[name] |= {
                quantity: mean[k],
                f"{quantity}_interval": np.quantile(again[k], [0.025, 0.975]),
                f"{quantity}_relative": relative[k],
                f"{quantity}_relative_interval": np.quantile(resampled[k], [0.025, 0.975]),
            }
        for placebo, method in (placebo_of or {}).items():
            k, own = names.index(placebo), names.index(method)
            rows[placebo] |= {
                "placebo_of": method,
                f"{quantity}_lead": relative[own] - relative[k],
                f"{quantity}_lead_interval": np.quantile(
                    resampled[own] - resampled[k], [0.025, 0.975]
                ),
            }
    return rows


# --- the command ------------------------------------------------------------------------------------------------------


def measure_gain(
    config: Config,
    data: str,
    *,
    methods: Sequence[str],
    placebos: Sequence[str],
    batches: int,
    prompts: int,
    reference: int,
    limit: int | None,
    output: str | None,
) -> int:
    """Measures and writes gain.json and gain.png; prints a table. UserError for what cannot be measured.

    `batches` batches of `prompts` prompts, and `reference` prompts for grad J, each with `rollout.group_size` completions, all
    drawn by the config's seed from the first `limit` records of `data`. `output` None: `gain/` in the run's folder, for other
    models in the config's output folder.
    """
    for name, value in (("--batches", batches), ("--prompts", prompts)):
        if value < 2:
            raise UserError(f"{name} {value}: an interval needs at least 2")
    arms = make_arms(config, [UNIFORM, *methods], placebos, prompts)
    least, option = max(
        (prompts, "--prompts"), (-(-reference // PARTS), f"--reference {reference}")
    )
    opened = open_data(config, data, limit, least, option)
    # all devices compute one row together, which is not how the attention kernel is split
    decoder = Decoder(dataclasses.replace(opened.policy.config, attention="blocks"))
    ascend = make_ascend(decoder, opened.policy.params, config)
    tokenizer = opened.policy.tokenizer

    def weigh(scored: ScoredBatch) -> np.ndarray:
        return np.stack([arm(scored, tokenizer)[1] for arm in arms])

    found = measure(ascend, _drawer(opened, prompts), weigh, batches, reference)
    report = {"model": config.model.source, "data": data, "batches": batches, "prompts": prompts}
    report |= {"group_size": config.rollout.group_size, "reference": reference, "parts": PARTS}
    placebo_of = {arm.name: arm.placebo_of for arm in arms if arm.placebo_of is not None}
    report["arms"] = gain_rows(found, [arm.name for arm in arms], config.seed, placebo_of)
    report |= {"slopes": found.slopes, "cosines": found.cosine}
    if not any(row["gain"] for row in report["arms"].values()):
        raise UserError(
            f"no batch of {prompts} prompts has a group whose rewards differ, so there is no gradient to measure; raise "
            "--prompts or rollout.group_size, or take a policy with a format of its own"
        )
    say(f"\n{table(report)}\n")
    if is_first_process():
        paths = write(report, result_folder(config, output, "gain"))
        say(f"written: {', '.join(map(str, paths))}")
    return 0


def _drawer(opened: Opened, prompts: int) -> Callable[[int, int], ScoredBatch]:
    """(prompts, number) -> the batch of that number; 0 prompts: as many as a batch has."""
    sample, seed = make_draw(opened), opened.config.seed
    key = jax.random.key(seed)

    def draw(count: int, number: int) -> ScoredBatch:
        chosen = opened.choose(count or prompts, (seed, number))
        return sample(chosen, jax.random.fold_in(key, number))

    return draw


def table(report: dict[str, Any]) -> str:
    """Gains by arm as text, the largest first, and the leads of methods over their placebos."""
    heads = ("arm", "gain", "against uniform", "95 %", "first Adam step", "95 %", "cosine")
    rows: list[list[Any]] = [[*heads]]
    leads: list[list[Any]] = [["lead over a placebo", *heads[2:-1]]]

    ordered = sorted(report["arms"].items(), key=lambda item: -item[1]["gain"])
    for name, row in ordered:
        cells = [name, f"{row['gain']:.4g}", *_compared(row, "relative")]
        rows.append([*cells, in_words("{:.3f}", row["cosine"])])
    for name, row in report["arms"].items():
        if "placebo_of" in row:
            leads.append([name, *_compared(row, "lead")])
    tables, unknown = summary_table(rows), ""
    if np.isnan(ordered[0][1]["gain_relative"]):
        unknown = "\nthat uniform weights lead upwards is not shown, so nothing is compared with them; raise --batches"
    if len(leads) > 1:
        tables += f"\n\n{summary_table(leads)}"
    return (
        f"{tables}\n\n{report['batches']} batches of {report['prompts']} x {report['group_size']} completions; "
        f"grad J from {report['reference']} x {report['group_size']}{unknown}"
    )


def _compared(row: dict[str, Any], kind: str) -> list[str]:
    """Cells: of both quantities the value of that kind and its interval."""
    cells = []
    for quantity in _QUANTITIES:
        value, ends = row[f"{quantity}_{kind}"], row[f"{quantity}_{kind}_interval"]
        cells += [in_words("{:+.1%}", value), in_words("{:+.1%} to {:+.1%}", *ends)]
    return cells


def write(report: dict[str, Any], folder: Location) -> list[epath.Path]:
    """Writes both files, each atomically, over those of an earlier measurement; returns their paths."""
    path = write_result(report, folder, JSON_FILE)
    arms = dict(sorted(report["arms"].items(), key=lambda item: item[1]["gain"]))
    placebos = {name: row for name, row in arms.items() if "placebo_of" in row}
    arms = {name: row for name, row in arms.items() if name not in placebos}
    places = {name: k for k, name in enumerate(arms)}
    figure = plotting.new_figure(9, 1.2 + 0.28 * len(arms))
    axes = figure.subplots()
    for quantity, colour, shift, label in (
        ("gain", plotting.BLUE, 0.12, "along the gradient"),
        ("adam", plotting.ORANGE, -0.12, "first Adam step"),
    ):
        middle = np.array([row[f"{quantity}_relative"] for row in arms.values()])
        ends = np.array([row[f"{quantity}_relative_interval"] for row in arms.values()])
        whiskers = np.nan_to_num(np.maximum([middle - ends[:, 0], ends[:, 1] - middle], 0))
        axes.errorbar(
            100 * middle, np.arange(len(arms)) + shift, xerr=100 * whiskers, fmt="o", color=colour,
            label=label, capsize=2, markersize=4,
        )  # fmt: skip
        if placebos:
            axes.scatter(
                [100 * row[f"{quantity}_relative"] for row in placebos.values()],
                [places[row["placebo_of"]] + shift for row in placebos.values()],
                marker="x", s=18, color=colour, alpha=0.6, label=f"{label}, its placebos",
            )  # fmt: skip
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_xlabel("gain of one step against uniform weights, %, 95 %")
    axes.legend(fontsize="small")
    plotting.tidy(axes)
    return [path, plotting.save(figure, path.parent / PICTURE)]
