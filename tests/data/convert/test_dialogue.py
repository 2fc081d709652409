"""Decomposition: hand-written dialogues with their steps, and properties over any turns."""

import hypothesis
import hypothesis.strategies as st

from rest_jax.data.records import StepRecord, decompose
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
    return decompose("d", "test", TOOLS, turns)


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


@hypothesis.given(st.lists(OTHERS | ACTIONS | st.builds(_says, WORDS), max_size=8))
def test_every_answer_is_learned_once_and_seen_by_all_later_steps(turns):
    records = _steps(*turns)
    said = [t for t in turns if t["role"] == "assistant"]
    calls = [(c["name"], c["arguments"]) for t in said for c in t.get("calls", ())]
    assert [(c.name, c.arguments) for r in records for c in r.target.calls] == calls
    for step, record in enumerate(records):
        assert record.id == (f"d/{step}" if len(records) > 1 else "d")
        before = [t for t in record.history if t["role"] == "assistant"]
        assert before == [_turn(r.target) for r in records[:step]]
        others = [t for t in record.history if t["role"] != "assistant"]
        assert others == [t for t in turns if t["role"] != "assistant"][: len(others)]


def _turn(target):
    calls = [{"name": c.name, "arguments": c.arguments} for c in target.calls]
    more = {"calls": calls} if calls else {}
    return _says(
        target.response, **more, **({} if target.think is None else {"think": target.think})
    )
