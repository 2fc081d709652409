"""The reward as a whole: bounds over progress, gold without calls, and the holes of the released rule."""

import json

import pytest

from rest_jax.config import RewardConfig
from rest_jax.rewards.score import correctness_bounds, format_bounds, scale, score
from rest_jax.run.metrics import METRICS
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target

TARGET = Target(calls=(Call("f", {"a": 1, "b": "x"}),))
LINE = '{"name": "f", "parameters": {"a": 1, "b": "x"}}\n'
RIGHT = f"<think> t </think>\n<tool_call>\n{LINE}</tool_call>"
TALK = "<think> t </think>\n<response> hi </response>"
STATIC = RewardConfig(dynamic=False)
RELEASED = RewardConfig(
    dynamic=False,
    strict_format=False,
    count_extra_calls=False,
    extra_call_penalty=0,
    penalise_spurious_calls=False,
)


def reward(text: str, target: Target, cfg: RewardConfig, progress: float = 1.0, **more):
    return score(TEMPLATES["toolrl"].parse(text.encode()), target, "toolrl", cfg, progress, **more)


def test_bounds_move_with_progress():
    cfg = RewardConfig()
    assert [format_bounds(cfg, mu) for mu in (0, 0.5, 1)] == [(-2, 2), (-1.5, 1.5), (-1, 1)]
    assert [correctness_bounds(cfg, mu) for mu in (0, 0.5, 1)] == [(-2, 2), (-2.5, 2.5), (-3, 3)]
    assert format_bounds(cfg, 7.0) == format_bounds(cfg, 1.0)
    assert (format_bounds(STATIC, 0.3), correctness_bounds(STATIC, 0.3)) == ((0, 1), (-3, 3))
    assert [scale(s, (-2.0, 2.0)) for s in (0.0, 0.5, 1.0)] == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize("progress", [-0.1, float("nan")])
def test_progress_outside_its_range_is_refused_where_the_scale_moves(progress):
    with pytest.raises(ValueError, match="reward progress"):
        reward(RIGHT, TARGET, RewardConfig(), progress)
    assert reward(RIGHT, TARGET, STATIC, progress).reward == 4.0  # which has no progress


def test_best_and_worst():
    for mu, best in [(0.0, 4.0), (0.5, 4.0), (1.0, 4.0)]:
        assert reward(RIGHT, TARGET, RewardConfig(), mu).reward == best
        assert reward("", TARGET, RewardConfig(), mu).reward == -best
    found = reward(RIGHT, TARGET, RewardConfig(), 0.5)
    assert (found.format_part, found.correctness_part, found.exact, found.spurious) == (
        1.5,
        2.5,
        True,
        False,
    )


def test_gold_without_calls():
    target = Target(response="hi")
    cfg = RewardConfig()
    good = reward(TALK, target, cfg)
    assert (good.reward, good.correctness_part, good.exact, good.spurious) == (
        1.0,
        0.0,
        True,
        False,
    )
    called = reward(RIGHT, target, cfg)
    assert (called.format_part, called.correctness_part, called.spurious) == (-1.0, -3.0, True)
    assert not called.exact
    assert reward(RIGHT, target, RELEASED).correctness_part == 0.0
    tried = reward("<think> t </think><tool_call>{</tool_call>", target, cfg)
    assert (tried.spurious, tried.correctness_part) == (True, -3.0)


@pytest.mark.parametrize("name", ["reward/exact", "eval/exact"])
def test_exact_asks_for_the_format_and_compares_no_texts(name):
    other_words = reward(TALK.replace(" hi ", " no "), Target(response="hi"), RewardConfig())
    called = Target(TARGET.calls, response="hi")
    both = reward(f"{RIGHT}\n<response> no </response>", called, RewardConfig())
    no_thought = reward(RIGHT.removeprefix("<think> t </think>\n"), TARGET, RewardConfig())
    assert other_words.exact and both.exact
    assert no_thought.accuracy == 1.0 and not no_thought.exact
    meaning = METRICS[name].meaning
    assert "in the format" in meaning and meaning.endswith("texts are not compared")


def test_fifty_copies_of_the_right_call_score_low():
    text = f"<think> t </think>\n<tool_call>\n{LINE * 50}</tool_call>"
    found = reward(text, TARGET, STATIC)
    assert (found.format_part, found.correctness_part, found.exact) == (1.0, -3.0, False)
    # Counted in the union but not penalised, as measured for the released code with two parameters: 2.53 of 4.
    counted = RewardConfig(dynamic=False, extra_call_penalty=0)
    assert reward(text, TARGET, counted).reward == pytest.approx(2.53)


def test_text_around_the_tags_loses_the_format_part():
    text = f"Of course! {RIGHT} You are welcome."
    assert reward(text, TARGET, STATIC).format_part == 0.0
    assert reward(text, TARGET, STATIC).correctness_part == 3.0
    assert not reward(text, TARGET, STATIC).exact
    assert reward(text, TARGET, RELEASED).reward == 4.0


def test_pretty_printed_calls_score_full_marks():
    call = json.dumps({"name": "f", "parameters": {"b": "x", "a": 1.0}}, indent=2)
    text = f"<think> t </think>\n<tool_call>\n{call}\n</tool_call>"
    assert reward(text, TARGET, STATIC).reward == 4.0


def test_a_broken_call_costs_what_a_superfluous_one_costs():
    text = RIGHT.replace("</tool_call>", '{"name": "f", "parameters": {\n</tool_call>')
    found = reward(text, TARGET, STATIC)
    assert found.accuracy == pytest.approx((0.5 + 1 + 2) / 4 * 0.5)
    assert (found.format_part, found.exact) == (0.0, False)


UNREADABLE = {
    "duplicate key": LINE.replace('"a": 1', '"a": 1, "a": 1'),
    "NaN": LINE.replace("1", "NaN"),
    "Infinity": LINE.replace("1", "-Infinity"),
    "no closing brace": LINE.replace("}}", "}"),
    "no call": '{"x": 1}\n',
    "nesting": LINE.replace("1", "[" * 40 + "]" * 40),
}


@pytest.mark.parametrize("line", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("copies", [1, 2, 49])
@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize(
    "cfg", [RewardConfig(), RELEASED, RewardConfig(coarse=True), RewardConfig(strict_match=True)]
)
def test_unreadable_superfluous_calls_cost_what_readable_ones_cost(template, line, copies, cfg):
    def text(extra: str) -> str:
        lines = [LINE, *[extra] * copies]
        if template == "toolrl":
            return f"<think> t </think>\n<tool_call>\n{''.join(lines)}</tool_call>"
        if template == "llama3":
            return "".join(lines)
        return "\n".join(f"<tool_call>\n{line}</tool_call>" for line in lines)

    unreadable, readable = (
        score(TEMPLATES[template].parse(text(extra).encode()), TARGET, template, cfg, 1.0)
        for extra in (line, LINE)
    )
    assert unreadable.reward <= readable.reward
    assert not unreadable.exact


def test_length_part_is_off_by_default():
    assert reward(RIGHT, TARGET, STATIC, tokens=400).reward == 4.0
    cfg = RewardConfig(dynamic=False, length_weight=0.5, length_target_tokens=200)
    assert reward(RIGHT, TARGET, cfg, tokens=100).reward == pytest.approx(4.25)
    assert reward(RIGHT, TARGET, cfg, tokens=900).reward == pytest.approx(4.5)
