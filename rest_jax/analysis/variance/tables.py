"""A measurement of gradient variance as tables, files and a picture. In: the dict of variance.json.

variance.csv is long: one line a value, `kind` (region or rule), `name`, `quantity`, `value`.
"""

import csv
import io
import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rest_jax.analysis.plotting import new_figure, save, tidy
from rest_jax.files import atomic_write
from rest_jax.run.metrics import summary_table

JSON_FILE, CSV_FILE, PICTURE = "variance.json", "variance.csv", "variance.png"
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73")  # Okabe and Ito

_REGION_COLUMNS = {
    "tokens": "tokens",
    "H": "entropy",
    "1-sum p^2": "gini",
    "1-exp(-H)": "bound",
    "sampled": "sampled",
    "largest ratio": "largest_ratio",
    "violations": "violations",
    "|grad|^2": "gradient_square",
    "beta": "beta",
    "+-": "beta_error",
    "E|J's|^2": "score",
    "+- ": "score_error",
}
_RULE_COLUMNS = {
    "bound": "bound",
    "variance": "variance",
    "|grad|^2": "mean_square",
    "noise share": "share",
    "noise scale": "noise_scale",
    "cosine": "cosine",
    "share / uniform": "relative",
}


def variance_tables(found: dict[str, Any]) -> str:
    """By region; weights by rule; by rule; and what the whole rests on, in two lines."""
    regions, rules = found["regions"], found["rules"]
    by_region: list[list[Any]] = [["region", *_REGION_COLUMNS]]
    by_region += [[n, *(row[k] for k in _REGION_COLUMNS.values())] for n, row in regions.items()]
    whole = found["overall"] | {"gradient_square": rules["uniform"]["mean_square"]}
    by_region.append(["all", *(whole.get(k) for k in _REGION_COLUMNS.values())])
    weights: list[list[Any]] = [["mean weight", *regions]]
    weights += [[n, *(row["weights"].get(r) for r in regions)] for n, row in rules.items()]
    by_rule: list[list[Any]] = [["rule", *_RULE_COLUMNS, "95 %"]]
    for name, row in rules.items():
        low, high = (_short(v) for v in row["relative_interval"])
        by_rule.append([name, *(row[k] for k in _RULE_COLUMNS.values()), f"{low} to {high}"])
    how = "exact gradients" if found["exact_gradients"] else "count sketches of the gradients"
    kept = "holds" if not whole["violations"] else "IS BROKEN"
    last = (
        f"1 - sum p^2 <= 1 - exp(-H) {kept}: {whole['violations']} of {whole['tokens']} tokens above it by more than "
        f"{found['tolerance']:g}\n"
        f"{found['prompts']} prompts x {found['group_size']} answers, {found['groups_with_advantage']} groups with advantage; "
        f"{how}, {found['gradient_dimensions']} numbers each"
    )
    return "\n\n".join([*map(summary_table, (by_region, weights, by_rule)), last])


def write_variance(found: dict[str, Any], folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes the three files, each whole or not at all, over those of an earlier measurement; returns their paths."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(found)
    contents = {
        JSON_FILE: json.dumps(found, indent=1, allow_nan=False) + "\n",
        CSV_FILE: _csv(found),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
    return [*(folder / name for name in contents), save(picture, folder / PICTURE)]


def draw(found: dict[str, Any]) -> Figure:
    """Lemma 2 and beta by region above, weights and noise by rule below."""
    figure = new_figure(12, 7.6)
    figure.suptitle(f"{found.get('model', '')}   {found.get('data', '')}".strip())
    (inequality, beta), (weights, noise) = figure.subplots(2, 2)
    _inequality(inequality, found["regions"] | {"all": found["overall"]})
    _beta(beta, found["regions"])
    _weights(weights, found["regions"], found["rules"])
    _noise(noise, found["rules"])
    for axes in (inequality, beta, weights, noise):
        tidy(axes)
        axes.set_axisbelow(True)
    return figure


def _inequality(axes: Any, regions: dict[str, Any]) -> None:
    place = np.arange(len(regions))  # "all" is the last
    for offset, (key, label, colour) in enumerate(
        (("gini", "1 - sum p²", COLOURS[1]), ("bound", "1 - exp(-H)", COLOURS[4]))
    ):
        heights = [row[key] for row in regions.values()]
        axes.bar(place + 0.4 * (offset - 0.5), heights, 0.4, label=label, color=colour)
    sampled = [row["sampled"] for row in regions.values()]
    errors = [2 * row["sampled_error"] for row in regions.values()]
    style = {"fmt": "o", "color": COLOURS[0], "markersize": 4, "capsize": 3}
    axes.errorbar(place - 0.2, sampled, errors, label="|onehot(a) - p|² sampled, ±2 s.e.", **style)
    axes.set_xticks(place, list(regions))
    axes.set_ylim(bottom=0)
    axes.set_title("Second moment of the score and its bound, mean by region", fontsize="medium")
    axes.legend(fontsize="small")


def _beta(axes: Any, regions: dict[str, Any]) -> None:
    place = np.arange(len(regions))
    for offset, (key, label, colour) in enumerate(
        (("beta", "beta = E |J|² (1 - exp(-H))", COLOURS[3]), ("score", "E |Jᵀs|²", COLOURS[5]))
    ):
        means = np.array([row[key] for row in regions.values()])
        errors = np.array([row[f"{key}_error"] or 0.0 for row in regions.values()])
        # on a log axis the lower whisker ends above zero
        below = np.minimum(2 * errors, 0.9 * means)
        at = place + 0.2 * (offset - 0.5)
        axes.errorbar(at, means, (below, 2 * errors), fmt="o", capsize=3, label=label, color=colour)
    axes.set_yscale("log")
    axes.set_xticks(place, list(regions))
    axes.set_title("Squared gradient of a token's log-prob, and beta (±2 s.e.)", fontsize="medium")
    axes.legend(fontsize="small")


def _weights(axes: Any, regions: dict[str, Any], rules: dict[str, Any]) -> None:
    place, width = np.arange(len(regions)), 0.8 / len(rules)
    for i, (name, row) in enumerate(rules.items()):
        heights = [row["weights"].get(region, np.nan) for region in regions]
        at = place + width * (i - (len(rules) - 1) / 2)
        axes.plot(at, heights, "o", label=name, color=COLOURS[i], markersize=5)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(place, list(regions))
    axes.set_title("Mean weight by region (all weights sum to the tokens)", fontsize="medium")
    axes.legend(fontsize="small", ncols=2)


def _noise(axes: Any, rules: dict[str, Any]) -> None:
    for i, row in enumerate(rules.values()):
        low, high = (np.nan if v is None else v for v in row["relative_interval"])
        value = np.nan if row["relative"] is None else row["relative"]
        style = {"color": COLOURS[i], "capsize": 4, "fmt": "o"}
        label = "variance / |gradient|², 95 % over groups" if i == 0 else None
        whiskers = [[max(value - low, 0)], [max(high - value, 0)]]
        axes.errorbar([i], [value], whiskers, label=label, **style)
    style = {"markerfacecolor": "none", "markeredgecolor": "0.35", "linestyle": "none"}
    variance = np.array([row["variance"] for row in rules.values()])
    axes.plot(variance / variance[0], "x", label="variance alone", **style)
    bounds = [row["bound"] for row in rules.values()]
    axes.plot(bounds, "D", label="Theorem 1's bound on the variance", **style)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(rules)), list(rules))
    axes.set_title("Noise of the mini-batch gradient, uniform = 1", fontsize="medium")
    axes.legend(fontsize="small")


def _csv(found: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "name", "quantity", "value"])
    for kind, rows in (
        ("region", found["regions"] | {"all": found["overall"]}),
        ("rule", found["rules"]),
    ):
        for name, row in rows.items():
            writer.writerows([kind, name, key, value] for key, value in _flat(row))
    return out.getvalue()


def _flat(row: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for key, value in row.items():
        if isinstance(value, dict):
            found += [(f"{key}.{k}", v) for k, v in value.items()]
        elif isinstance(value, list):
            found += [(f"{key}.{end}", v) for end, v in zip(("low", "high"), value, strict=True)]
        else:
            found.append((key, value))
    return found


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
