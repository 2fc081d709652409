"""The tool parser for vLLM, behind a stand-in for the parts of vLLM that it uses; calls are those of our own parser."""

import dataclasses
import importlib.util
import json
import pathlib
import random
import sys
import types
from typing import Any

import pytest

import rest_jax.templates
from rest_jax.templates import TEMPLATES
from rest_jax.templates.chat_template import vllm_parser
from rest_jax.tool_calls import Call, Target

FILE = pathlib.Path(rest_jax.templates.__file__).parent / "chat" / "vllm_toolrl.py"


@dataclasses.dataclass
class FunctionCall:
    name: str
    arguments: str


@dataclasses.dataclass
class DeltaToolCall:
    index: int
    type: str
    id: str
    function: FunctionCall


@dataclasses.dataclass
class ToolCall:
    type: str
    function: FunctionCall


@dataclasses.dataclass
class DeltaMessage:
    content: str | None
    tool_calls: list[DeltaToolCall]


@dataclasses.dataclass
class ExtractedToolCallInformation:
    tools_called: bool
    tool_calls: list[ToolCall]
    content: str | None


class ToolParser:
    def __init__(self, tokenizer, tools=None):
        self.prev_tool_call_arr: list[dict[str, Any]] = []
        self.streamed_args_for_tool: list[str] = []
        self.current_tool_id = -1

    def adjust_request(self, request):
        return request


class ToolParserManager:
    parsers: dict[str, Any]

    @classmethod
    def register_module(cls, names):
        def add(parser):
            cls.parsers = dict.fromkeys(names, parser)
            return parser

        return add


# (module of the parser, module of the records) of vLLM's layouts
LAYOUTS = {
    "now": ("vllm.tool_parsers.abstract_tool_parser", "vllm.entrypoints.openai.engine.protocol"),
    "0.11": (
        "vllm.entrypoints.openai.tool_parsers.abstract_tool_parser",
        "vllm.entrypoints.openai.protocol",
    ),
}


def load(monkeypatch, layout="now"):
    """The parser class and its module, as vLLM loads the file."""
    for name in [name for name in sys.modules if name.startswith("vllm")]:
        monkeypatch.delitem(sys.modules, name)
    parsers, records = LAYOUTS[layout]
    for path, content in (
        (parsers, [ToolParser, ToolParserManager]),
        (
            records,
            [FunctionCall, DeltaToolCall, ToolCall, DeltaMessage, ExtractedToolCallInformation],
        ),
    ):
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for item in content:
            setattr(sys.modules[path], item.__name__, item)
    if records in sys.modules:
        sys.modules[records].DeltaFunctionCall = FunctionCall  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("plugin", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ToolParserManager.parsers["toolrl"], module


def calls_of(found) -> list[tuple[str, Any]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in found]


def stream(parser, text: str, rng: random.Random) -> tuple[str, list[tuple[str, Any]]]:
    """What the deltas say of a text that comes in pieces."""
    made, content, calls, at = parser(None), "", [], 0
    while at < len(text):
        end = min(len(text), at + rng.randint(1, 7))
        delta = made.extract_tool_calls_streaming(
            text[:at], text[:end], text[at:end], [], [], [], None
        )
        if delta is not None:
            content += delta.content or ""
            assert [c.index for c in delta.tool_calls] == list(
                range(len(calls), len(calls) + len(delta.tool_calls))
            )
            calls += calls_of(delta.tool_calls)
        at = end
    sent = [json.dumps(c["arguments"], ensure_ascii=False) for c in made.prev_tool_call_arr]
    assert sent == made.streamed_args_for_tool
    return content, calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plugin_is_found_under_its_name(monkeypatch, layout):
    parser, _ = load(monkeypatch, layout)
    request = types.SimpleNamespace(tools=[{}], tool_choice="auto", skip_special_tokens=True)
    assert parser(None, None).adjust_request(request).skip_special_tokens is False


CASES = {
    "a call": Target(calls=(Call("f", {"a": "<b>", "ü": [1, None]}),), think="Why"),
    "two calls and a response": Target(
        calls=(Call("f", {}), Call("g", {"x": "</tool_call> no"})), response="Done < 3.", think=""
    ),
    "a response": Target(response="Use <tool_call> so.\n\nBye", think="None"),
}


@pytest.mark.parametrize("opened", [False, True], ids=["", "thought opened"])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_read_as_the_trainer_reads_them(monkeypatch, case, opened):
    parser, module = load(monkeypatch)
    monkeypatch.setattr(module, "THOUGHT_OPENED", opened)
    template = TEMPLATES["toolrl"].behind(opened)
    text = template.render_answer(CASES[case])
    answer = template.parse(text.encode())
    expected = [(call.name, call.arguments) for call in answer.calls]
    whole = parser(None).extract_tool_calls(text, None)
    assert calls_of(whole.tool_calls) == expected and whole.tools_called == bool(expected)
    assert (whole.content or "") == (CASES[case].response or "")
    for seed in range(20):
        content, calls = stream(parser, text, random.Random(seed))
        assert calls == expected and content == (CASES[case].response or "")


CALL = '<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"I say <think> and <tool_call>. </think>\n{CALL}", "", [("f", {})]),
        (f"I never close it\n{CALL}\n<response> Hi </response>", "Hi", [("f", {})]),
        ("I never\n<response> close it", "close it", []),
        ("I never answer", "", []),
    ],
)
def test_a_thought_that_the_prompt_has_opened_is_no_content(monkeypatch, text, content, calls):
    parser, module = load(monkeypatch)
    monkeypatch.setattr(module, "THOUGHT_OPENED", True)
    whole = parser(None).extract_tool_calls(text, None)
    assert (whole.content or "", calls_of(whole.tool_calls)) == (content, calls)
    # of a stream nobody knows that it has ended
    expected = (content, calls) if "</" in text else ("", [])
    for seed in range(20):
        assert stream(parser, text, random.Random(seed)) == expected


def test_the_file_says_whether_prompts_open_the_thought():
    assert vllm_parser(False) == FILE.read_text()
    opened = vllm_parser(True).splitlines()
    assert "THOUGHT_OPENED = True" in opened and len(opened) == len(vllm_parser(False).splitlines())


def test_real_answers_are_read_as_the_trainer_reads_them(monkeypatch, data_dir):
    from rest_jax.data.files import read_records

    parser, _ = load(monkeypatch)
    template, count = TEMPLATES["toolrl"], 0
    for file in sorted((data_dir / "rlla").glob("*")):
        for record in read_records(str(file)):
            text = template.render_answer(record.target)
            expected = [(c.name, c.arguments) for c in template.parse(text.encode()).calls]
            assert calls_of(parser(None).extract_tool_calls(text, None).tool_calls) == expected
            count += len(expected)
    assert count > 100


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "7", '{"name": 1, "parameters": {}}', '{"name": "f"}', "[" * 100_000,
     '{"name": "f", "parameters": []}', "NaN"],
)  # fmt: skip
def test_a_line_that_is_no_call_is_none(monkeypatch, line):
    parser, _ = load(monkeypatch)
    text = f'<tool_call>\n{line}\n{{"name": "g", "parameters": {{}}}}\n</tool_call>'
    found = parser(None).extract_tool_calls(text, None)
    assert calls_of(found.tool_calls) == [("g", {})] and found.content is None
    assert stream(parser, text, random.Random(0)) == ("", [("g", {})])


def test_plain_text_is_content(monkeypatch):
    parser, _ = load(monkeypatch)
    text = "1 < 2, and <b> is bold; <tool"
    found = parser(None).extract_tool_calls(text, None)
    assert not found.tools_called and found.content == text
