"""A measurement of gradient variance as text tables, as JSON and as a figure.

In: what `measure.measure_batch` returns, with the names `model` and `data`; variance.json holds all of it.
"""

from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from rest_jax.analysis import plotting
from rest_jax.analysis.measured import write_result
from rest_jax.files import Location
from rest_jax.run.metrics import summary_table

JSON_FILE, PICTURE = "variance.json", "variance.png"
_REGION_COLUMNS = {
    "tokens": "tokens",
    "entropy": "H",
    "gini": "1-sum p^2",
    "bound": "1-exp(-H)",
    "sampled": "sampled",
    "largest_ratio": "largest ratio",
    "violations": "violations",
    "gradient_square": "|grad|^2",
    "beta": "beta",
    "beta_error": "+-",
    "score": "E|J's|^2",
    "score_error": "+-",
}
_RULE_COLUMNS = {
    "bound": "bound",
    "variance": "variance",
    "mean_square": "|grad|^2",
    "share": "noise share",
    "noise_scale": "noise scale",
    "cosine": "cosine",
    "relative": "share / uniform",
}


def variance_tables(report: dict[str, Any]) -> str:
    """Tables by region, of the weights by rule and by rule, then two lines on what they rest on."""
    regions, rules, overall = report["regions"], report["rules"], report["overall"]
    every = overall | {"gradient_square": rules["uniform"]["mean_square"]}
    by_region: list[list[Any]] = [["region", *_REGION_COLUMNS.values()]]
    for name, row in (regions | {"all": every}).items():
        by_region.append([name, *(row.get(key) for key in _REGION_COLUMNS)])
    weights: list[list[Any]] = [["mean weight", *regions]]
    by_rule: list[list[Any]] = [["rule", *_RULE_COLUMNS.values(), "95 %"]]
    for name, row in rules.items():
        weights.append([name, *(row["weights"].get(region) for region in regions)])
        ends = ("-" if v is None else f"{v:.4g}" for v in row["relative_interval"])
        by_rule.append([name, *(row[key] for key in _RULE_COLUMNS), " to ".join(ends)])
    how = "exact gradients" if report["exact_gradients"] else "count sketches of the gradients"
    holds = "IS BROKEN" if overall["violations"] else "holds"
    last = (
        f"1 - sum p^2 <= 1 - exp(-H) {holds}: {overall['violations']} of {overall['tokens']} tokens above it by more than "
        f"{report['tolerance']:g}\n"
        f"{report['prompts']} prompts x {report['group_size']} completions, {report['groups_with_advantage']} groups with "
        f"advantage; {how}, {report['gradient_dimensions']} numbers each"
    )
    return "\n\n".join([*map(summary_table, (by_region, weights, by_rule)), last])


def write_variance(report: dict[str, Any], folder: Location) -> list[epath.Path]:
    """Writes both files, each atomically, over those of an earlier measurement; returns their paths."""
    path = write_result(report, folder, JSON_FILE)
    return [path, plotting.save(draw_variance(report), path.parent / PICTURE)]


def draw_variance(report: dict[str, Any]) -> Figure:
    """Lemma 2 and beta by region above, weights and noise by rule below."""
    figure = plotting.new_figure(12, 7.6)
    figure.suptitle(f"{report.get('model', '')}   {report.get('data', '')}".strip())
    (inequality, beta), (weights, noise) = figure.subplots(2, 2)
    regions, rules = report["regions"], report["rules"]
    every = regions | {"all": report["overall"]}
    _points(inequality, every, "gini", "1 - sum p²", plotting.BLUE, -0.1)
    _points(inequality, every, "bound", "1 - exp(-H)", plotting.ORANGE, 0.1)
    _points(inequality, every, "sampled", "|onehot(a) - p|² sampled, ±2 s.e.", plotting.BLACK, -0.2)
    _finish(inequality, every, "Second moment of the score and its bound, mean by region")
    _points(beta, regions, "beta", "beta = E |J|² (1 - exp(-H)), ±2 s.e.", plotting.VERMILION, -0.1)
    _points(beta, regions, "score", "E |Jᵀs|², ±2 s.e.", plotting.GREEN, 0.1)
    _finish(beta, regions, "Squared gradient of a token's log-prob, and beta", "log")
    for i, (name, row) in enumerate(rules.items()):
        heights = [row["weights"].get(region, np.nan) for region in regions]
        at = np.arange(len(regions)) + 0.8 * (i / len(rules) - 0.4)
        weights.plot(at, heights, "o", label=name, color=plotting.PALETTE[i], markersize=5)
    _finish(weights, regions, "Mean weight by region (all weights sum to the tokens)", "log")
    uniform = rules["uniform"]["variance"]
    relative = {name: row | {"variance": row["variance"] / uniform} for name, row in rules.items()}
    _points(noise, relative, "relative", "variance / |gradient|², 95 % over groups", plotting.BLUE)
    _points(noise, relative, "variance", "variance alone", plotting.GREY, 0.1, "x")
    _points(noise, relative, "bound", "Theorem 1's bound on the variance", plotting.GREY, 0.2, "D")
    _finish(noise, rules, "Noise of the mini-batch gradient, uniform = 1")
    for axes in (weights, noise):
        axes.axhline(1.0, color="0.6", linewidth=0.8)
    return figure


def _points(
    axes: Any, rows: dict[str, Any], key: str, label: str, colour: str, shift: float = 0.0, mark="o"
) -> None:
    """One point a row, with its `<key>_interval` or twice its `<key>_error` as whiskers where it has them."""
    value, low, high = np.full((3, len(rows)), np.nan)
    for i, row in enumerate(rows.values()):
        value[i] = np.nan if row[key] is None else row[key]
        if f"{key}_interval" in row:
            low[i], high[i] = (np.nan if v is None else v for v in row[f"{key}_interval"])
        elif row.get(f"{key}_error") is not None:
            error = 2 * row[f"{key}_error"]
            # on a log axis the lower whisker ends above zero
            low[i], high[i] = max(value[i] - error, 0.1 * value[i]), value[i] + error
    whiskers = np.maximum([value - low, high - value], 0)
    axes.errorbar(
        np.arange(len(rows)) + shift, value, whiskers, fmt=mark, color=colour, label=label,
        capsize=3, markersize=5,
    )  # fmt: skip


def _finish(axes: Any, names: dict[str, Any], title: str, scale: str = "linear") -> None:
    axes.set_xticks(range(len(names)), list(names))
    axes.set_yscale(scale)
    if scale == "linear":
        # the upper part is for the legend
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small", loc="upper left" if scale == "linear" else "best")
    plotting.tidy(axes)
