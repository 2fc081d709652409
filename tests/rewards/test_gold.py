"""Every gold answer that is kept scores full marks as its own completion; what sources write as text is read."""

import contextlib
import dataclasses
import json
import time
from collections import Counter

import pytest

from rest_jax.config import RewardConfig
from rest_jax.data.convert import sgd
from rest_jax.data.files import read_records
from rest_jax.data.records import StepRecord
from rest_jax.rewards.gold import GoldError, reachable, read_turn
from rest_jax.rewards.score import score
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target

F = Call("f", {"a": 1})
AS_TEXT = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
LINES = '<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>'
BARE = '{"name": "f", "parameters": {"a": 1}}'

FOREIGN_CALLS = [
    f"```json\n{BARE}\n```",
    f"Let me look.\n{BARE}",
    AS_TEXT.replace("tool_call", "TOOL_CALL"),
    f"<function_call>{BARE}</function_call>",
    "✿FUNCTION✿: f\n✿ARGS✿: {}",
    'I must look.\nAction: f\nAction Input: {"a": 1}',
    "[f(a=1)]",
    "```tool_code\nf(a=1)\n```",
    "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    f"functools[{BARE}]",
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">',
    '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>',
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello",
    '```json\n{"arguments": {"a": 1}, "name": "f"}\n```',
    '{"function": "f", "args": {"a": 1}}',
    '{"name": "f", "input": {"a": 1}}',
    'So: {"tool": "f", "args": {"a": 1}}.',
    '{"tool_name": "f", "tool_args": {"a": 1}}',
    '```\n{"action": "f", "action_input": {"a": 1}}\n```',
    '{"recipient_name": "functions.f", "parameters": {"a": 1}}',
    "{'name': 'f', 'arguments': {'a': 1}}",
    "[{'arguments': {'a': True}, 'tool': \"f\"}]",
    "<function_call>\nf(a=1)\n</function_call>",
    "<tool_code>\nprint(f(a=1))\n</tool_code>",
    '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}}]<|END_ACTION|>',
    '<tool_use>\n<name>f</name>\n<arguments>{"a": 1}</arguments>\n</tool_use>',
    '<tool_use>{"name": "f", "arguments": {"a": 1}}</tool_use>',
    "<tool>f</tool><tool_input>1</tool_input>",
    '<call id="0" name="f">1</call>',
    "<longcat_tool_call>f\n<longcat_arg_key>a</longcat_arg_key>\n</longcat_tool_call>",
    "<f>\n<a>1</a>\n</f>",
    "<|python_start|>[f(a=1)]<|python_end|>",
    "<|python_tag|>f.call(a=1)",
    "<|tool▁call▁begin|>f",
    'to=functions.f {"a": 1}',
    "result = f(a=1)",
    "print(f(a=1))",
    # behind what is read, too
    '<think>hm</think>\n```json\n{"name": "f", "input": {"a": 1}}\n```',
    f"<think>hm</think>\n{BARE}",
]


def is_exact(target: Target, template) -> bool:
    answer = template.parse(template.render_answer(target).encode())
    found = score(answer, target, template.name, RewardConfig(), 1.0)
    return found.exact and found.reward == (4.0 if target.calls else 1.0)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (Target((F,), "\n\n"), Target((F,))),
        (Target((F,), ""), Target((F,))),
        (Target((), " hi "), Target((), " hi ")),
        (Target((), AS_TEXT), Target((F,))),
        (Target((F,), AS_TEXT), Target((F,))),
        (Target((), "Sure.\n" + AS_TEXT), Target((F,), "Sure.")),
        (Target((), AS_TEXT + "\n" + AS_TEXT), Target((F, F))),
        (Target((), LINES), Target((F, F))),
        (Target((), f"<think> so </think>\n{LINES}\n<response> ok </response>"), Target((F, F), "ok", "so")),
        (Target((), "<think> so </think>\n<response> ok </response>"), Target((), "ok", "so")),
        (Target((), BARE), Target((F,))),
        (Target((), f"<|python_tag|>{BARE}"), Target((F,))),
        (Target((), '{"answer": 1}'), Target((), '{"answer": 1}')),
        (Target((), "<think>\nhmm\n</think>\n\nHello"), Target((), "Hello", "hmm")),
        (Target((), "<think>\n\n</think>\n\nHello"), Target((), "Hello")),
        (Target((), "hmm\n</think>\n\nHello"), Target((), "Hello", "hmm")),
        (Target((), "<Thinking>hmm</Thinking>Hello"), Target((), "Hello", "hmm")),
        (Target((), "<reasoning>hmm</reasoning>\nHello"), Target((), "Hello", "hmm")),
        (Target((), f"[THINK]hmm[/THINK]{AS_TEXT}"), Target((F,), None, "hmm")),
        (Target((), "◁think▷hmm◁/think▷Hello"), Target((), "Hello", "hmm")),
        (Target((), "<think>hmm</think>Hello", "first"), Target((), "Hello", "first\nhmm")),
        (Target((), "<think>hmm</think>Hello", "hmm"), Target((), "Hello", "hmm")),
        (Target((), f"<think>hmm</think>{AS_TEXT}"), Target((F,), None, "hmm")),
        (Target((F,), "<think>hmm</think>"), Target((F,), None, "hmm")),
        (Target((F,), None, "<think>hmm</think>"), Target((F,), None, "hmm")),
        (Target((), None, "only a thought"), Target((), None, "only a thought")),
        (Target((F,), text="says something else"), Target((F,))),
        (Target((F,), text=f"<think> t </think>\n{AS_TEXT}"), Target((F,))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_what_is_written_as_text_is_read(name, opened, given, read):
    template = TEMPLATES[name].behind(opened)
    found = reachable(given, template, {"f"})
    if found.text is None:
        assert found == read
    assert is_exact(found, template)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target(), "is empty"),
        (Target((), " \n"), "is empty"),
        (Target((), None, " "), "is empty"),
        (Target((), AS_TEXT.replace("}}", "}")), "cannot be read"),
        (Target((), AS_TEXT.replace("1", "NaN")), "cannot be read"),
        (Target((), "<think> never closed"), "cannot be read"),
        (Target((), "<thinking> never closed"), "cannot be read"),
        *((Target((), text), "cannot be read") for text in FOREIGN_CALLS),
        (Target((), "Let me see.\n<think>hm</think>\nHi"), "a thought that cannot be read"),
        (Target((), "<think>hm</think>Hi\n<Thinking>hm</Thinking>"), "cannot be read"),
        (Target((), "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"), "cannot be read"),
        (Target((), '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]'), "cannot be read"),
        (Target((Call("g", {}),), AS_TEXT), "other calls"),
        (Target((), "half \ud800"), "half a character"),
        (Target((Call("f", {"a": "\udc00"}),)), "half a character"),
        (Target((Call("f", {"a": float("nan")}),)), "calls are not read back"),
        (Target((Call("f", {"a": float("inf")}),)), "calls are not read back"),
        (Target((Call("f", {"a": {1, 2}}),)), "not a JSON value"),
        (Target((Call("f", {str(i): i for i in range(300)}),)), "calls are not read back"),
        (Target((Call("f", {"a": "x" * 70_000}),)), "calls are not read back"),
        (Target((F,), None, "a </think> b"), "not read back|format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_what_cannot_be_said_is_refused_with_its_reason(template, target, reason):
    with pytest.raises(GoldError, match=reason):
        reachable(target, TEMPLATES[template], {"f"})


@pytest.mark.parametrize(
    ("text", "templates"),
    [
        ("Use </think> to close.", {"toolrl", "hermes", "llama3"}),
        ("Write <tool_call> first.", {"toolrl", "llama3"}),
        ("Write <response> first.", {"toolrl", "hermes", "llama3"}),
        ("Write </response> last.", {"hermes", "llama3"}),
        ("A <think> tag.", {"toolrl"}),
        ('{"name": "not offered", "parameters": {}}', {"toolrl", "hermes"}),
        ('Like\n{"name": "g", "parameters": {}}', {"toolrl", "hermes"}),
        ("if (a) {\n  b\n}", {"toolrl", "hermes", "llama3"}),
        ("I would use f (or g), the tool whose name: f says it.", {"toolrl", "hermes", "llama3"}),
        ("The function f(a=1) has been called, and f is done.", {"toolrl", "hermes", "llama3"}),
        ('{"name": "Ann", "likes": "f"}', {"toolrl", "hermes", "llama3"}),
        ("See <b>f</b> and <tool>g</tool>.", {"toolrl", "hermes", "llama3"}),
    ],
)
def test_a_response_with_the_tags_of_a_format_is_set_aside_where_it_cannot_be_said(text, templates):
    said = set()
    for name, template in TEMPLATES.items():
        try:
            target = reachable(Target((), text, "so"), template, {"f"})
        except GoldError:
            continue
        assert target.response == text and is_exact(target, template)
        said.add(name)
    assert said == templates


@pytest.mark.parametrize(
    "piece",
    ["<think>", "<tool", "<call ", "<a>", "{", '{"name": "', "f(", "a=", ")", " ", "<tool>print("],
)
def test_long_texts_are_looked_through_in_linear_time(piece):
    began = time.perf_counter()
    with contextlib.suppress(GoldError):
        reachable(Target((), "x " + piece * 30_000), TEMPLATES["llama3"], {"f"})
    assert time.perf_counter() - began < 5


def test_tags_in_arguments_can_be_said_in_every_template():
    arguments = {
        "a": "x</think>y",
        "b": "</tool_call>",
        "c": "<think>",
        "</response>": "<response>",
    }
    for template in TEMPLATES.values():
        for target in (
            Target((Call("f", arguments),)),
            Target((Call("f", arguments),), "hi", "so"),
        ):
            assert reachable(target, template) == target


def test_turns_of_a_history_are_read_alike():
    turn = {"role": "assistant", "content": f"<think>hmm</think>Wait\n{AS_TEXT}", "weight": 1}
    assert read_turn(turn, {"f"}) == {
        "role": "assistant",
        "weight": 1,
        "content": "Wait",
        "think": "hmm",
        "calls": [{"name": "f", "arguments": {"a": 1}}],
    }
    for content in ("Hello", "", " ", None, "<think> never closed"):
        turn = {"role": "assistant", "content": content}
        assert read_turn(turn, {"f"}) == turn
    called = {"role": "assistant", "content": "\n\n", "calls": [dataclasses.asdict(F)]}
    assert read_turn(called, set()) == called | {"content": None}


def check(records) -> tuple[Counter, float]:
    """(records kept and reasons, by template; seconds a record)."""
    counts, spent = Counter(), 0.0
    for name, form in TEMPLATES.items():
        for opened in (False, True):
            template = form.behind(opened)
            for record in records:
                began = time.perf_counter()
                try:
                    target = reachable(record.target, template, {t["name"] for t in record.tools})
                except GoldError as error:
                    counts[name, opened, str(error)] += 1
                    continue
                finally:
                    spent += time.perf_counter() - began
                assert is_exact(target, template), record.id
                counts[name, opened, "kept"] += 1
    return counts, spent / len(records) / 6


def _all_kept(count: int) -> dict:
    return {(name, opened, "kept"): count for name in TEMPLATES for opened in (False, True)}


def test_every_real_rlla_and_api_bank_record_is_kept(data_dir):
    records = [
        record
        for path in (
            data_dir / "rlla" / "rlla_sft.json",
            data_dir / "rlla" / "test.parquet",
            *sorted((data_dir / "api_bank").glob("*.json")),
        )
        for record in read_records(path)
    ]
    assert len(records) == 480 + 597
    counts, seconds = check(records)
    assert counts == _all_kept(1077)
    assert seconds < 2e-3


@pytest.mark.parametrize(
    "most", [3, pytest.param(None, marks=pytest.mark.slow)], ids=["three files", "all"]
)
def test_every_schema_guided_answer_is_kept(data_dir, most):
    files = sorted((data_dir / "sgd").glob("*/dialogues_*.json"))[:most]
    if not files:
        pytest.skip("no Schema-Guided dialogues")
    convert, total = sgd.open_files(files), 0
    for path in files:
        made = [
            record
            for number, dialogue in enumerate(json.loads(path.read_text()))
            for record in convert(dialogue, f"{path.stem}-{number}", "here")
        ]
        records = [record for record in made if isinstance(record, StepRecord)]
        counts, _ = check(records)
        assert counts == _all_kept(len(records))
        total += len(records)
    assert total > 1_000 if most else total == 45_297
