"""The reasoned level: the thought holds what the call needs, is most of the answer, and carries most of the mistakes."""

import collections
import json

import numpy as np
import pytest

from rest_jax.data.synthetic import world as synthetic
from rest_jax.data.synthetic.reasoning import REASONED_HABITS, Task, answer
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import TEMPLATES

SIZE = 1200


@pytest.fixture(scope="module")
def right():
    return synthetic.world("train", 5, SIZE, "reasoned")


@pytest.fixture(scope="module")
def careless():
    return synthetic.demonstrations("train", 5, SIZE, "reasoned")


def _kind(record):
    return record.id.rsplit("-", 1)[1]


def test_every_kind_occurs_at_its_rate(right):
    counts = collections.Counter(map(_kind, right))
    for kind, share in synthetic.KINDS["reasoned"].items():
        assert counts[kind] / SIZE == pytest.approx(share, abs=0.04)


def test_the_thought_judges_every_tool_and_names_every_value(right):
    for record in right:
        think = record.target.think
        tools = {tool["name"]: tool for tool in record.tools}
        called = [call.name for call in record.target.calls]
        for call in record.target.calls:
            assert f'{tools[call.name]["description"]}: "{call.name}" yes' in think
            for mask, value in call.arguments.items():
                assert f"{mask} {json.dumps(value)}" in think
        if _kind(record) != "final":
            rounds = max(1, len(called))  # each thing asked for goes through the whole list
            assert think.count('" yes') == len(called)
            assert think.count('" no') == rounds * len(tools) - len(called)


def test_kinds_are_answered_as_they_should(right):
    for record in right:
        calls, response = record.target.calls, record.target.response
        kind = _kind(record)
        assert len(calls) == {"parallel": 2, "none": 0, "final": 0}.get(kind, 1)
        assert (response is None) == bool(calls)
        if kind == "none":
            assert response == synthetic.NO_TOOL and record.target.think.endswith("no tool fits.")
        if kind == "first":
            assert record.target.think.endswith(": later.")
        if kind in ("second", "final"):
            observed = record.history[-1]["content"]
            assert f"is done: {observed}." in record.target.think


def test_calls_are_those_of_the_other_levels_makers(right):
    """The right call is of the tool described, its values as in the request."""
    for record in right:
        if _kind(record) not in ("single", "parallel", "first"):
            continue
        tools = {tool["name"]: tool for tool in record.tools}
        for call in record.target.calls:
            action, thing = tools[call.name]["description"].split()
            assert f"{action} the {thing}" in record.history[0]["content"]
            assert list(call.arguments) == list(tools[call.name]["parameters"])


def test_reasoning_is_most_of_the_tokens(right, configs_dir):
    template, tokenizer = TEMPLATES["toolrl"], Tokenizer.load(configs_dir / "quickstart_policy")
    thoughts = sum(len(tokenizer.encode(r.target.think)) for r in right[:400])
    answers = sum(len(tokenizer.encode(template.render_answer(r.target))) for r in right[:400])
    assert 0.6 < thoughts / answers < 0.75


def test_habits_strike_at_their_rates_and_are_seen_in_the_thought(right, careless):
    made = collections.defaultdict(list)
    for good, bad in zip(right, careless, strict=True):
        assert (good.id, good.tools, good.history) == (bad.id, bad.tools, bad.history)
        if _kind(good) != "final":
            # a list gone through ends in a judgement of its last tool
            made["hasty"].append(
                f'"{good.tools[-1]["name"]}" ' not in bad.target.think.split(". so")[0]
            )
        if _kind(good) == "parallel":
            made["forgets_second"].append(bad.target.think.count("need to") == 1)
        if bad.target.calls:
            made["chatty"].append(bad.target.response is not None)
    for habit in ("hasty", "forgets_second", "chatty"):
        assert np.mean(made[habit]) == pytest.approx(REASONED_HABITS[habit], abs=0.06), habit


def test_carelessness_costs_most_of_the_parallel_answers(right, careless):
    """A policy that imitates has something to learn: a hasty choice is often, not always, wrong."""
    same = collections.defaultdict(list)
    for good, bad in zip(right, careless, strict=True):
        same[_kind(good)].append(
            (good.target.calls, good.target.response) == (bad.target.calls, bad.target.response)
        )
    assert np.mean(same["parallel"]) < 0.3 < np.mean(same["second"])
    assert np.mean(same["final"]) == 1.0


def test_a_hand_written_answer():
    maker = synthetic.Tool
    tools = [
        maker("review", "game", "rikpom", {"weight": "weight_fuz"}),
        maker("send", "game", "zabkiv", {"page": "page_muz", "urgent": "urgent_vop"}),
    ]
    task = Task("send", "game", {"page": 52, "urgent": True})
    found = answer([task], tools, "", "", synthetic.NO_TOOL)
    assert found.think == (
        'need to send game: review game: "rikpom" no; send game: "zabkiv" yes. '
        'so "zabkiv" page_muz 52, urgent_vop true.'
    )
    assert [(c.name, c.arguments) for c in found.calls] == [
        ("zabkiv", {"page_muz": 52, "urgent_vop": True})
    ]
    hasty = answer([task], tools, "", "", synthetic.NO_TOOL, ["hasty"])
    assert hasty.think == 'need to send game. so "rikpom".'
    assert [(c.name, c.arguments) for c in hasty.calls] == [("rikpom", {})]
