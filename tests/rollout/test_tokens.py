"""What is written for the token viewer: all of a group, token by token, bounded, and the calls as the reward pairs them."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rest_jax.config import RewardConfig
from rest_jax.rewards.tool_call import accuracy
from rest_jax.rollout import tokens
from rest_jax.rollout.tokens import (
    compare_answers,
    is_shown,
    read_record,
    token_record,
    token_texts,
)
from rest_jax.tool_calls import Call, Target
from tests.experiences import (
    GOLD,
    HOSTILE,
    REWARD,
    RIGHT,
    TEMPLATE,
    WRONG,
    Bytes,
    experience_of,
    record,
)


def recorded(groups, **options):
    experience, values = experience_of(groups, **options)
    line = token_record(values, experience, Bytes(), TEMPLATE, REWARD)
    return read_record(json.loads(json.dumps(line))), experience, values


def test_every_completion_of_a_group_is_there_token_by_token():
    step, experience, values = recorded([(record(), [RIGHT, WRONG, HOSTILE])])
    rollout, (prompt,) = experience.scored.rollout, step["prompts"]
    assert (prompt["id"], prompt["prompt"], prompt["prompt_tokens"]) == ("one", "?", 1)
    for j, (one, text) in enumerate(
        zip(prompt["completions"], (RIGHT, WRONG, HOSTILE), strict=True)
    ):
        length, found = int(rollout.response_length[0, j]), one["tokens"]
        ends = "" if j == 2 else "<|im_end|>"
        assert "".join(found["text"]) == text + ends
        assert (one["length"], one["truncated"]) == (length, j == 2)
        assert found["id"] == rollout.responses[0, j, :length].tolist()
        assert found["region"] == experience.scored.region[0, j, :length].tolist()
        for name, array in (
            ("weight", values.weight),
            ("logp", rollout.logp),
            ("entropy", rollout.entropy),
        ):
            np.testing.assert_allclose(found[name], array[0, j, :length], atol=6e-4)
        np.testing.assert_allclose(found["mismatch"], -0.5, rtol=0.05)
        assert one["score"] == vars(experience.scores[0][j])
        assert one["advantage"] == pytest.approx(float(values.advantage[0, j]), rel=1e-3)
    assert step["progress"] == 0.5 and step["correctness_bounds"] == [-2.5, 2.5]


def test_without_recomputed_log_probs_no_mismatch_is_claimed():
    step, *_ = recorded([(record(), [RIGHT, WRONG])], trainer=False)
    assert "mismatch" not in step["prompts"][0]["completions"][0]["tokens"]


def test_a_step_has_at_most_so_many_tokens(monkeypatch):
    monkeypatch.setattr(tokens, "MOST_TOKENS", 80)
    step, *_ = recorded([(record("a"), [RIGHT, "x"]), (record("b"), [WRONG, "y"])])
    counts = [[len(c["tokens"]["id"]) for c in p["completions"]] for p in step["prompts"]]
    assert counts == [[20, 1], [20, 1]]
    assert step["prompts"][0]["completions"][0]["length"] == len(RIGHT.encode()) + 1


def test_values_that_are_not_finite_are_left_out():
    experience, values = experience_of([(record(), [RIGHT, WRONG])])
    values.logp[0, 0, 0] = np.nan
    values.weight[0, 0, 1] = np.inf
    line = token_record(values, experience, Bytes(), TEMPLATE, REWARD)
    found = read_record(line)["prompts"][0]["completions"][0]["tokens"]
    assert found["mismatch"][0] is None and found["weight"][:2] == [1.125, None]


@pytest.mark.parametrize("steps", [1, 7, 500, 501, 12_345])
def test_a_run_writes_the_first_step_and_evenly_spaced_ones(steps):
    shown = [step for step in range(1, steps + 1) if is_shown(step, steps)]
    assert shown[0] == 1 and len(shown) <= tokens.MOST_STEPS + 1
    assert len(shown) == steps if steps <= tokens.MOST_STEPS else len(set(np.diff(shown)[1:])) == 1


@hypothesis.given(st.binary(max_size=40))
def test_texts_of_tokens_are_the_text_whatever_the_bytes(data):
    ids = [byte + 1 for byte in data]
    found = list(token_texts(Bytes(), ids))
    assert len(found) == len(ids)
    assert "".join(found) == data.decode("utf-8", errors="replace")


def compared(gold, text, cfg=REWARD):
    return compare_answers(Target(calls=tuple(gold)), TEMPLATE.parse(text.encode()), cfg)


def answer(*calls: Call) -> str:
    lines = [json.dumps({"name": c.name, "parameters": c.arguments}) for c in calls]
    return "<think> t </think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def test_calls_stand_beside_the_gold_ones_with_every_value_judged():
    found = compared([GOLD], WRONG)
    assert found["calls"] == [
        {
            "gold": "weather",
            "predicted": "weather",
            "right": True,
            "parameters": [["city", '"Zürich"', '"Zürich"', True], ["days", "2", '"2"', False]],
        }
    ]
    other, extra = Call("time", {"city": "Zürich"}), Call("rain", {"days": True})
    wrong, missing, spare = (
        compared([GOLD], answer(other))["calls"],
        compared([GOLD, Call("rain", {"days": 1})], answer(GOLD))["calls"],
        compared([GOLD], answer(extra, GOLD))["calls"],
    )
    # another name earns nothing, whatever its values
    assert [(r["gold"], r["predicted"], r["right"]) for r in wrong] == [("weather", "time", False)]
    assert wrong[0]["parameters"][0] == ["city", '"Zürich"', '"Zürich"', False]
    assert [(r["gold"], r["predicted"], r["right"]) for r in missing] == [
        ("weather", "weather", True),
        ("rain", None, False),
    ]
    assert [(r["gold"], r["predicted"], r["right"]) for r in spare] == [
        ("weather", "weather", True),
        (None, "rain", False),
    ]
    assert compared([Call("rain", {"days": 1})], answer(extra))["calls"][0]["parameters"] == [
        ["days", "1", "true", False]
    ]
    assert compared([], answer(extra)).keys() == {"calls", "broken_calls", "response"}


@pytest.mark.parametrize(
    "text",
    [RIGHT, WRONG, answer(GOLD, GOLD), answer(Call("time", {}))],
    ids=["right", "value", "twice", "name"],
)
def test_the_parts_written_give_the_accuracy(text):
    cfg = RewardConfig(extra_call_penalty=0)
    found = compared([GOLD], text, cfg)
    given = (found["names"] + sum(found["matched"])) / (2 + len(GOLD.arguments))
    parsed = TEMPLATE.parse(text.encode())
    assert given == pytest.approx(accuracy([GOLD], parsed.calls, cfg), abs=1e-4)
