"""Decomposition: hand-written dialogues with their steps, and that compose is the inverse."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.data.prepare.dialogue import Dialogue, compose, decompose
from rest_jax.data.records import RecordError, StepRecord
from rest_jax.tool_calls import Call, Target

TOOLS = ({"name": "f", "description": "", "parameters": {}},)


def _user(text):
    return {"role": "user", "content": text}


def _result(text):
    return {"role": "tool", "content": text}


def _says(text, **more):
    return {"role": "assistant", "content": text, **more}


def _calls(*values, **more):
    return _says(None, calls=[{"name": "f", "arguments": {"x": v}} for v in values], **more)


def _target(*values, **more):
    return Target(calls=tuple(Call("f", {"x": v}) for v in values), **more)


def _steps(*turns):
    return decompose(Dialogue("d", "test", TOOLS, turns))


def _record(name, history, target):
    return StepRecord(name, "test", TOOLS, tuple(history), target)


def test_one_answer():
    assert _steps(_user("a"), _says("b")) == [_record("d", [_user("a")], Target(response="b"))]


def test_parallel_calls_and_a_final_answer_after_them():
    asked, action, results = _user("both"), _calls(1, 2, think="two"), [_result("p"), _result("q")]
    assert _steps(asked, action, *results, _says("done")) == [
        _record("d/0", [asked], _target(1, 2, think="two")),
        _record("d/1", [asked, action, *results], Target(response="done")),
    ]


def test_a_run_of_calls_before_a_result_is_one_action():
    asked = _user("both")
    run = (_calls(1, think="one"), _says("wait", calls=_calls(2)["calls"]), _calls(3, think="two"))
    whole = _calls(1, 2, 3, think="one\ntwo") | {"content": "wait"}
    assert _steps(asked, *run, _result("r"), _says("done")) == [
        _record("d/0", [asked], _target(1, 2, 3, response="wait", think="one\ntwo")),
        _record("d/1", [asked, whole, _result("r")], Target(response="done")),
    ]


def test_an_error_is_an_observation_and_is_answered_by_a_new_action():
    asked, error = _user("go"), _result('{"error": "busy"}')
    assert _steps(asked, _calls(1), error, _calls(2), _result("ok"), _says("done")) == [
        _record("d/0", [asked], _target(1)),
        _record("d/1", [asked, _calls(1), error], _target(2)),
        _record(
            "d/2", [asked, _calls(1), error, _calls(2), _result("ok")], Target(response="done")
        ),
    ]


def test_two_user_turns():
    first = [{"role": "system", "content": "s"}, _user("a"), _says("b")]
    second = [_user("c"), _calls(1), _result("r"), _says("d")]
    assert _steps(*first, *second) == [
        _record("d/0", first[:2], Target(response="b")),
        _record("d/1", first + second[:1], _target(1)),
        _record("d/2", first + second[:3], Target(response="d")),
    ]


def test_a_text_before_an_action_is_a_step_of_its_own():
    assert [r.target for r in _steps(_user("a"), _says("I look."), _calls(1))] == [
        Target(response="I look."),
        _target(1),
    ]


def test_turns_after_the_last_answer_are_in_no_step():
    assert _steps(_user("a"), _says("b"), _user("c")) == _steps(_user("a"), _says("b"))
    assert _steps(_user("a"), _result("r")) == []


def test_records_of_different_dialogues_do_not_compose():
    one, two = _steps(_user("a"), _says("b"), _user("c"), _says("d"))
    assert compose([two]).turns == compose([one, two]).turns
    other = _record("e/1", [_user("z"), _says("b")], Target(response="d"))
    for wrong in ([two, one], [one, other], [one, one], [_record("d/0", [], one.target), two]):
        with pytest.raises(RecordError, match="no earlier step"):
            compose(wrong)
    with pytest.raises(RecordError, match="no records"):
        compose([])


WORDS = st.text("ab é", max_size=3)
ARGUMENTS = st.dictionaries(WORDS, st.integers() | WORDS | st.lists(WORDS, max_size=2), max_size=2)
CALLS = st.lists(st.fixed_dictionaries({"name": WORDS, "arguments": ARGUMENTS}), min_size=1)
OTHERS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "tool"]), "content": WORDS}
)
ACTIONS = st.builds(
    lambda calls, content, more: _says(content, calls=calls, **more),
    CALLS,
    st.none() | WORDS,
    st.fixed_dictionaries({}, optional={"think": WORDS}),
)
ANSWERS = st.builds(_says, WORDS)


@hypothesis.given(st.lists(OTHERS | ACTIONS | ANSWERS, max_size=8), st.sampled_from(["d", "d/3"]))
def test_compose_is_the_inverse(turns, name):
    records = decompose(Dialogue(name, "test", TOOLS, tuple(turns)))
    hypothesis.assume(records)
    dialogue = compose(records)
    assert decompose(dialogue) == records
    answers = [t for t in turns if t["role"] == "assistant"]
    assert sum(len(t.get("calls", ())) for t in answers) == sum(
        len(r.target.calls) for r in records
    )
    runs = any(
        a["role"] == b["role"] == "assistant" and a.get("calls") and b.get("calls")
        for a, b in itertools.pairwise(turns)
    )
    if not runs and turns[-1]["role"] == "assistant" and (len(records) > 1 or name == "d"):
        assert dialogue == Dialogue(name, "test", TOOLS, tuple(turns))
