"""What share of the total weight each region holds over a run, as a table and a picture.

    python tools/weight_shares.py runs OUT.png "TITLE=RUN" ...           runs with metrics, one panel each
    python tools/weight_shares.py replay RUN OUT METHOD ...
    python tools/weight_shares.py answers MODEL DATA OUT METHOD ...      --limit 64 --max-tokens 1024

`replay` and `answers` make such runs without training, OUT/METHOD/metrics.jsonl. `replay` takes the token counts and entropies
of every step from a run of any method; normalisers within a completion count as `batch` there. For `answers` gold answers
of DATA are the batch of every step, under the entropies that MODEL has on them (OUT/answers.npz, computed once), while
progress goes from 0 to 1; prompts are in the brief form.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax import config as config_lib
from rest_jax.analysis import plotting
from rest_jax.analysis.report import read_series
from rest_jax.config import Config
from rest_jax.data.loader import TargetBatch, bucketed, pad
from rest_jax.data.tokenize import load_split, prepare_supervised
from rest_jax.errors import UserError
from rest_jax.rl import curriculum, weights
from rest_jax.rl.packing import BatchLengths
from rest_jax.rl.prepare import StepConfig
from rest_jax.rl.step import make_logprobs
from rest_jax.run.load import load_policy
from rest_jax.run.metrics import METRICS_FILE, read_lines
from rest_jax.sft import label_regions
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Region
from rest_jax.types import RolloutBatch, Sampling

STEPS = 11  # of `answers`: nu = 0, 0.1, .. 1
REGIONS = tuple(plotting.REGION_COLOURS)
# Gold answers over which the entropies are computed at once.
BATCH = 16


def answer_entropies(config: Config, limit: int) -> dict[str, np.ndarray]:
    """`region`, `entropy` and `gini` [P, 1, T] of the first gold answers that fit into `sft.max_tokens` with their prompts."""
    policy = load_policy(config.model, config.mesh)
    data, template = config.data, TEMPLATES[config.data.template]
    records = load_split(data.train, data, 4 * limit)
    prepared = prepare_supervised(records, policy.tokenizer, template, data, config.sft.max_tokens)
    schedule = curriculum.Schedule(config.weights, config.curriculum, STEPS)
    widths = bucketed(prepared.prompts), bucketed(prepared.targets)
    step = StepConfig(config.loss, schedule, Sampling(), 1, 1, config.sft.max_tokens)
    logprobs = make_logprobs(policy.decoder, step, policy.mesh)
    parts: list[tuple[np.ndarray, ...]] = []
    total = min(limit, prepared.size)
    for begin in range(0, total, BATCH):
        rows = np.arange(begin, min(begin + BATCH, total))
        prompts, prompt_length = pad(
            prepared.prompts.take(rows), widths[0], policy.tokenizer.pad_id
        )
        targets, target_length = pad(
            prepared.targets.take(rows), widths[1], policy.tokenizer.pad_id
        )
        batch = TargetBatch(prompts, prompt_length, targets, target_length, rows)
        gold = label_regions(batch, policy, data.template)
        zeros = np.zeros(gold.responses.shape, np.float32)
        rollout = RolloutBatch(
            prompt=gold.prompt,
            prompt_length=gold.prompt_length,
            responses=gold.responses,
            response_length=gold.response_length,
            logp=zeros,
            entropy=zeros,
            gini=zeros,
        )
        found = logprobs(policy.params, rollout, BatchLengths.of(rollout))
        parts.append((np.asarray(gold.region), np.asarray(found.entropy), np.asarray(found.gini)))
        print(f"{rows[-1] + 1} answers", flush=True)
    region, entropy, gini = (np.concatenate(part) for part in zip(*parts, strict=True))
    return {"region": region, "entropy": entropy, "gini": gini}


def write_answers(args: argparse.Namespace) -> None:
    """The runs of the methods over gold answers."""
    words = [f"model.source={args.model}", f"data.train={args.data}", "data.brief_prompt=true"]
    words += ["model.dtype=float32", "model.remat=none", f"sft.max_tokens={args.max_tokens}"]
    configs = load_methods(args.methods, words)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "answers.npz"
    if not file.exists():
        arrays = answer_entropies(next(iter(configs.values())), args.limit)
        with file.open("wb") as opened:
            np.savez(opened, allow_pickle=False, **arrays)
    arrays = np.load(file)
    region, entropy, gini = (jnp.asarray(arrays[n]) for n in ("region", "entropy", "gini"))
    stats = weights.region_stats(region, entropy, gini)
    print({r: round(float(stats.entropy[Region[r.upper()]]), 4) for r in REGIONS}, "nats")
    for method, config in configs.items():
        schedule = curriculum.Schedule(config.weights, config.curriculum, STEPS - 1)
        state, lines = curriculum.init(schedule), []
        for step in range(1, STEPS + 1):
            state = curriculum.update(state, stats, jnp.float32(1.0), schedule)
            weight = weights.token_weights(region, state.weight, schedule.normalizer)
            _, share = weights.realised(region, weight)
            lines.append(as_line(step, share))
        write_lines(args.out / method, lines)


def write_replays(args: argparse.Namespace) -> None:
    """The runs of the methods over the steps of another run."""
    recorded = read_lines(args.run / METRICS_FILE)
    recorded = [line for line in recorded if "region/name/count" in line]
    for method, config in load_methods(args.methods, ["model.source=none"]).items():
        schedule = curriculum.Schedule(config.weights, config.curriculum, len(recorded))
        state, lines = curriculum.init(schedule), []
        update = jax.jit(curriculum.update, static_argnums=3)
        for line in recorded:
            columns = (
                jnp.array([0.0, *(line[f"region/{r}/{kind}"] for r in REGIONS)], jnp.float32)
                for kind in ("entropy", "gini", "count")
            )
            stats = weights.RegionStats(*columns)
            score = jnp.float32(line["reward/format_score"])
            state = update(state, stats, score, schedule)
            total = state.weight * stats.count
            lines.append(as_line(line["step"], total / total.sum()))
        write_lines(args.out / method, lines)


def load_methods(methods: list[str], words: list[str]) -> dict[str, Config]:
    """The config of each method."""
    return {m: config_lib.load([f"method/{m}"], [*words, f"name={m}"]) for m in methods}


def as_line(step: int, share: jax.Array) -> str:
    """A line of metrics, from the shares [R]."""
    shares = {f"region/{r}/weight_share": float(share[Region[r.upper()]]) for r in REGIONS}
    return json.dumps({"step": step} | shares) + "\n"


def write_lines(folder: pathlib.Path, lines: list[str]) -> None:
    """The metrics of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(lines))


def read_shares(run: pathlib.Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """(steps, share of the total weight of each region at them)."""
    series = read_series(run)
    shares = {r: np.array(series[f"region/{r}/weight_share"].values) for r in REGIONS}
    return series["region/name/weight_share"].steps, shares


def write_runs(args: argparse.Namespace) -> None:
    """Table on stdout: means of the first, middle and last tenth of the steps; picture: all steps."""
    runs = {}
    for named in args.runs:
        title, _, run = named.rpartition("=")
        runs[title] = read_shares(pathlib.Path(run))
    print("| run | " + " | ".join(REGIONS) + " |\n| --- |" + " --- |" * len(REGIONS))
    columns = min(args.columns, len(runs))
    height = -(-len(runs) // columns)
    figure = plotting.new_figure(4.2 * columns, 2.9 * height)
    panels = figure.subplots(height, columns, squeeze=False, sharey=True).flat
    for axes, (title, (steps, shares)) in zip(panels, runs.items(), strict=False):
        part = max(len(steps) // 10, 1)
        middle = (len(steps) - part) // 2
        parts = slice(0, part), slice(middle, middle + part), slice(-part, None)
        cells = (
            " -> ".join(f"{100 * values[third].mean():.1f}" for third in parts)
            for values in shares.values()
        )
        print(f"| {title} | " + " | ".join(cells) + " |")
        colours = list(plotting.REGION_COLOURS.values())
        axes.stackplot(steps, *shares.values(), colors=colours, labels=REGIONS)
        plotting.label_steps(axes, title, "share of the total weight")
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(0, 1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(REGIONS), fontsize="small")
    plotting.save(figure, args.out)


def main(words: list[str]) -> int:
    """The command line; 2 on input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("runs", help="table and picture of runs")
    runs.add_argument("out", type=pathlib.Path)
    runs.add_argument("runs", nargs="+", metavar="TITLE=RUN")
    runs.add_argument("--columns", type=int, default=2)
    runs.set_defaults(call=write_runs)
    replay = commands.add_parser("replay", help="runs over the steps of a run, without training")
    replay.add_argument("run", type=pathlib.Path)
    replay.add_argument("out", type=pathlib.Path)
    replay.add_argument("methods", nargs="+", metavar="METHOD")
    replay.set_defaults(call=write_replays)
    answers = commands.add_parser("answers", help="runs over gold answers, without training")
    answers.add_argument("model")
    answers.add_argument("data")
    answers.add_argument("out", type=pathlib.Path)
    answers.add_argument("methods", nargs="+", metavar="METHOD")
    answers.add_argument("--limit", type=int, default=64)
    answers.add_argument("--max-tokens", type=int, default=1024)
    answers.set_defaults(call=write_answers)
    args = parser.parse_args(words)
    try:
        args.call(args)
    except UserError as error:
        print(f"weight_shares: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
