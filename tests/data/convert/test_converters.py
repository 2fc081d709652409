"""Every source on its fixture: the records of the golden file, some of them spelled out by hand; and the real files.

A golden file is made anew with `REST_JAX_GOLDEN=write`; read what changed before it is committed.
"""

import copy
import json
import os
import pathlib

import pytest

from rest_jax.data.convert import SOURCES
from rest_jax.data.convert.xlam import NO_CALL
from rest_jax.data.fields import RecordError
from rest_jax.data.items import read_items
from rest_jax.data.records import StepRecord, from_json, to_json
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
GOLDEN = pathlib.Path(__file__).parent / "golden"


def _load(source):
    return json.loads((FIXTURES / f"{source}.json").read_text(encoding="utf-8"))


def _convert(source, index):
    return SOURCES[source](_load(source)[index], f"s-{index}", "here")


def _user(text):
    return {"role": "user", "content": text}


def _calls(*calls, content=None, **more):
    named = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"role": "assistant", "content": content, "calls": named, **more}


def _target(*calls, **more):
    return Target(calls=tuple(Call(*call) for call in calls), **more)


@pytest.mark.parametrize("source", list(SOURCES))
def test_the_records_are_those_of_the_golden_file(source):
    items, path = _load(source), GOLDEN / f"{source}.json"
    before = copy.deepcopy(items)
    made = [SOURCES[source](raw, f"{source}-{i}", "here") for i, raw in enumerate(items)]
    assert items == before
    text = json.dumps([list(map(to_json, some)) for some in made], indent=1, ensure_ascii=False)
    if os.environ.get("REST_JAX_GOLDEN") == "write":
        path.write_text(f"{text}\n", encoding="utf-8")
    assert text == path.read_text(encoding="utf-8").rstrip("\n")
    for records in made:
        assert [from_json(json.loads(json.dumps(to_json(r)))) for r in records] == records
        assert len({r.id for r in records}) == len(records)
        for record in records:
            assert record.source == source
            for template in TEMPLATES.values():
                assert record.prompt_messages(template)
                assert template.render_answer(record.target) or record.target.response == ""


@pytest.mark.parametrize(
    ("source", "name", "count"),
    [
        ("rlla", "rlla/rlla_sft.json", 400),
        ("rlla", "rlla/test.parquet", 80),
        ("api_bank", "api_bank/level-1-api_processed.json", 399),
        ("api_bank", "api_bank/level-2-api_processed.json", 67),
        ("api_bank", "api_bank/level-3-api_processed.json", 131),
    ],
)
def test_every_real_item_becomes_a_record(data_dir, source, name, count):
    """Its prompt in the toolrl template is the real one, byte for byte; API-Bank's is kept as text."""
    items = list(read_items(data_dir / name))
    assert len(items) == count
    for item in items:
        (record,) = SOURCES[source](item.raw, "r", item.where)
        assert from_json(json.loads(json.dumps(to_json(record)))) == record
        assert record.tools and record.history and (record.target.calls or record.target.response)
        raw = item.raw
        # rendering escapes no letter: prompts that do are kept as text
        escaped = "\\u" in json.dumps(
            raw.get("prompt") or raw.get("instruction"), ensure_ascii=False
        )
        assert (record.messages is not None) == (source == "api_bank" or escaped)
        said = raw.get("prompt") or [
            {"role": "system", "content": raw.get("instruction", raw.get("system"))},
            {"role": "user", "content": raw.get("input", raw.get("user"))},
        ]
        assert record.prompt_messages(TEMPLATES["toolrl"]) == [
            {"role": m["role"], "content": m["content"]} for m in said
        ]


WEATHER = {
    "name": "weather",
    "description": "Weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["town"],
    },
    "strict": True,
}


def test_openai_parallel_calls_with_results_out_of_order():
    both = [("weather", {"town": "Köln"}), ("weather", {"town": "Rome", "days": 2})]
    tools = (WEATHER, {"name": "now"})
    asked = (
        {"role": "system", "content": "Be brief."},
        _user("Weather in Köln and in Rome?"),
    )
    results = (
        {"role": "tool", "content": '{"rain": true}'},
        {"role": "tool", "content": '{"error": "no such town"}'},
    )
    records = _convert("openai", 0)
    extra = {"id": "log-17", "parallel_tool_calls": True}
    assert records == [
        StepRecord("s-0/0", "openai", tools, asked, _target(*both), extra=extra),
        StepRecord(
            "s-0/1",
            "openai",
            tools,
            (*asked, _calls(*both), *results),
            Target(response="Rain in Köln; Rome failed."),
            extra=extra,
        ),
    ]


def test_openai_parts_thought_weights_and_a_refusal():
    asked = ({"role": "system", "content": "Be kind."}, _user("What time?"))
    calls = [("now", {}), ("now", {"zone": "UTC"})]
    results = ({"role": "tool", "content": "9"}, {"role": "tool", "content": "8"})
    action = _calls(*calls, think="I look.")
    late = ({"role": "assistant", "content": "Nine."}, _user("Sure?"))
    assert _convert("openai", 1) == [
        StepRecord("s-1/0", "openai", ({"name": "now"},), asked, _target(*calls, think="I look.")),
        StepRecord(
            "s-1/2",
            "openai",
            ({"name": "now"},),
            (*asked, action, *results, *late),
            Target(response="I cannot tell."),
        ),
    ]


def test_openai_of_old():
    tool = {
        "name": "greet",
        "description": "Greets.",
        "parameters": {"type": "object", "properties": {}},
    }
    history = (_user("Hi"), _calls(("greet", {})), {"role": "tool", "content": "hello"})
    records = _convert("openai", 2)
    assert records == [
        StepRecord("s-2/0", "openai", (tool,), history[:1], _target(("greet", {}))),
        StepRecord("s-2/1", "openai", (tool,), history, Target(response="hello")),
    ]


def test_openai_without_tools_needs_nothing_more():
    (record,) = _convert("openai", 3)
    assert record == StepRecord("s-3", "openai", (), (_user("2 + 2?"),), Target(response="4"))


def test_toolace_names_values_and_a_text_in_brackets():
    tools = (
        {
            "name": "Market Trends API",
            "description": "Trends, e.g. [up, down].",
            "parameters": {
                "type": "object",
                "properties": {
                    "trend_type": {"type": "string"},
                    "limit": {"type": "integer"},
                    "at": {
                        "type": "object",
                        "properties": {"lat": {"type": "number"}, "type": {"type": "string"}},
                    },
                },
                "required": ["trend_type"],
            },
        },
        {
            "name": "news.find(v2)",
            "description": "Finds news.",
            "parameters": {
                "type": "object",
                "properties": {"q": {"type": "array", "items": {"type": "string"}}},
            },
        },
    )
    both = [
        (
            "Market Trends API",
            {"trend_type": 'UP, [x] "y"', "limit": 5, "at": {"lat": 1.5, "type": "a"}},
        ),
        ("news.find(v2)", {"q": ["a)", "b"]}),
    ]
    result = (
        '[{"name": "Market Trends API", "results": {"error": "busy"}}, '
        '{"name": "news.find(v2)", "results": []}]'
    )
    history = (
        _user("Trends and news, please."),
        _calls(*both),
        {"role": "tool", "content": result},
        {"role": "assistant", "content": "[Note (important)]: nothing new."},
        _user("Again."),
    )
    records = _convert("toolace", 0)
    assert records == [
        StepRecord("s-0/0", "toolace", tools, history[:1], _target(*both)),
        StepRecord("s-0/1", "toolace", tools, history[:3], Target(response=history[3]["content"])),
        StepRecord(
            "s-0/2",
            "toolace",
            tools,
            history,
            _target(("Market Trends API", {"trend_type": "down"})),
        ),
    ]


def test_toolace_keeps_what_the_system_text_says_besides():
    tool = {
        "name": "now",
        "description": "Zeit für alle",
        "parameters": {"type": "object", "properties": {}},
    }
    history = (
        {"role": "system", "content": "The current time is 2024-05-01 10:00:00."},
        _user("What time?"),
        _calls(("now", {})),
        {"role": "tool", "content": "10"},
    )
    assert _convert("toolace", 1) == [
        StepRecord("s-1/0", "toolace", (tool,), history[:2], _target(("now", {})), extra={"id": 3}),
        StepRecord("s-1/1", "toolace", (tool,), history, Target(response="Ten."), extra={"id": 3}),
    ]


def test_xlam():
    tool = {
        "name": "giveaways",
        "description": "Live giveaways über all.",
        "parameters": {"type": {"description": "Kind.", "type": "str", "default": "game"}},
    }
    (record,) = _convert("xlam", 0)
    assert record == StepRecord(
        "s-0",
        "xlam",
        (tool,),
        (_user("Where can I find live giveaways for beta access and games?"),),
        _target(
            ("giveaways", {"type": "beta"}),
            ("giveaways", {"type": "game", "deep": {"a": [1, None, 1.0, True]}}),
        ),
        extra={"id": 0},
    )
    schema = TEMPLATES["hermes"].render_prompt(record.tools, record.history)[0]["content"]
    assert '"type": {"type": "string", "description": "Kind.", "default": "game"}' in schema


def test_hammer_without_and_with_the_right_tool():
    (irrelevant,), (masked,) = _convert("hammer", 0), _convert("hammer", 1)
    assert (irrelevant.target, irrelevant.history) == (
        Target(response=NO_CALL),
        (_user("Book a table for two."),),
    )
    assert [t["name"] for t in irrelevant.tools] == ["cancel"]
    assert (masked.target, masked.history) == (
        _target(("x9Tq", {"pW": 4})),
        (_user("Cancel 4."),),
    )


def test_rlla_is_read_into_tools_and_history():
    tools = (
        {
            "name": "Fuel Price",
            "description": "Price of fuel in a land.",
            "parameters": {"land": {"description": "ISO code, é", "type": "string", "default": ""}},
        },
        {"name": "ping", "description": "", "parameters": {}},
    )
    both = _calls(("Fuel Price", {"land": "FR"}), ("ping", {}), think="I look it up.")
    history = (
        _user("Diesel in FR?"),
        both,
        {"role": "tool", "content": '[{"name": "Fuel Price", "results": {"error": "busy"}}]'},
        {"role": "assistant", "content": "It is busy.", "think": "Sorry."},
        _user("Again, {please}."),
    )
    text = _load("rlla")[0]["output"]
    target = _target(("Fuel Price", {"land": "FR"}), think="Once more.\n\nYes.", text=text)
    assert _convert("rlla", 0) == [StepRecord("s-0", "rlla", tools, history, target)]


def test_rlla_text_that_rendering_does_not_give_is_kept():
    (record,) = _convert("rlla", 1)
    raw = _load("rlla")[1]
    assert record.history == (_user("No spaces"),)
    assert record.messages == (
        {"role": "system", "content": raw["instruction"]},
        {"role": "user", "content": raw["input"]},
    )


def test_api_bank_is_read_into_tools_and_history():
    (record,) = _convert("api_bank", 0)
    tool = {
        "name": "Find",
        "description": "Finds.",
        "parameters": {"key": {"type": "str", "description": "A user's key"}},
    }
    assert record.tools == (tool,)
    assert record.history == (
        _user("Find my card."),
        {"role": "assistant", "content": "Which?"},
        _user("The blue."),
        _calls(("Find", {"key": "blue"}), content="Let me see."),
        {"role": "tool", "content": "{'error': None}"},
        _user("Based on our conversation above, please only make one tool call to solve my need."),
    )
    assert record.target == _target(("Find", {"key": "card"}))
    assert record.messages is not None  # other spaces, Python literals


@pytest.mark.parametrize("parameters", [
    {"properties": {"town": {"type": "string"}}, "required": ["town"]},
    {"type": "dict", "properties": {"town": {"type": "string"}}},
    {"type": "Object", "properties": {"type": {"type": "string"}}},
    {"type": None, "properties": {}},
    {"type": ["object", "null"], "properties": {"town": {}}},
    {"type": "dict"},
])  # fmt: skip
@pytest.mark.parametrize("source", ["openai", "xlam", "toolace"])
def test_a_schema_of_parameters_gets_its_type(source, parameters):
    tool = {"name": "weather", "description": "W.", "parameters": parameters}
    raw = _item_with(source, tool)
    *_, record = SOURCES[source](raw, "r", "here")
    assert record.tools[0]["parameters"] == {**parameters, "type": "object"}
    for template in TEMPLATES.values():
        said = json.dumps(template.render_prompt(list(record.tools), list(record.history)))
        assert all(name in said for name in parameters.get("properties", {}))


def _item_with(source, tool):
    """An item of a source with one tool and an answer in words or a call of it."""
    if source == "openai":
        messages = [_user("x"), {"role": "assistant", "content": "y"}]
        return {"messages": messages, "tools": [{"type": "function", "function": tool}]}
    if source == "xlam":
        answers = [{"name": "weather", "arguments": {}}]
        return {"query": "x", "answers": json.dumps(answers), "tools": json.dumps([tool])}
    said = [{"from": "user", "value": "x"}, {"from": "assistant", "value": "y"}]
    return {"system": f"Tools: {json.dumps([tool])}", "conversations": said}


def test_a_flat_form_with_parameters_called_type_and_properties_stays_flat():
    for parameters in (
        {"type": {"description": "T.", "type": "str"}, "properties": {"type": "str"}},
        {"properties": {"description": "P.", "type": "str", "default": ""}},
    ):
        (record,) = SOURCES["xlam"](
            _item_with("xlam", {"name": "weather", "parameters": parameters}), "r", "here"
        )
        assert record.tools[0]["parameters"] == parameters


@pytest.mark.parametrize("dump", [
    json.dumps, lambda x: json.dumps(x, ensure_ascii=False, separators=(",", ":")),
    lambda x: json.dumps(x, indent=3),
])  # fmt: skip
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_openai_lists_that_are_text(index, dump):
    raw = _load("openai")[index]
    texts = {k: dump(v) for k, v in raw.items() if k in ("messages", "tools", "functions")}
    records = SOURCES["openai"]({**raw, **texts}, f"s-{index}", "here")
    assert records == _convert("openai", index)


@pytest.mark.parametrize("said", [
    "[now(zone='UTC')", "[now()].", "Sure. [now()]", "now(zone='UTC')", "[now('UTC')].", "[now(zone=)]",
])  # fmt: skip
def test_toolace_an_answer_meant_as_calls_is_no_text(said):
    with pytest.raises(
        RecordError, match=r"conversations\[1\]: value: (has a call of 'now'|unread)"
    ):
        SOURCES["toolace"](_toolace(said), "r", "here")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ('"name": "later"', "an object has the same key twice: 'name'"),
        ('"enum": [], "max": NaN', "NaN is not a JSON number"),
        ('"enum": [], "max": 1e999', "1e999 is too large a number"),
    ],
)
def test_toolace_tools_are_read_strictly(member, message):
    raw = _toolace("[now()]")
    raw["system"] = raw["system"].replace('"name": "now"', f'"name": "now", {member}')
    with pytest.raises(RecordError, match=f"here: system: tools: not JSON: {message}"):
        SOURCES["toolace"](raw, "r", "here")


@pytest.mark.parametrize("said", ["[now(zone='UTC'), ]", "[now(zone='UTC'),]"])
def test_toolace_a_comma_behind_the_last_call(said):
    raw = _toolace(said)
    (record,) = SOURCES["toolace"](raw, "r", "here")
    assert record.target == _target(("now", {"zone": "UTC"}))


@pytest.mark.parametrize(
    "said", ["It is 10 now (UTC).", "[Note (later)]", "Which zone?", "know(x)"]
)
def test_toolace_texts_stay_texts(said):
    (record,) = SOURCES["toolace"](_toolace(said), "r", "here")
    assert record.target == Target(response=said)


def _toolace(said):
    system = (
        f"Tools: {json.dumps([{'name': 'now', 'parameters': {'type': 'dict', 'properties': {}}}])}"
    )
    turns = [{"from": "user", "value": "x"}, {"from": "assistant", "value": said}]
    return {"system": system, "conversations": turns}


@pytest.mark.parametrize("tools", ["", " ", "[]", "null"])
def test_openai_a_text_that_lists_no_tools(tools):
    raw = {**_load("openai")[3], "tools": tools}
    records = SOURCES["openai"](raw, "s-3", "here")
    assert records == _convert("openai", 3)
