"""What is wrong with a raw item is said in one line: place, field, value."""

import json
import pathlib

import pytest

from rest_jax.data.convert import SOURCES
from rest_jax.data.fields import RecordError, check_depth

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def _load(source):
    return json.loads((FIXTURES / f"{source}.json").read_text(encoding="utf-8"))


_DROP = object()
FAULTS = [
    ("openai", 0, ("messages",), _DROP, "messages: a list is needed, found nothing"),
    (
        "openai",
        0,
        ("messages", 1, "role"),
        "narrator",
        r"messages\[1\]: role: 'narrator' is not one of",
    ),
    ("openai", 0, ("messages", 1, "content"), None, r"messages\[1\]: content: text is needed"),
    (
        "openai",
        0,
        ("messages", 1, "content"),
        [{"type": "image_url"}],
        r"content\[0\]: type: 'image_url' is not 'text'",
    ),
    (
        "openai",
        0,
        ("messages", 3, "tool_call_id"),
        "x",
        r"messages\[3\]: tool_call_id: 'x' is no call",
    ),
    ("openai", 0, ("messages", 2), _DROP, r"messages\[2\]: a tool result without a call"),
    (
        "openai",
        0,
        ("messages", 2, "tool_calls", 1, "id"),
        "call_k9",
        r"messages\[3\]: tool_call_id: .* is no call of the message before",
    ),
    (
        "openai",
        0,
        ("messages", 2, "tool_calls", 0, "function", "arguments"),
        "{'a': 1}",
        r"tool_calls\[0\]: function: arguments: not JSON",
    ),
    (
        "openai",
        0,
        ("messages", 2, "tool_calls", 0, "function", "arguments"),
        '{"a": 1, "a": 2}',
        "arguments: not JSON: an object has the same key twice",
    ),
    (
        "openai",
        0,
        ("messages", 2, "tool_calls", 0, "function", "arguments"),
        '{"a": NaN}',
        "arguments: not JSON: NaN",
    ),
    (
        "openai",
        0,
        ("messages", 2, "tool_calls", 0, "function", "arguments"),
        "[" * 100_000,
        "arguments: not JSON",
    ),
    ("openai", 0, ("messages", 5, "content"), None, r"messages\[5\]: neither content nor calls"),
    ("openai", 0, ("tools", 0, "type"), "retrieval", r"tools\[0\]: type: 'retrieval'"),
    ("openai", 0, ("tools", 0, "function", "name"), 3, r"tools\[0\]: function: name: text"),
    ("openai", 3, ("messages", 1), _DROP, "no assistant message to learn from"),
    ("openai", 3, ("messages", 1, "weight"), 0, "no assistant message to learn from"),
    ("toolace", 0, ("system",), "No tools.", "system: no JSON list of tools"),
    ("toolace", 0, ("conversations", 0, "from"), "bot", r"conversations\[0\]: from: 'bot'"),
    ("toolace", 0, ("conversations", 3, "value"), " ", r"conversations\[3\]: value: an empty turn"),
    (
        "toolace",
        0,
        ("conversations", 5, "value"),
        "[Market Trends API(trend_type=down)]",
        r"conversations\[5\]: value: unreadable calls: character 30: a value is needed",
    ),
    (
        "toolace",
        0,
        ("conversations", 5, "value"),
        "[Other(a=1)]",
        r"calls 'Other', which is not among the tools",
    ),
    ("xlam", 0, ("query",), 3, "query: text is needed, found int"),
    ("xlam", 0, ("tools",), "{}", "tools: a list is needed, found dict"),
    ("xlam", 0, ("answers",), "[]", "answers: empty"),
    ("xlam", 0, ("answers",), "f(1)", "answers: not JSON"),
    ("xlam", 0, ("answers",), '[{"name": "f", "argument": {}}]', "unknown field 'argument'"),
    (
        "xlam",
        0,
        ("answers",),
        '[{"name": " "}]',
        r"answers\[0\]: name: a name is needed, found ' '",
    ),
    (
        "xlam",
        0,
        ("tools",),
        '[{"name": "f", "parameters": {"x": "int"}}]',
        r"tools\[0\]: parameters: x: an object is needed, found str",
    ),
    (
        "xlam",
        0,
        ("answers",),
        '[{"name": "f", "arguments": {"x": ' + "[" * 200 + "]" * 200 + "}}]",
        "answers: nests deeper than 64",
    ),
    ("hammer", 0, ("answers",), None, "answers: a list is needed, found nothing"),
    ("rlla", 0, ("input",), _DROP, "input: text is needed, found nothing"),
    ("rlla", 0, ("output",), "words", "output: the gold answer has no call"),
    ("rlla", 2, ("prompt", 0), "words", r"prompt\[0\].role: None is not one of"),
    ("rlla", 2, ("reward_model",), None, "reward_model.ground_truth: text is needed"),
    ("api_bank", 0, ("answer",), [], "answer: empty"),
    ("api_bank", 0, ("answer",), None, r"answer\[0\]: an object"),
    ("api_bank", 0, ("system",), 3, "system: text is needed, found int"),
]


@pytest.mark.parametrize(("source", "index", "path", "value", "message"), FAULTS)
def test_faults_name_the_place_the_field_and_the_value(source, index, path, value, message):
    raw = _load(source)[index]
    node = raw
    for key in path[:-1]:
        node = node[key]
    if value is _DROP:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    with pytest.raises(RecordError, match=message) as caught:
        SOURCES[source](raw, "s", "data x: item 4")
    assert str(caught.value).startswith("data x: item 4: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("raw", [None, 3, "text", [], {}])
def test_another_shape_is_refused(source, raw):
    with pytest.raises(RecordError, match=r"here: .*(needed|not JSON)"):
        SOURCES[source](raw, "s", "here")


@pytest.mark.parametrize("source", list(SOURCES))
def test_an_item_that_nests_too_deeply_is_refused(source):
    raw = _load(source)[0]
    deep = raw["more"] = {}
    for _ in range(5000):
        deep["x"] = {}
        deep = deep["x"]
    with pytest.raises(RecordError, match="here: nests deeper than 64"):
        SOURCES[source](raw, "s", "here")


def test_depth_is_bounded():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecordError, match="here: nests deeper than 64"):
        check_depth({"a": deep}, "here")
    while deep:  # taken apart by hand: nested this deep, even freeing it recurses
        deep = deep.pop()
