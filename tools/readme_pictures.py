"""Draws the two pictures of the README that come from a real run.

    rest-jax quickstart                                       (or any run with held-out records)
    python tools/readme_pictures.py runs/quickstart           (--out docs/images)

tokens.svg          a completion of the trained policy with a tool call, its tokens coloured by region, with the weight that
                    each token has in the policy gradient in the run's first step and in its last
learning_curve.png  held-out exact rate and mean reward over the steps
"""

import argparse
import pathlib
import sys
from xml.sax.saxutils import escape

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.analysis import plotting
from rest_jax.analysis.draws import make_draw, open_data
from rest_jax.analysis.report import Series, read_series
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.files import atomic_write
from rest_jax.rl.weights import token_weights
from rest_jax.run.load import config_of
from rest_jax.tool_calls import NUM_REGIONS, Region

# prompts to choose from, most tokens of a completion, least tokens of its arguments
PROMPTS, LONGEST, ARGUMENTS = 24, 80, 12
MEANING = {
    "tag": "tags",
    "scaffold": "JSON syntax",
    "name": "tool name",
    "param": "arguments",
    "think": "reasoning",
    "response": "answer to the user",
    "other": "malformed output",
}
NOTES = (
    "Bar and number: the weight of a token in the policy gradient. GRPO weighs all tokens alike (1, dashed).",
    "ResT: the lower the entropy of a region, the larger the weight of its tokens; a curriculum shifts weights in training.",
)
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
# pixels: width of a character, heights of a token's box, of the largest bar, of what is under a box; margin of the card
CHAR, BOX, BAR, UNDER, MARGIN = 8.4, 24, 60, 34, 20
COLUMNS = 104  # characters a line


def choose_completion(config: Config) -> tuple[list[str], np.ndarray]:
    """(text of each token, its region int8 [T]) of the first of the best completions with a call and arguments.

    The run's policy completes held-out prompts at temperature 1. UserError when no completion has a call.
    """
    data = config.data
    opened = open_data(config, data.eval or data.train, data.eval_limit)
    chosen = opened.choose(min(PROMPTS, opened.prepared.size), config.seed)
    scored, tokenizer = (
        make_draw(opened)(chosen, jax.random.key(config.seed)),
        opened.policy.tokenizer,
    )
    best = None
    for prompt, completion in np.ndindex(*scored.reward.shape):
        length = int(scored.rollout.response_length[prompt, completion])
        region = scored.region[prompt, completion, :length]
        count = np.bincount(region, minlength=NUM_REGIONS)
        complete = count[Region.NAME] and count[Region.THINK] and count[Region.PARAM] >= ARGUMENTS
        reward = float(scored.reward[prompt, completion])
        if complete and length <= LONGEST and (best is None or reward > best[0]):
            best = reward, scored.rollout.responses[prompt, completion, :length], region
    if best is None:
        raise UserError(f"no completion of {len(scored.reward)} prompts has a call to draw")
    return [tokenizer.text([i]) for i in best[1]], best[2]


def weights_at(
    config: Config, series: dict[str, Series], index: int, region: np.ndarray
) -> tuple[int, np.ndarray]:
    """(step, weight of each token float32 [T]): the region weights in force, normalised over this completion; those that the
    batch of the step got, where the normaliser is over the batch.

    `index` counts the steps of the run, 0 the first and -1 the last.
    """
    normalizer = config.weights.normalizer
    kind, normalizer = ("weight", "none") if normalizer == "batch" else ("base", normalizer)
    table = np.zeros(NUM_REGIONS, np.float32)
    for name in plotting.REGION_COLOURS:
        table[Region[name.upper()]] = series[f"region/{name}/{kind}"].values[index]
    row = jnp.asarray(region)[None, None]
    weight = token_weights(row, jnp.asarray(table), normalizer)
    return series["region/name/base"].steps[index], np.asarray(weight[0, 0])


def lines_of(texts: list[str]) -> list[list[int]]:
    """Indices of the tokens of each line: broken after a newline where the text up to the next would not fit."""
    blocks: list[list[int]] = [[]]
    for i, text in enumerate(texts):
        blocks[-1].append(i)
        if text.endswith("\n"):
            blocks.append([])
    lines: list[list[int]] = [[]]
    for block in blocks:
        if sum(len(texts[i]) for i in lines[-1] + block) > COLUMNS:
            lines.append([])
        lines[-1] += block
    return [line for line in lines if line]


def draw_tokens(texts: list[str], region: np.ndarray, steps: list[tuple[int, np.ndarray]]) -> str:
    """The SVG: a card with a header, for each of `steps` the lines of tokens under their bars, and a legend."""
    lines = lines_of(texts)
    scale = BAR / max(weight.max() for _, weight in steps)
    parts, y = draw_legend(region, 106), 146.0
    for step, weight in steps:
        parts.append(text_at(MARGIN, y, f"Weights in step {step}", 14, weight=600))
        y += 14
        for line in lines:
            y += scale * max(weight[line].max(), 1)
            parts += draw_line(texts, region, line, weight, (y, scale))
            y += BOX + UNDER
        y += 14
    width = 2 * MARGIN + CHAR * max(sum(len(texts[i]) for i in line) for line in lines)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y:.0f}" width="{width:.0f}" '
        f'font-family="{SANS}">',
        "<title>A tool call, token by token: regions and weights</title>",
        f'<rect x="1" y="1" width="{width - 2:.0f}" height="{y - 2:.0f}" rx="10" fill="#ffffff" stroke="#d0d7de"/>',
        text_at(MARGIN, 34, "ResT weighs each token of a completion by its region", 19, weight=600),
        *(text_at(MARGIN, 57 + 18 * i, note, 13, fill="#57606a") for i, note in enumerate(NOTES)),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def draw_line(
    texts: list[str],
    region: np.ndarray,
    line: list[int],
    weight: np.ndarray,
    at: tuple[float, float],
) -> list[str]:
    """The tokens `line` in boxes whose top is at `at[0]`; over each run of tokens of one region a bar, `at[1]` pixels for
    the weight 1, and the weight under it.
    """
    y, scale = at
    ends = MARGIN + CHAR * np.cumsum([0, *(len(texts[i]) for i in line)])
    parts = []
    for i, x, end in zip(line, ends, ends[1:], strict=False):
        shown = texts[i].replace("\n", "⏎").replace(" ", "\u00a0")
        parts.append(
            rectangle(x, y, end - x, BOX, region[i], 'fill-opacity="0.3" stroke="#ffffff"')
        )
        parts.append(text_at(x, y + 16.5, shown, 13.5, font=FONT, length=end - x))
    starts = [k for k in range(len(line)) if k == 0 or region[line[k]] != region[line[k - 1]]]
    for k, after in zip(starts, [*starts[1:], len(line)], strict=True):
        i, x, size = line[k], ends[k], ends[after] - ends[k]
        tall = scale * float(weight[i])
        parts.append(rectangle(x + 0.5, y - tall - 1, size - 1, tall, region[i]))
        if size > 18:
            middle = x + size / 2
            parts.append(text_at(middle, y + BOX + 14, f"{weight[i]:.1f}", 12, anchor="middle"))
    parts.append(
        f'<line x1="{MARGIN}" x2="{ends[-1]:.1f}" y1="{y - 1 - scale:.1f}" y2="{y - 1 - scale:.1f}" '
        'stroke="#1f2328" stroke-width="1" stroke-dasharray="3 3"/>'
    )
    return parts


def draw_legend(region: np.ndarray, y: float) -> list[str]:
    """A chip and a word for each region that occurs."""
    parts, x = [], float(MARGIN)
    for r in sorted(set(region.tolist())):
        meaning = MEANING[Region(r).name.lower()]
        parts.append(rectangle(x, y - 12, 14, 14, r, 'rx="3"'))
        parts.append(text_at(x + 20, y, meaning, 13))
        x += 48 + 7.5 * len(meaning)
    return parts


def rectangle(x: float, y: float, width: float, height: float, region: int, more: str = "") -> str:
    """An SVG rectangle in the colour of a region."""
    colour = plotting.REGION_COLOURS[Region(region).name.lower()]
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}" {more}/>'


def text_at(
    x: float,
    y: float,
    text: str,
    size: float,
    *,
    fill: str = "#1f2328",
    weight: int = 400,
    anchor: str = "start",
    font: str = SANS,
    length: float | None = None,
) -> str:
    """An SVG text; `length` is the width in pixels that it is fitted to, whatever font the reader has."""
    fit = "" if length is None else f' textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"'
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="{font}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}" text-anchor="{anchor}"{fit}>{escape(text)}</text>'
    )


def draw_learning_curve(series: dict[str, Series], path: pathlib.Path) -> None:
    """Held-out exact rate, and mean reward of the sampled and of the held-out completions, over the steps."""
    figure = plotting.new_figure(9, 2.9)
    left, right = figure.subplots(1, 2)
    rate = series["eval/exact"]
    left.plot(rate.steps, np.multiply(100, rate.values), "o-", color=plotting.BLUE)
    plotting.label_steps(left, "Exact tool calls on held-out tools", "% of prompts")
    left.set_ylim(0, 100)
    for name, label, style in (
        ("reward/mean", "sampled", {"color": plotting.ORANGE, "linewidth": 1}),
        ("eval/reward", "held out, greedy", {"color": plotting.BLUE, "marker": "o"}),
    ):
        right.plot(*series[name], label=label, **style)
    plotting.label_steps(right, "Mean reward", "")
    right.legend(fontsize="small", loc="lower right")
    plotting.save(figure, path, dpi=140)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for a run that cannot be drawn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--out", default="docs/images", help="where the pictures go")
    options = parser.parse_args(arguments)
    try:
        series = read_series(options.run)
        config = config_of(options.run, [])
        texts, region = choose_completion(config)
        steps = [weights_at(config, series, i, region) for i in (0, -1)]
        out = pathlib.Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / "tokens.svg") as partial:
            partial.write_text(draw_tokens(texts, region, steps), encoding="utf-8")
        draw_learning_curve(series, out / "learning_curve.png")
    except UserError as error:
        print(f"readme_pictures: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {out / 'tokens.svg'}, {out / 'learning_curve.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
