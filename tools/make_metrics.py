"""Writes docs/metrics.md, the page of every metric that a run writes: python tools/make_metrics.py

Names, units and meanings are those of the table in `rest_jax/run/metrics.py`, to which runs are held: a name that it
does not have is refused when it is written, and a slow test has every name written by some run (tests/run/test_metric_names.py).
"""

import argparse
import pathlib
from collections.abc import Iterator

from rest_jax.run.metrics import METRICS, REGION_NAMES

# What a prefix is about; every one has a section, in the order of the lines.
PREFIXES = {
    "data": "The training records.",
    "reward": """Rewards of the completions of the step ([the method](method.md#6-rewards)), at the scale that is in force
there. Every step has prompts of its own: to see whether a policy improves, look at `eval/`. A reward of your own adds
`reward/part/NAME` for each of its parts, the mean of the part ([plug-ins](plugins.md#reward)).""",
    "rollout": """What was sampled, and by which policy. Where log-probabilities are not recomputed, the first update of the step
measures `rollout/logp_mismatch` and `rollout/ratio_max`; where none of its groups has advantage, they are absent.""",
    "update": """The optimiser updates of the step: means over them, of maxima the largest. Means over tokens (entropy, KL,
ratios, clips) are over the updates that computed any; they are absent where no group of the step has advantage.""",
    "router": """Of models with experts alone ([mixture of experts](models.md#mixture-of-experts)), of the updates that computed
any token.""",
    "region": "For each region: NAME is one of {regions} ([regions](method.md#2-regions)).",
    "curriculum": "The curriculum ([the method](method.md#5-curriculum)).",
    "eval": """Held-out prompts, greedy, in a line of their own behind that of the step, which has the same `step`, and in one
before the first step (`train.eval_before`). Rewards are at the end of the scale, so that they can be compared over a run. A
reward of your own adds `eval/part/NAME`; `eval/api_bank/` needs `evaluation.benchmarks`
([evaluation](evaluation.md#while-a-run-trains)).""",
    "time": """Values of the clock and of the memory, the only ones in which a run and its repetition differ. Of many
processes they are those of the slowest.""",
}

_HEAD = """# Metrics

Every name that a run writes, made from the table in `rest_jax/run/metrics.py` by `python tools/make_metrics.py`.

`metrics.jsonl` in the folder of a run has one JSON object a line: `step`, then values by name. A run writes those that it has:
a supervised one no rewards but those of evaluations, one without experts no `router/`. Values are of the global batch, whatever
the number of devices and processes. NaN and infinities are `null`. A fraction is between 0 and 1; what has no unit is a pure
number. `rest-jax report` makes curves of them, and [trackers](trackers.md) get the same lines. What does not begin with `time/`
is the same, bit for bit, in a run that was interrupted and resumed.
"""


def page() -> str:
    """docs/metrics.md. ValueError for a metric whose prefix has no section."""
    sections: dict[str, list[str]] = {prefix: [] for prefix in PREFIXES}
    for name, unit, meaning in _rows():
        prefix = name.partition("/")[0]
        if prefix not in sections:
            raise ValueError(f"metric {name}: say in PREFIXES what {prefix}/ is about")
        sections[prefix].append(f"| `{name}` | {unit} | {meaning.replace('|', '&#124;')} |")
    regions = ", ".join(f"`{name}`" for name in REGION_NAMES)
    lines = [_HEAD]
    for prefix, rows in sections.items():
        about = PREFIXES[prefix].replace("{regions}", regions)
        lines += [
            f"## {prefix}\n",
            f"{about}\n",
            "| metric | unit | meaning |",
            "| --- | --- | --- |",
        ]
        lines += [*rows, ""]
    return "\n".join(lines)


def _rows() -> Iterator[tuple[str, str, str]]:
    """Name, unit and meaning; of the regions, which all have the same, once."""
    first = f"region/{REGION_NAMES[0]}/"
    for name, (unit, meaning) in METRICS.items():
        if name.startswith(first):
            yield f"region/NAME/{name.removeprefix(first)}", unit, meaning
        elif not name.startswith("region/"):
            yield name, unit, meaning


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes no words
    path = pathlib.Path(__file__).parent.parent / "docs" / "metrics.md"
    path.write_text(page(), encoding="utf-8")
    print(path)
