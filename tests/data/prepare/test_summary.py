"""The summary of records: counts of kinds, calls and values, percentiles as numpy has them."""

import numpy as np
import pytest

from rest_jax.data.prepare import summary
from rest_jax.data.records import StepRecord
from rest_jax.tool_calls import Call, Target

CALL = Call("t", {"a": 1, "b": [1], "c": {"d": None}})
TARGETS = [Target((CALL, CALL)), Target((CALL,), "done"), Target(response="no"), Target()]


def record(target: Target, messages=None) -> StepRecord:
    tools = () if messages else ({"name": "t"},)
    history = () if messages else ({"role": "user", "content": "x"},)
    return StepRecord("a", "made", tools, history, target, messages)


@pytest.fixture
def tally() -> summary.Tally:
    made = summary.Tally()
    for number, target in enumerate(TARGETS):
        made.add(record(target), (10 * number, number))
    return made


def test_text_counts_kinds_calls_and_values(tally):
    rows = [line.split() for line in summary.to_text(tally).splitlines()]
    assert ["records", "4"] in rows and ["source", "made", "4"] in rows
    for kind in ("calls 1", "calls and response 1", "response 1", "think only 1"):
        assert kind.split() in rows
    assert ["argument", "values", "9"] in rows
    assert ["nested", "(lists,", "objects)", "6"] in rows
    assert [row for row in rows if len(row) == 2][-3:] == [["0", "2"], ["1", "1"], ["2", "1"]]
    assert ["calls", "0.75", "0", "1", "2", "2", "2", "2"] in rows
    assert ["prompt", "tokens", "15", "0", "20", "30", "30", "30", "30"] in rows


def test_json_says_the_same(tally):
    raw = summary.to_json(tally)
    assert raw["records"] == 4 and raw["sources"] == {"made": 4}
    assert raw["kinds"] == {"calls": 1, "calls and response": 1, "response": 1, "think only": 1}
    assert raw["calls_per_target"] == {"0": 2, "1": 1, "2": 1}
    assert raw["argument_values"] == {"total": 9, "nested": 6}
    assert raw["measures"]["target tokens"] == {
        "mean": 1.5, "p0": 0, "p50": 2, "p90": 3, "p95": 3, "p99": 3, "p100": 3,
    }  # fmt: skip


def test_tools_of_a_prompt_that_is_only_text_are_not_counted(tally):
    tally.add(record(Target(), ({"role": "user", "content": "x"},)))
    assert tally.measures["tools"].total() == 4 and tally.measures["messages before"].total() == 5


def test_nothing():
    assert ["records", "0"] in [
        line.split() for line in summary.to_text(summary.Tally()).split("\n")
    ]
    assert summary.to_json(summary.Tally())["measures"] == {}


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000])
def test_percentiles_are_those_of_numpy(size):
    values = np.random.default_rng(size).integers(0, 50, size)
    tally = summary.Tally()
    for value in values.tolist():
        tally.add(record(Target((CALL,) * value)))
    told = summary.to_json(tally)["measures"]["calls"]
    ranks = np.percentile(values, summary.PERCENTILES, method="higher").tolist()
    assert [told[f"p{p}"] for p in summary.PERCENTILES] == ranks
    assert told["mean"] == pytest.approx(values.mean())
