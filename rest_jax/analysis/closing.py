"""What a run prints when it has ended: its first, best and last evaluation with intervals, what it took, where to look next."""

from collections.abc import Mapping
from typing import Any

from rest_jax import config as config_lib
from rest_jax.distributed import is_first_process
from rest_jax.files import Location, as_path, is_url
from rest_jax.run.metrics import CONFIG_FILE, METRICS, is_eval, shown_value, summary_table
from rest_jax.run.progress import duration
from rest_jax.terminal import print_fields
from rest_jax.texts import print_text

# An evaluation is better when the first of these that it has is greater.
_HEADLINES = ("eval/exact", "eval/api_bank/strict", "eval/reward")
_LEFT_OUT = (
    "_std",
    "/prompts",
    "/prompts_without_calls",
    "/items",
)  # ends of names: what figures are of
_TIMES = {"sampling": "time/rollout", "updates": "time/update", "evaluation": "time/eval",
          "checkpoints": "time/checkpoint"}  # fmt: skip


def print_closing_table(folder: Location) -> None:
    """Prints it, and draws the curves of the run. In the first process; the others do nothing."""
    if not is_first_process():
        return
    # matplotlib takes a second to import, which the start of a run need not wait for
    from rest_jax.analysis.page import intervals
    from rest_jax.analysis.report import read_series, write_curves

    series = read_series(folder)
    config = config_lib.load([as_path(folder) / CONFIG_FILE])
    if any(map(is_eval, series)):
        print_text(f"\n{evaluation_table(series, intervals(series, config.model_dump()))}\n")
    # beside the run, where whatever keeps the runs out of version control keeps it out, too
    out = "OUT" if is_url(folder) else f"{folder}-exported"
    commands = f"rest-jax report {folder}, rest-jax export {folder} {out}, rest-jax chat {folder}"
    rows = [*_training(series), ("curves", str(write_curves(folder))), ("next", commands)]
    print_fields(rows)


def evaluation_table(series: Mapping[str, Any], ends: Mapping[str, Any]) -> str:
    """The first, the best and the last evaluation of a run; `ends` are the 95 % intervals of `page.intervals`."""
    names = [n for n in METRICS if n in series and is_eval(n) and not n.endswith(_LEFT_OUT)]
    headline = next((n for n in _HEADLINES if n in series), names[0])
    steps, values = series[headline]
    best = max(range(len(values)), key=values.__getitem__)
    chosen = sorted({0, best, len(values) - 1})
    labels = [
        f"step {steps[i]}{' (best)' if i == best and len(chosen) > 1 else ''}" for i in chosen
    ]
    rows = [["held out, 95 % interval", *labels, "what it is"]]
    for name in names:
        of_step = dict(zip(series[name].steps, range(len(series[name].steps)), strict=True))
        cells = [
            _cell(name, series[name].values, ends.get(name), of_step.get(steps[i])) for i in chosen
        ]
        rows.append([name, *cells, METRICS[name].meaning])
    return summary_table(rows)


def _cell(name: str, values: Any, ends: Any, i: int | None) -> str:
    """A value with its interval."""
    value = shown_value(name, None if i is None else values[i])
    if i is None or ends is None:
        return value
    return f"{value} ({' to '.join(shown_value(name, end[i]) for end in ends)})"


def _training(series: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the training itself came to: reward or loss, tokens, time."""
    rows = []
    for label, name in (("reward", "reward/mean"), ("loss", "update/loss")):
        if name in series:
            values = series[name].values
            first, last = (shown_value(name, values[i]) for i in (0, -1))
            said = f"{first} in the first step, {last} in the last, of {len(values)}, each on prompts of its own"
            rows.append((label, said))
            break
    for name, what in (("rollout/tokens", "sampled"), ("update/tokens", "trained on")):
        if name in series:
            rows.append(("tokens", f"{sum(series[name].values):,.0f} {what}"))
            break
    spent = {label: sum(series[n].values) for label, n in _TIMES.items() if n in series}
    total = sum(
        sum(series[n].values) for n in ("time/step", "time/eval", "time/checkpoint") if n in series
    )
    parts = ", ".join(f"{label} {duration(s)}" for label, s in spent.items())
    return [*rows, ("time", f"{duration(total)} ({parts})")]
