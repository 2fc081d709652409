"""Step records: JSON round trip, and one clear line for every fault."""

import dataclasses
import json

import pytest

from rest_jax.data.fields import RecordError
from rest_jax.data.ragged import to_bytes
from rest_jax.data.records import StepRecord, from_json, restored, target_from_text, to_json
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target

RECORD = StepRecord(
    id="r1",
    source="test",
    tools=({"name": "f", "description": "does f", "parameters": {"x": {"type": "integer"}}},),
    history=(
        {"role": "user", "content": "do f twice"},
        {
            "role": "assistant",
            "content": None,
            "calls": [{"name": "f", "arguments": {"x": 1}}],
            "think": "one",
        },
        {"role": "tool", "content": "ok é"},
    ),
    target=Target(calls=(Call("f", {"x": 2, "deep": {"a": [None, 1.5, True]}}),), think="two"),
)


def test_round_trip():
    assert from_json(to_json(RECORD)) == RECORD


def test_round_trip_of_a_rendered_prompt():
    messages = ({"role": "system", "content": "tools"}, {"role": "user", "content": "hi"})
    record = StepRecord(
        "r2",
        "test",
        (),
        (),
        Target(response="hello", text="<response> hello </response>"),
        messages,
    )
    assert from_json(to_json(record)) == record
    assert record.prompt_messages(TEMPLATES["toolrl"]) == list(messages)


def test_version_is_written_and_may_be_missing():
    raw = to_json(RECORD)
    assert raw.pop("version") == 1
    assert from_json(raw) == RECORD


def test_a_verbatim_prompt_is_the_full_toolrl_prompt_only():
    messages = ({"role": "user", "content": "<user>do f</user>"},)
    record = dataclasses.replace(RECORD, messages=messages, extra={"raw": [[["id"], 3]]})
    assert from_json(to_json(record)) == record
    assert record.prompt_messages(TEMPLATES["toolrl"]) == list(messages)
    for template, brief in (("hermes", False), ("llama3", False), ("toolrl", True)):
        expected = RECORD.prompt_messages(TEMPLATES[template], brief)
        assert record.prompt_messages(TEMPLATES[template], brief) == expected


def test_parameters_is_another_word_for_arguments():
    raw = to_json(RECORD)
    raw["target"]["calls"] = [{"name": "f", "parameters": {"x": 2}}]
    assert from_json(raw).target.calls == (Call("f", {"x": 2}),)


def test_columns_of_the_users_own_are_kept_and_nothing_is_added_without_them():
    raw = to_json(RECORD)
    assert "extra" not in to_json(from_json(raw | {"difficulty": None, "share": float("nan")}))
    nan = float("nan")
    deep = {"meta": {"score": nan, "rows": [1, nan, {"s": [nan], "t": -float("inf")}]}, "n": None}
    kept = {"rows": [1, None, {"s": [None]}]}
    assert to_json(from_json(raw | deep))["extra"] == {"meta": kept}
    assert to_json(from_json(raw | {"extra": deep}))["extra"] == {"meta": kept, "n": None}
    own = {"difficulty": 3, "rubric": {"a": [1, "é"]}, "extra": {"seen": True, "difficulty": 4}}
    record = from_json(raw | own)
    assert record.extra == {"difficulty": 4, "rubric": {"a": [1, "é"]}, "seen": True}
    assert restored(json.loads(to_bytes(record))) == record == from_json(to_json(record))


def _told(history, **target):
    """A record of one tool, after a question."""
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    history = [{"role": "user", "content": "u"}, *history]
    raw = {"id": "a", "tools": [tool], "history": history, "target": target}
    return from_json({"version": "", **raw})


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_default_is_one_however_it_is_written(template):
    """Null, an empty text, a text of an empty list and an absent field make the same record, and the same prompt."""
    calls = [{"name": "f", "arguments": {"x": 1}}]
    result = {"role": "tool", "content": ""}
    plain = {"role": "assistant", "content": None, "calls": calls}
    prompt = _told([plain, result], response="x").prompt_messages(template)
    for turn in (
        {**plain, "content": ""},
        {**plain, "think": ""},
        {**plain, "think": None, "calls": json.dumps(calls)},
        {"role": "assistant", "calls": calls},
    ):
        assert _told([turn, result], response="x").prompt_messages(template) == prompt
    said = {"role": "assistant", "content": "x"}
    next_one = {"role": "user", "content": "y"}
    prompt = _told([said, next_one], response="x").prompt_messages(template)
    for calls in ("[]", " ", [], None):
        record = _told([{**said, "calls": calls}, next_one], response="x")
        assert record.prompt_messages(template) == prompt
        assert from_json(to_json(record)) == record


def test_an_empty_text_beside_calls_is_no_answer():
    calls = [{"name": "f", "arguments": {}}]
    record = _told([], calls=calls, response="", think="", text="")
    assert record.target == Target(calls=(Call("f", {}),))
    assert _told([], calls="[]", response="").target.response == ""


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("target",), None, "target: an object"),
        (("target", "calls"), "f()", "target: calls: not JSON: .*: 'f\\(\\)'"),
        (("target", "calls"), {"name": "f"}, "target: calls: a list is needed, found dict"),
        (
            ("target", "calls"),
            [{"name": "f", "arguments": [1]}],
            r"target: calls\[0\]: arguments: an object is needed, found list \[1\]",
        ),
        (
            ("target", "calls"),
            [{"name": 3, "arguments": {}}],
            r"calls\[0\]: name: text is needed, found int",
        ),
        (("target", "answer"), "x", "target: unknown field 'answer'"),
        (("target", "response"), 5, "target: response: text is needed, found int"),
        (("history",), {"role": "user"}, "history: a list is needed, found dict"),
        (("history", 0), {"role": "bot", "content": "x"}, r"history\[0\]: role: 'bot'"),
        (("history", 0), {"role": "user"}, r"history\[0\]: neither content nor calls"),
        (("tools", 0), {"description": "x"}, r"tools\[0\]: name: text is needed, found nothing"),
        (
            ("tools", 0),
            {"name": "f", "parameters": []},
            r"tools\[0\]: parameters: an object is needed, found list",
        ),
        (("messages",), [], "messages: a list"),
        (
            ("messages",),
            [{"role": "user"}],
            r"messages\[0\]: content: text is needed, found nothing",
        ),
        (("histroy",), [], "unknown field 'histroy' \\(is 'history' meant"),
        (("version",), 2, "version: 2 is not known here, 1 is the newest"),
        (("version",), "1", "version: '1' is not known here"),
        (("version",), True, "version: True is not known here"),
        (("extra",), [], "extra: an object is needed, found list"),
    ],
)
def test_faults_name_the_record_and_the_field(path, value, message):
    raw = to_json(RECORD)
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(RecordError, match=message) as caught:
        from_json(raw, "data x.jsonl: line 3")
    assert str(caught.value).startswith("data x.jsonl: line 3: record 'r1': ")
    assert "\n" not in str(caught.value)


def test_a_record_without_an_id():
    raw = to_json(RECORD)
    del raw["id"]
    with pytest.raises(RecordError, match="line 1: id: text is needed, found nothing"):
        from_json(raw, "line 1")


def test_gold_text_is_kept_verbatim_and_read():
    text = '<think> why </think>\n<tool_call>\n{"name": "f",  "parameters": {"x": 1}}\n</tool_call>'
    target = target_from_text(text, "here")
    assert target == Target(calls=(Call("f", {"x": 1}),), think=target.think, text=text)
    assert target.think is not None and target.think.strip() == "why"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just words", "no call, no response"),
        ("<tool_call>\n{'name': 'f'}\n</tool_call>", "1 unreadable call"),
    ],
)
def test_gold_text_that_cannot_be_read(text, message):
    with pytest.raises(RecordError, match=f"here: .*{message}"):
        target_from_text(text, "here")
