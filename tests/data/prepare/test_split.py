"""Tools set apart: no held-out tool in training, whatever the records; the cases of the table by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.data.prepare import split
from rest_jax.data.records import StepRecord
from rest_jax.tool_calls import Call, Target

SEED, HALF = 0, 0.5
# names whose side under SEED and HALF is known
HELD = [n for n in "abcdefghijkl" if split.is_held_out(n, HALF, SEED)]
FREE = [n for n in "abcdefghijkl" if n not in HELD]


def record(offered, target=(), before=(), **fields) -> StepRecord:
    tools = tuple({"name": n, "description": d} for n, d in offered)
    calls = [{"name": n, "arguments": {}} for n in before]
    history = (
        {"role": "user", "content": "x"},
        *([{"role": "assistant", "content": None, "calls": calls}] if calls else []),
    )
    gold = Target(tuple(Call(n, {}) for n in target), None if target else "y")
    return StepRecord("r", "", tools, history, gold, **fields)


def place(made, described=None, fraction=HALF):
    return split.place(made, fraction, SEED, {} if described is None else described)


NAMES = st.sampled_from(
    ["get_a", "GetA", "get_b", "GET B", "c", "d", "e", "f", "天气", "?", "!", "a.b", "A.c", "ab"]
)
DESCRIPTIONS = st.sampled_from(["", "Tells the A.", "tells the a", "B", "C", "Something", None])
RECORDS = st.builds(
    record,
    st.lists(st.tuples(NAMES, DESCRIPTIONS), max_size=4),
    st.lists(NAMES, max_size=2),
    st.lists(NAMES, max_size=2),
)


@given(
    records=st.lists(RECORDS, max_size=40),
    fraction=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_a_held_out_tool_never_occurs_in_training(records, fraction, seed):
    described: split.Described = {}
    placed = [split.place(r, fraction, seed, described) for r in records]
    evaluated, trained = (
        [p.record for p in placed if p.part == part] for part in ("eval", "train")
    )
    called = {split.canonical_name(n) for r in evaluated for n in _called(r)}
    assert all(split.is_held_out(n, fraction, seed) for r in evaluated for n in _called(r))
    names = {
        split.canonical_name(n)
        for r in trained
        for n in (*_called(r), *(t["name"] for t in r.tools))
    }
    assert not called & names
    assert not any(split.is_held_out(n, fraction, seed) for n in names)
    held_texts = {
        split.canonical(t["description"])
        for r in evaluated
        for t in r.tools
        if t["description"] and split.canonical(t["name"]) in called
    }
    train_texts = {
        split.canonical(t["description"]) for r in trained for t in r.tools if t["description"]
    }
    assert not held_texts & train_texts
    for p in placed:
        assert (p.part is None) == bool(p.reason)


def _called(r: StepRecord) -> list[str]:
    calls = [call["name"] for turn in r.history for call in turn.get("calls", ())]
    return calls + [call.name for call in r.target.calls]


def test_the_share_of_tools_is_the_fraction():
    names = [f"tool {i}" for i in range(4000)]
    for fraction in (0.0, 0.1, 0.5, 1.0):
        share = sum(split.is_held_out(n, fraction, 3) for n in names) / len(names)
        assert share == pytest.approx(fraction, abs=0.03)
    assert [split.is_held_out(n, 0.5, 1) for n in names] != [
        split.is_held_out(n, 0.5, 2) for n in names
    ]


def test_spelling_does_not_part_a_name():
    assert split.canonical("Get_Weather") == split.canonical("getWeather") == "getweather"
    assert split.canonical("??") == "??"


def test_the_table():
    held, free, other = HELD[0], FREE[0], FREE[1]
    offered = [(held, "H"), (free, "F"), (other, "O")]
    assert place(record(offered, [held])).part == "eval"
    assert place(record(offered, [held], [held])).part == "eval"
    assert place(record(offered, [], [held])).part == "eval"  # it answers after a held-out call
    for mixed in (place(record(offered, [held, free])), place(record(offered, [free], [held]))):
        assert mixed.part is None and mixed.reason == "it calls held-out tools and others"
    assert place(record([(held, "H"), (HELD[1], "I")])).part == "eval"
    training = place(record(offered, [free], messages=({"role": "user", "content": "x"},)))
    assert training.part == "train" and training.removed == 1
    assert [t["name"] for t in training.record.tools] == [free, other]
    assert training.record.messages is None  # the verbatim prompt lists the held-out tool
    untouched = record([(free, "F")], [free], extra={"k": 1})
    assert place(untouched) == split.Placement("train", untouched)
    assert place(record([])).part == "train"
    assert place(record([(free, "F")], [HELD[2]])).part == "eval"  # called, though not offered


def test_a_description_goes_by_its_first_name():
    described: split.Described = {}
    assert place(record([(FREE[0], "Same.")], [FREE[0]]), described).part == "train"
    late = place(record([(HELD[0], "same"), (HELD[1], "")], [HELD[0]]), described)
    assert late.part is None and "names of both parts" in late.reason
    offered = place(record([(HELD[0], "SAME"), (FREE[1], "")], [FREE[1]]), described)
    assert [t["name"] for t in offered.record.tools] == [FREE[1]]


def test_nothing_left_to_offer():
    described: split.Described = {}
    place(record([(FREE[0], "Same.")]), described)
    placed = place(record([(HELD[0], "Same."), (HELD[1], "")]), described)
    assert placed.part is None and placed.reason == "no tool that it offers is for training"


def test_a_prompt_that_is_only_text_goes_nowhere():
    text = ({"role": "user", "content": "x"},)
    placed = place(record([], messages=text))
    assert placed.part is None and "only as text" in placed.reason


def test_tools_of_a_service_are_held_out_together():
    sides = {
        service: {split.is_held_out(f"{service}.{name}", HALF, SEED) for name in "abcdefgh"}
        for service in ("Hotels_1", "Hotels_2", "Buses_1", "Buses_2", "Banks_1", "Banks_2")
    }
    assert all(len(side) == 1 for side in sides.values())
    assert sides["Hotels_1"] == {split.is_held_out("hotels1", HALF, SEED)}
    assert {True} in sides.values() and {False} in sides.values()
