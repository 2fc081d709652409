"""Chats as servers log them: every spelling of the same dialogue is the same records, and results are bound to their calls."""

import json

import pytest

from rest_jax.data.convert import SOURCES, openai
from rest_jax.data.fields import RecordError
from rest_jax.tool_calls import Call, Target

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def convert(messages, **item):
    return SOURCES["openai"]({"messages": messages, "tools": [TOOL], **item}, "r", "here")


def user(text):
    return {"role": "user", "content": text}


def call(number, id=None, name="f"):
    function = {"name": name, "arguments": json.dumps({"a": number})}
    return {"id": id, "type": "function", "function": function}


def calls(*listed, **more):
    return {"role": "assistant", "content": None, "tool_calls": list(listed), **more}


def result(text, id=None, **more):
    return {"role": "tool", "tool_call_id": id, "content": text, **more}


SAID = {"role": "assistant", "content": "done"}


def seen(messages):
    """The results in the history of the last record, in order."""
    return [turn["content"] for turn in convert(messages)[-1].history if turn["role"] == "tool"]


PLAIN_CALL = call(1)["function"]
OLD_CALL = {"role": "assistant", "function_call": PLAIN_CALL, "tool_calls": None}
OUTPUT = {"type": "function_call_output", "call_id": "x", "output": "one"}
SHAREGPT = [
    ("human", "go"),
    ("function_call", json.dumps(PLAIN_CALL)),
    ("observation", "one"),
    ("gpt", "done"),
]


AS_TEXT = f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': {'a': 1}})}\n</tool_call>"
TOOL_USE = {"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}}
TOOL_RESULT = {
    "type": "tool_result",
    "tool_use_id": "x",
    "content": [{"type": "text", "text": "one"}],
}


def part(text):
    return {"type": "output_text", "text": text, "annotations": []}


def sharegpt(speaker, text):
    return {"from": speaker, "value": text}


DIALOGUE = [user("go"), calls(call(1, "x")), result("one", "x"), SAID]


@pytest.mark.parametrize("messages", [
    [user("go"), calls(json.dumps(call(1, "x"))), result("one", "x"), SAID],
    [user("go"), calls() | {"tool_calls": json.dumps([call(1, "x")])}, result("one", "x"), SAID],
    [user("go"), calls(call(1, "x"), function_call=call(1)["function"]), result("one", "x"), SAID],
    [user("go"), calls(call(1, "")), result("one", ""), SAID],
    [user("go"), calls(call(1, 0)), result("one", 0), SAID],
    [{"role": "system", "content": None}, *DIALOGUE],
    [user("go"), calls(call(1, " ")), result("one"), SAID],
    [user("go"), calls(call(1)) | {"content": " \n"}, result("one", "x"), SAID],
    [user("go"), OLD_CALL, {"role": "function", "name": "f", "content": "one"}, SAID],
    [user("go"), {"role": "assistant", "content": ""}, calls(call(1, "x"), refusal=""), result("one", "x"), SAID],
    [user("go"), {"role": "assistant", "content": None, "tool_calls": []}, *DIALOGUE[1:]],
    [user([{"type": "input_text", "text": "go"}]), *DIALOGUE[1:3], SAID | {"content": [part("done")]}],
    [user("go"), {"type": "function_call", "call_id": "x", **PLAIN_CALL}, OUTPUT, SAID],
    [sharegpt(*turn) for turn in SHAREGPT],
    [{"role": speaker, "value": text} for speaker, text in SHAREGPT],
    [user("go"), SAID | {"content": AS_TEXT}, {"role": "Tool", "content": "one"}, SAID],
    [user("go"), SAID | {"content": [TOOL_USE]}, {"role": "user", "content": [TOOL_RESULT]}, SAID],
    [user("go"), calls(call(1, "x"), function_call={}), {"role": "ipython", "content": "one"}, SAID | {"tool_calls": {}}],
])  # fmt: skip
def test_every_spelling_is_the_same_dialogue(messages):
    expected = convert(DIALOGUE)
    assert convert(messages) == expected
    assert openai.history(messages[:-1], (TOOL,), "here") == expected[-1].history
    for field in ("conversations", "input"):
        for value in (messages, json.dumps(messages), list(map(json.dumps, messages))):
            assert convert(None, **{field: value}) == expected
            item = json.dumps({field: value, "tools": [TOOL]})
            assert SOURCES["openai"](item, "r", "here") == expected


@pytest.mark.parametrize("asked", ["go", [user("go")]])
def test_request_and_response_of_the_responses_api_are_one_dialogue(asked):
    output = [
        {"type": "function_call", "call_id": "x", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "x", "output": "one"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "done"}],
        },
    ]
    item = {"instructions": "Be brief.", "input": asked, "output": output, "tools": [TOOL]}
    first, last = SOURCES["openai"](item, "r", "here")
    assert first.target == Target((Call("f", {"a": 1}),)) and last.target == Target((), "done")
    assert [turn["content"] for turn in last.history] == ["Be brief.", "go", None, "one"]


def test_sharegpt_has_its_system_text_beside():
    turns = [{"from": "human", "value": "go"}, {"from": "gpt", "value": "done"}]
    raw = {"system": "Be kind.", "conversations": turns, "tools": json.dumps([TOOL])}
    (record,) = SOURCES["openai"](raw, "r", "here")
    assert record.history == ({"role": "system", "content": "Be kind."}, user("go"))
    assert record.target == Target(response="done")


def test_results_are_bound_to_their_calls():
    two = calls(call(1, "x"), call(2, "y"))
    assert seen([two, result("b", "y"), result("a", "x"), SAID]) == ["a", "b"]
    unnamed = calls(call(1, ""), call(2, ""))
    assert seen([unnamed, result("a", ""), result("b", ""), SAID]) == ["a", "b"]
    assert seen([unnamed, result("a", "i"), result("b", "j"), SAID]) == ["a", "b"]
    names = calls(call(1, name="f"), call(2, name="g"))
    assert seen([names, result("b", name="g"), result("a", name="f"), SAID]) == ["a", "b"]
    shared = calls(call(1, "x", "f"), call(2, "x", "g"))
    assert seen([shared, result("a", "x"), result("b", "x"), SAID]) == ["a", "b"]
    named = [result("b", "x", name="g"), result("a", "x", name="f")]
    assert seen([shared, *named, SAID]) == ["a", "b"]
    mixed = calls(call(1, "x"), call(2))
    assert seen([mixed, result("b"), result("a", "x"), SAID]) == ["a", "b"]
    run = [calls(call(1, "x")), calls(call(2, "x"))]  # some servers count from zero in each message
    assert seen([*run, result("a", "x"), result("b", "x"), SAID]) == ["a", "b"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([calls(call(1, "x"), call(2, "y")), result("b", "y"), SAID], r"tool_calls\[0\]: the call of 'f' \(id 'x'\) has no"),
        ([calls(call(1), call(2)), result("a"), SAID], r"\[0\]: tool_calls\[1\]: the call of 'f' has no result"),
        ([calls(call(1, "x")), user("and?"), SAID], r"\[0\]: tool_calls\[0\]: the call of 'f' \(id 'x'\) has no result"),
        ([calls(call(1, "x")), SAID], "the call of 'f' .* has no result"),
        ([calls(call(1, "x")), result("a", "x"), result("b", "x"), SAID], r"\[2\]: tool_call_id: 'x' has a result already"),
        ([calls(call(1, "x")), result("a", "z"), SAID], r"\[1\]: tool_call_id: 'z' is no call of the message before"),
        ([calls(call(1)), result("a"), result("b"), SAID], r"\[2\]: a tool result without a call before it"),
        ([result("a"), SAID], r"\[0\]: a tool result without a call before it"),
        ([calls(call(1, "x"), call(2, "x")), result("a", "x"), SAID], r"\[1\]: the call of 'f' \(id 'x'\) has no result"),
        ([user("a"), {"role": "assistant", "content": " "}], r"\[1\]: neither content nor calls"),
        ([user("a"), {"type": "web_search_call"}, SAID], r"\[1\]: type: 'web_search_call' is not known"),
        ([user(3), SAID], r"\[0\]: content: a list is needed, found int 3"),
        ([user([{"type": "image_url"}]), SAID], r"content\[0\]: type: 'image_url' is not 'text'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(messages, message):
    with pytest.raises(RecordError, match=message):
        convert([user("go"), *messages][1:])


def test_calls_at_the_end_need_no_result():
    for tail in ([], [result("a", "x")]):
        (record,) = convert([user("go"), calls(call(1, "x"), call(2, "y")), *tail])
        assert record.target == Target((Call("f", {"a": 1}), Call("f", {"a": 2})))


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_a_thought_is_kept_under_each_of_its_names(field):
    thought = {field: "because"}
    first, second = convert(
        [user("go"), calls(call(1, "x"), **thought), result("a", "x"), SAID | thought]
    )
    assert first.target.think == second.target.think == "because"
    assert second.history[1]["think"] == "because"


def test_a_thought_in_a_message_of_its_own_is_that_of_the_next():
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "because"}]}
    for thought in (item, {"role": "assistant", "content": "", "reasoning": "because"}):
        (record,) = convert([user("go"), thought, calls(call(1, "x"))])
        assert record.target == Target((Call("f", {"a": 1}),), None, "because")
        (record,) = convert([user("go"), thought, user("well?"), SAID])
        assert record.target == Target(response="done")


def test_blocks_of_calls_and_results_may_stand_among_text():
    second = {**TOOL_USE, "id": "y", "input": {"a": 2}}
    texts = [{"type": "text", "text": text} for text in ("wait", "and?")]
    results = [{**TOOL_RESULT, "tool_use_id": "y", "content": "two"}, TOOL_RESULT, texts[1]]
    asked = {"role": "assistant", "content": [texts[0], TOOL_USE, second]}
    first, last = convert([user("go"), asked, {"role": "user", "content": results}, SAID])
    assert first.target == Target((Call("f", {"a": 1}), Call("f", {"a": 2})), "wait")
    assert [turn["content"] for turn in last.history] == ["go", "wait", "one", "two", "and?"]


def test_a_call_as_text_may_have_its_result_as_text():
    *_, record = convert([user("go"), SAID | {"content": AS_TEXT}, user("<obs>one</obs>"), SAID])
    assert record.history[1]["calls"] == [{"name": "f", "arguments": {"a": 1}}]
    assert record.target == Target(response="done")


def block(text):
    return f"<tool_response>\n{text}\n</tool_response>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{block('one')}\n{block('two')}", ["one", "two"]),
        (f" {block('')}{block('{}')} \n", ["", "{}"]),
        (block("one"), ["one"]),
        (f"{block('one')} and", [f"{block('one')} and"]),
        (block("a <tool_response> b"), [block("a <tool_response> b")]),
        ("one", ["one"]),
    ],
)
def test_the_results_of_calls_as_text_may_be_blocks_of_one_message(content, expected):
    asked = SAID | {"content": f"{AS_TEXT}\n{AS_TEXT}"}
    assert seen([user("go"), asked, {"role": "tool", "content": content}, SAID]) == expected
    assert seen([user("go"), asked, result(content, "m1"), SAID]) == expected
    last = {"role": "tool", "content": content}
    history = openai.history([user("go"), asked, last], (TOOL,), "here")
    assert [turn["content"] for turn in history[2:]] == expected


def test_a_result_with_the_id_of_its_call_is_its_text():
    text = f"{block('one')}\n{block('two')}"
    assert seen([user("go"), calls(call(1, "x")), result(text, "x"), SAID]) == [text]
    assert seen([user("go"), calls(call(1), call(2)), result(text), SAID]) == ["one", "two"]
    with pytest.raises(RecordError, match=r"^here: messages\[2\]: a tool result without a call"):
        convert([user("go"), SAID | {"content": AS_TEXT}, result(text), SAID])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "Assistant ", "content": "done"},
        SAID
        | {"content": [None, {"type": "text", "text": None}, {"type": "text", "text": "done"}]},
        SAID | {"content": {"type": "text", "text": {"value": "done", "annotations": []}}},
        SAID | {"function_call": {"name": None, "arguments": None}},
        SAID | {"function_call": {"name": "", "arguments": ""}, "tool_calls": {}},
    ],
)
def test_what_says_nothing_is_the_default(message):
    (record,) = convert([user("go"), message])
    assert record.target == Target(response="done")


@pytest.mark.parametrize("arguments", [None, "", " ", "null", [], "[]", {}, "{}", '"{}"'])
def test_a_call_without_arguments(arguments):
    asked = calls({"id": " x", "function": {"name": "f", "arguments": arguments}})
    asked["tool_calls"] = asked["tool_calls"][0]  # a call that is no list
    said = {"role": "tool", "tool_call_id": "x", "output": "a"}
    assert seen([asked, said, SAID]) == ["a"]
    (record,) = convert([user("go"), asked])
    assert record.target == Target((Call("f", {}),))


def test_refusals_and_objects_are_texts():
    refusing = {"role": "assistant", "content": None, "refusal": "I will not."}
    (record,) = convert([user("go"), refusing])
    assert record.target == Target(response="I will not.")
    *_, record = convert([user("go"), calls(call(1, "x")), result({"ort": "Köln"}, "x"), SAID])
    assert record.history[2]["content"] == '{"ort": "Köln"}'


def test_system_turns_stay_where_they_are():
    late = {"role": "developer", "content": "Now in French."}
    records = convert([user("go"), SAID, late, user("again"), SAID])
    assert [turn["role"] for turn in records[1].history] == ["user", "assistant", "system", "user"]


def test_weights_count_for_the_turns_that_are_kept():
    empty, unlearned = {"role": "assistant", "content": ""}, SAID | {"weight": 0}
    records = convert([user("go"), empty, unlearned, user("again"), empty, SAID])
    assert [record.id for record in records] == ["r/1"]


def test_nothing_that_is_no_number_is_kept_of_what_an_item_says_besides():
    messages = [user("go"), SAID]
    (record,) = convert(messages, meta={"score": float("nan"), "by": [float("inf"), "me"]})
    assert record.extra == {"meta": {"by": [None, "me"]}}


def test_a_history_is_all_before_the_next_turn():
    """Every result has its call, in the order of the calls; a turn that says nothing is left out."""
    chat = [
        {"role": "user", "content": "Both?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Well?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "look",
            "tool_calls": [
                {"id": i, "function": {"name": "get", "arguments": json.dumps({"n": i})}}
                for i in "ab"
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    calls = [{"name": "get", "arguments": {"n": i}} for i in "ab"]
    assert openai.history(chat, [{"name": "get"}], "chat") == (
        *(chat[0], chat[2]),
        {"role": "assistant", "content": None, "calls": calls, "think": "look"},
        *({"role": "tool", "content": text} for text in "12"),
    )
    with pytest.raises(RecordError, match=r"chat\[3\].*has no result"):
        openai.history(chat[:-1], [{"name": "get"}], "chat")
