"""Placement and reading of answers, case by case: what every byte is, which calls are read, which blocks are seen."""

import json

import pytest

from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Block, Call, Region, Target

LETTERS = {
    Region.TAG: "t",
    Region.SCAFFOLD: ".",
    Region.NAME: "N",
    Region.PARAM: "P",
    Region.THINK: "h",
    Region.RESPONSE: "r",
    Region.OTHER: "x",
}
T, C, R, X, BAD = Block.THINK, Block.CALLS, Block.RESPONSE, Block.TEXT, Block.BROKEN


def picture(answer) -> str:
    """One letter a byte."""
    out, start = [], 0
    for end, region in zip(answer.span_ends.tolist(), answer.span_regions.tolist(), strict=True):
        out.append(LETTERS[Region(region)] * (end - start))
        start = end
    return "".join(out)


def parse(template: str, text: str | bytes):
    return TEMPLATES[template].parse(text.encode() if isinstance(text, str) else text)


def test_every_byte_of_a_toolrl_answer():
    rows = [
        ("<think>", "t"),
        (" so \\n", "h"),
        ("</think>", "t"),
        ("\n", "."),
        ("<tool_call>", "t"),
        ('\n{"name": "', "."),
        ("get_é", "N"),
        ('", "parameters": ', "."),
        ('{"a": {"b": [1, "}\\""]}}', "P"),
        ('}\n{"name": "', "."),
        ("two", "N"),
        ('", "parameters": ', "."),
        ("{}", "P"),
        ("}\n", "."),
        ("</tool_call>", "t"),
        ("\n", "."),
        ("<response>", "t"),
        (" done ", "r"),
        ("</response>", "t"),
        ("\n", "."),
    ]
    answer = parse("toolrl", "".join(text for text, _ in rows))
    assert picture(answer) == "".join(letter * len(text.encode()) for text, letter in rows)
    assert answer.calls == (Call("get_é", {"a": {"b": [1, '}"']}}), Call("two", {}))
    assert (answer.think, answer.response, answer.broken_calls) == ("so \\n", "done", 0)
    assert answer.blocks == (T, C, R)


def test_every_byte_of_a_hermes_answer():
    rows = [
        ("<think>", "t"),
        ("\nx\n", "h"),
        ("</think>", "t"),
        ("\n\n", "."),
        ("Let me see.", "r"),
        ("\n", "."),
        ("<tool_call>", "t"),
        ('\n{"arguments": ', "."),
        ('{"q": "<tool_call>"}', "P"),
        (', "name": "', "."),
        ("f", "N"),
        ('"}\n', "."),
        ("</tool_call>", "t"),
    ]
    answer = parse("hermes", "".join(text for text, _ in rows))
    assert picture(answer) == "".join(letter * len(text) for text, letter in rows)
    assert answer.calls == (Call("f", {"q": "<tool_call>"}),)
    assert answer.response == "Let me see."
    assert answer.blocks == (T, R, C)


def test_every_byte_of_a_llama3_answer():
    rows = [
        ("<|python_tag|>", "t"),
        ('{"name": "', "."),
        ("f", "N"),
        ('", "parameters": ', "."),
        ('{"a": 1}', "P"),
        ('}; {"name": "', "."),
        ("g", "N"),
        ('", "parameters": ', "."),
        ("{}", "P"),
        ("}\n", "."),
    ]
    answer = parse("llama3", "".join(text for text, _ in rows))
    assert picture(answer) == "".join(letter * len(text) for text, letter in rows)
    assert answer.calls == (Call("f", {"a": 1}), Call("g", {}))
    assert answer.blocks == (C, C)


CALLS = [Call("f", {"x": [1, {"name": "no"}]}), Call("g", {})]
OBJECTS = [{"name": c.name, "parameters": c.arguments} for c in CALLS]


LAYOUTS = {
    "lines": "\n".join(map(json.dumps, OBJECTS)),
    "pretty": "\n".join(json.dumps(o, indent=2) for o in OBJECTS),
    "concatenated": "".join(map(json.dumps, OBJECTS)),
    "semicolon": "; ".join(map(json.dumps, OBJECTS)),
    "commas": ",\n".join(map(json.dumps, OBJECTS)) + ",",
    "list": json.dumps(OBJECTS),
    "pretty list": json.dumps(OBJECTS, indent=4),
    "arguments": json.dumps(OBJECTS).replace("parameters", "arguments"),
    "list without its end": json.dumps(OBJECTS)[:-1],
}
LISTS = {"list", "pretty list", "arguments"}
READ = {
    "toolrl": {"lines", "pretty", *LISTS},
    "hermes": LISTS,
    "llama3": {"lines", "pretty", "concatenated", "semicolon", *LISTS},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_layouts_of_several_calls(template, layout):
    body = LAYOUTS[layout]
    text = (
        body if template == "llama3" else f"<think> t </think>\n<tool_call>\n{body}\n</tool_call>"
    )
    answer = parse(template, text)
    if layout in READ[template]:
        assert list(answer.calls) == CALLS
        assert answer.broken_calls == 0
        assert BAD not in answer.blocks
        places = picture(answer)
        assert places.count("N") == 2
        assert "x" not in places
        assert answer.executable == (layout == "lines")
    elif template == "llama3":
        # the comma, or the text before it, is text of the answer
        assert BAD in answer.blocks or R in answer.blocks
    else:
        assert (answer.calls, answer.broken_calls, answer.blocks) == ((), 2, (T, BAD))


@pytest.mark.parametrize(
    "body",
    [
        "{call}}}",
        "{{{call}",
        "Sure: {call}",
        "{call} done, thanks!",
        "```json\n{call}\n```",
        "[[[{call}",
        "{call}]",
        "{call},",
        "{call}\n</function>",
        "<function=f>\n{call}\n</function>",
        "I will now think about it.\n" * 40 + "{call}",
        "{call}\x0b",
        "[{call},]",
        '[{call}, {"name": "f", "arguments": {"a": 1, "a": 1}}]',
        "",
        "\n",
        "[]",
        "f(a=1)",
    ],
)
@pytest.mark.parametrize("template", ["toolrl", "hermes"])
def test_a_block_with_anything_but_calls_has_none(template, body):
    text = f"<think>\nt\n</think>\n<tool_call>\n{body.replace('{call}', GOOD)}\n</tool_call>"
    answer = parse(template, text)
    assert (answer.calls, answer.blocks) == ((), (T, BAD))
    assert answer.broken_calls >= 1


@pytest.mark.parametrize(
    ("template", "text", "executable"),
    [
        ("hermes", '<tool_call>{"name": "f",\n"arguments": {}}</tool_call>', True),
        ("hermes", '<tool_call>{"name": "f", "parameters": {}}</tool_call>', False),
        ("hermes", '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', False),
        ("toolrl", '<tool_call>{"name": "f", "parameters": {}}</tool_call>', True),
        ("toolrl", '<tool_call>{"name": "f",\n"parameters": {}}</tool_call>', False),
        ("toolrl", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', False),
        ("llama3", '{"name": "f",\n"parameters": {}}', True),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}', True),
        ("llama3", 'Well\n<|python_tag|>{"name": "f", "parameters": {}}', False),
        ("llama3", '[{"name": "f", "parameters": {}}]', False),
        ("llama3", '{"name": "f", "arguments": {}}', False),
    ],
)
def test_only_the_layout_of_the_format_is_executable(template, text, executable):
    answer = parse(template, text)
    assert answer.calls == (Call("f", {}),)
    assert answer.executable == executable


GOOD = '{"name": "good", "parameters": {"a": 1}}'
BROKEN = {
    "no closing brace": '{"name": "bad", "parameters": {"a": 1}',
    "no closing quote": '{"name": "bad, "parameters": {"a": 1}}',
    "string to the end of the line": '{"name": "bad", "parameters": {"a": "1}}',
    "no value": '{"name": "bad", "parameters": {"a": }}',
    "no comma": '{"name": "bad" "parameters": {}}',
    "trailing comma": '{"name": "bad", "parameters": {"a": 1,}}',
    "single quotes": "{'name': 'bad', 'parameters': {}}",
    "python literal": '{"name": "bad", "parameters": {"a": True}}',
    "NaN": '{"name": "bad", "parameters": {"a": NaN}}',
    "Infinity": '{"name": "bad", "parameters": {"a": -Infinity}}',
    "overflow": '{"name": "bad", "parameters": {"a": 1e999}}',
    "duplicate key": '{"name": "bad", "parameters": {"a": 1, "a": 2}}',
    "duplicate name": '{"name": "bad", "name": "good", "parameters": {}}',
    "hidden duplicate": '{"name": "bad", "n\\u0061me": "good", "parameters": {}}',
    "both words for arguments": '{"name": "bad", "parameters": {}, "arguments": {}}',
    "no arguments": '{"name": "bad"}',
    "arguments not an object": '{"name": "bad", "parameters": [1]}',
    "name not a string": '{"name": 3, "parameters": {}}',
    "bad escape": '{"name": "bad", "parameters": {"a": "\\x"}}',
    "33 deep": '{"name": "bad", "parameters": {"a": ' + "[" * 31 + "]" * 31 + "}}",
    "10,000 deep": '{"name": "bad", "parameters": {"a": ' + "[" * 10_000 + "]" * 10_000 + "}}",
    "257 keys": '{"name": "bad", "parameters": '
    + json.dumps({str(i): i for i in range(257)})
    + "}",
    "over 64 KB": '{"name": "bad", "parameters": {"a": "' + "x" * 65_536 + '"}}',
    "integer of 5,000 digits": '{"name": "bad", "parameters": {"a": ' + "9" * 5_000 + "}}",
    "empty object": "{}",
}


@pytest.mark.parametrize("bad", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("template", ["toolrl", "hermes"])
def test_a_broken_call_leaves_its_neighbours(template, bad):
    between = {"toolrl": "\n", "hermes": "\n</tool_call>\n<tool_call>\n"}[template]
    text = f"<think> t </think>\n<tool_call>\n{between.join([GOOD, bad, GOOD])}\n</tool_call>"
    answer = parse(template, text)
    assert answer.calls == (Call("good", {"a": 1}),) * 2
    assert answer.broken_calls == 1
    assert answer.blocks == {"toolrl": (T, BAD), "hermes": (T, C, BAD, C)}[template]
    places = picture(answer)
    assert len(places) == len(text)
    first, last = text.index(GOOD), text.rindex(GOOD)
    expected = "." * 10 + "NNNN" + "." * 17 + "P" * 8 + "."
    assert places[first : first + len(GOOD)] == expected
    assert places[last : last + len(GOOD)] == expected
    assert places.endswith("t" * len("</tool_call>"))


@pytest.mark.parametrize(
    "good",
    [
        '{"name": "ok", "parameters": {"a": ' + "[" * 30 + "]" * 30 + "}}",
        '{"name": "ok", "parameters": ' + json.dumps({str(i): i for i in range(256)}) + "}",
        '{"name": "ok", "parameters": {"a": "' + "x" * 65_000 + '"}}',
        '{"name": "ok", "parameters": {"a": ' + "9" * 4_000 + "}}",
        '{"name": "ok", "parameters": {"a": 1e300}}',
    ],
    ids=["32 deep", "256 keys", "65,000 characters", "4,000 digits", "large float"],
)
def test_calls_at_the_limits_are_read(good):
    answer = parse("toolrl", f"<think> t </think>\n<tool_call>\n{good}\n</tool_call>")
    assert [c.name for c in answer.calls] == ["ok"]
    assert answer.calls[0].arguments == json.loads(good)["parameters"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_keys_may_be_written_with_escapes(template):
    call = '{"n\\u0061me": "good", "par\\u0061meters": {"a": 1}}'
    text = call if template == "llama3" else f"<think> t </think><tool_call>\n{call}\n</tool_call>"
    answer = parse(template, text)
    assert answer.calls == (Call("good", {"a": 1}),) and not answer.broken_calls
    assert picture(answer).count("N") == 4 and picture(answer).count("P") == 8


def test_an_unreadable_but_whole_call_is_placed():
    text = '<tool_call>{"name": "f", "parameters": {"a": NaN}}</tool_call>'
    assert (
        picture(parse("toolrl", text))
        == "t" * 11 + "." * 10 + "N" + "." * 17 + "P" * 10 + "." + "t" * 12
    )


def test_an_unclosed_quote_does_not_swallow_the_closing_tag():
    text = '<think> t </think>\n<tool_call>{"name": "f</tool_call>\n<response> r </response>'
    answer = parse("toolrl", text)
    assert answer.blocks == (T, BAD, R)
    assert answer.broken_calls == 1


@pytest.mark.parametrize("template", ["toolrl", "hermes"])
def test_tags_inside_a_thought_are_thought(template):
    thought = f" I use <tool_call>{GOOD}</tool_call>, no <response> or </think> yet "
    text = f"<think>{thought}</think>\n<tool_call>\n{GOOD}\n</tool_call>"
    answer = parse(template, text)
    assert answer.calls == (Call("good", {"a": 1}),)
    assert answer.think == thought.strip()
    assert picture(answer)[7 : 7 + len(thought)] == "h" * len(thought)
    assert answer.blocks == (T, BAD, C)  # the closing tag within counts as a fault


@pytest.mark.parametrize(
    ("text", "blocks", "calls"),
    [
        ("", (), 0),
        (" \n", (), 0),
        ("hello", (X,), 0),
        ("<think> only", (BAD,), 0),
        ("no opening tag </think>\n<response> r </response>", (X, BAD, R), 0),
        (f"<think> a\n<tool_call>\n{GOOD}\n</tool_call>", (BAD, C), 1),
        ("<think> I will write a <tool_call> block and", (BAD,), 0),
        (f"<think> t </think>\n<tool_call>\n{GOOD}", (T, BAD), 1),
        (f"<think> t </think>\n<tool_call>\n{GOOD}\n<response> r </response>", (T, BAD, R), 1),
        ("<think> t </think>\n<response> never closed", (T, BAD), 0),
        ("<think> t </think></tool_call>", (T, BAD), 0),
        (
            f"<think> t </think><tool_call>{GOOD}</tool_call><tool_call>{GOOD}</tool_call>",
            (T, C, C),
            2,
        ),
        (f"Sure. <think> t </think><tool_call>{GOOD}</tool_call> Bye.", (X, T, C, X), 1),
        ("<think> t </think><tool_call>f(x=1)</tool_call>", (T, BAD), 0),
        ("<think> t </think><response> a </response> b <response> c </response>", (T, R, X, R), 0),
        (f"<tool_call>{GOOD}</tool_call><think> t </think>", (C, BAD), 1),
    ],
)
def test_toolrl_blocks(text, blocks, calls):
    answer = parse("toolrl", text)
    assert answer.blocks == blocks
    assert len(answer.calls) == calls
    assert len(picture(answer)) == len(text)


@pytest.mark.parametrize(
    ("text", "blocks", "calls"),
    [
        ("hello", (R,), 0),
        ("the template opened it </think>\n\nhello", (T, R), 0),
        (f"a <tool_call>{GOOD}</tool_call> b", (R, C, R), 1),
        ("<response> not a tag here </response>", (R,), 0),
        ("<think>a</think>\nUse </think> to close", (T, R), 0),
        ("<think>a</think>\nUse <think> to open", (T, R, BAD), 0),
        (f"<tool_call>{GOOD}", (BAD,), 1),
    ],
)
def test_hermes_blocks(text, blocks, calls):
    answer = parse("hermes", text)
    assert answer.blocks == blocks
    assert len(answer.calls) == calls


@pytest.mark.parametrize(
    ("text", "blocks", "calls"),
    [
        ("hello", (R,), 0),
        (GOOD, (C,), 1),
        (f"Sure:\n{GOOD}", (R, C), 1),
        (f"Use {GOOD} inline", (R,), 0),
        ('{"key": "an answer in JSON"}', (R,), 0),
        ("if (a) {\n  return b;\n}", (R,), 0),
        ('{"name": "f", "parameters": {"a": ', (BAD,), 0),
        (f'{{"name": "f", "parameters": {{"a": }}}}\n{GOOD}', (BAD, C), 1),
        ('{"name": "f", "parameters": {"a": NaN}}', (BAD,), 0),
        ("<|python_tag|>print(1)", (BAD,), 0),
        (f"<think> t </think>\n{GOOD}", (T, C), 1),
        (f"<think> t\n{GOOD}", (BAD, C), 1),
        (f'{GOOD}\n{{"x": 1}}', (C, BAD), 1),
        (f"{GOOD}\n[1]", (C, BAD), 1),
        ('{"name": "f", "parameters": "x"}', (BAD,), 0),
        (f"[[{GOOD}]]", (R, BAD), 0),
        (f"{GOOD}}}", (BAD,), 0),
        (f"{{{GOOD}", (R, BAD), 0),
        (f"{GOOD} done", (BAD,), 0),
        (f"{GOOD}</function>", (BAD,), 0),
        (f"{GOOD};", (C, R), 1),
        (f'{{"x": 1}} {GOOD}', (R, BAD), 0),
        (f'{{"x": 1}}\n{GOOD}', (R, C), 1),
        (f"```json\n{GOOD}\n```", (R, C, R), 1),
    ],
)
def test_llama3_blocks(text, blocks, calls):
    answer = parse("llama3", text)
    assert answer.blocks == blocks
    assert len(answer.calls) == calls


@pytest.mark.parametrize("thought", ["", "<think> so </think>\n"])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_tags_in_the_strings_of_a_call_are_text(template, thought):
    arguments = {"a": "x</think>y", "b": "<think> </tool_call> <response> </response> <tool_call>"}
    gold = Target(calls=(Call("</think>", arguments),))
    answer = parse(template, thought + TEMPLATES[template].render_answer(gold))
    assert answer.calls == gold.calls
    assert answer.blocks[-1] == C
    assert BAD not in answer.blocks or (thought and template == "toolrl")


def test_a_closing_think_tag_in_a_response_block_is_text():
    text = "<think> a </think>\n<response> Use </think> to close </response>"
    answer = parse("toolrl", text)
    assert (answer.think, answer.response, answer.blocks) == ("a", "Use </think> to close", (T, R))


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_thought_that_the_prompt_opened(template):
    """The parse behind an opened thought is that of the text with its tag, but for the tag."""
    call = GOOD if template == "llama3" else f"<tool_call>\n{GOOD}\n</tool_call>"
    for text in (
        f"why\n</think>\n{call}",
        f"\n</think>\n\n{call}",
        f"a {call} comes\n</think>\n{call}",
        "never closed",
        f"never closed\n{call}",
        "closed </think>",
        "",
    ):
        opened = TEMPLATES[template].behind(True).parse(text.encode())
        closed = parse(template, f"<think>{text}")
        assert picture(opened) == picture(closed)[len("<think>") :]
        for field in ("calls", "broken_calls", "response", "think", "blocks", "executable"):
            assert getattr(opened, field) == getattr(closed, field)


def test_an_unclosed_thought_is_thought():
    assert picture(parse("toolrl", "<think> I go on")) == "t" * 7 + "h" * 8


def test_bytes_that_are_not_utf8_are_read_as_replacement_characters():
    cut = "é".encode()[:1]
    text = (
        b'<think> \xff </think>\n<tool_call>\n{"name": "f'
        + cut
        + b'", "parameters": {"a": "\xed\xa0\x80"}}\n</tool_call>'
    )
    answer = parse("toolrl", text)
    assert [c.name for c in answer.calls] == ["f\ufffd"]
    assert answer.think == "\ufffd"
    answer.calls[0].arguments["a"].encode()  # a surrogate would raise
    assert picture(answer).count("N") == 2


def test_lone_surrogate_escapes_become_replacement_characters():
    text = r'<tool_call>{"name": "f", "parameters": {"a\ud800": ["\udc00x", "\ud83d\ude00"]}}</tool_call>'
    assert parse("toolrl", text).calls == (Call("f", {"a\ufffd": ["\ufffdx", "\U0001f600"]}),)
