"""Any bytes at all: no exception, every byte placed, time linear, a reward within its bounds."""

import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rest_jax.config import RewardConfig
from rest_jax.rewards.score import score
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import NUM_REGIONS, Call, Target

FRAGMENTS = [
    b"<think>", b"</think>", b"<tool_call>", b"</tool_call>", b"<response>",
    b"</response>", b"<|python_tag|>",
    b"{", b"}", b"[", b"]", b",", b":", b";", b'"', b"\\", b"\\u", b"\\ud800", b"\n",
    b" ", b"\t", b"<", b"</", b">", b"1",
    b"1e999", b"-", b"true", b"NaN", b'"name"', b'"parameters"', b'"arguments"',
    b'{"name": "f", "parameters": {',
    b'{"name": "f", "arguments": {"a": 1}}', b'{"name"', b"x", b"\x00", b"\xc3", b"\xff",
    b"\xed\xa0\x80", "é".encode(),
]  # fmt: skip
TARGETS = [
    Target(calls=(Call("f", {"a": 1}),)),
    Target(response="x"),
    Target(calls=(Call("f", {"a": 1}), Call("f", {})), response="x"),
    Target(),
]


def check(template: str, data: bytes):
    answer = TEMPLATES[template].parse(data)
    ends = answer.span_ends
    assert ends.dtype == np.int64 and answer.span_regions.dtype == np.int8
    assert (np.diff(ends, prepend=0) > 0).all()
    assert (ends[-1] if len(ends) else 0) == len(data)
    assert ((answer.span_regions > 0) & (answer.span_regions < NUM_REGIONS)).all()
    return answer


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    pieces=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=4), max_size=40),
    template=st.sampled_from(list(TEMPLATES)),
    target=st.sampled_from(TARGETS),
    strict=st.booleans(),
)
def test_fragments_of_everything(pieces, template, target, strict):
    answer = check(template, b"".join(pieces))
    cfg = RewardConfig(strict_format=strict)
    for progress in (0.0, 1.0):
        found = score(answer, target, template, cfg, progress)
        assert -4.0 <= found.reward <= 4.0
        assert 0.0 <= found.accuracy <= 1.0
        assert found.format_score in (0.0, 1.0)
    for text in (answer.think, answer.response, *(c.name for c in answer.calls)):
        (text or "").encode()  # no lone surrogates


LONG = {
    "unclosed calls": b"<tool_call>" * 32_768,
    "unclosed thoughts": b"<think>" * 32_768,
    "unclosed responses": b"<response>" * 32_768,
    "closed thoughts": b"</think>" * 32_768,
    "closing tags": b"</tool_call></response>" * 16_384,
    "responses": b"<response></response>" * 32_768,
    "unclosed responses, one closing tag": b"<tool_call></response><response>" * 16_384,
    "alternating": b"<think>\n<tool_call>[\n" * 16_384,
    "braces": b"{" * 100_000,
    "braces in a block": b"<tool_call>" + b"{" * 100_000,
    "lines of braces": b"<tool_call>" + b"\n{" * 50_000,
    "spaced braces": b"<tool_call>" + b"{ " * 50_000 + b" " * 100_000,
    "brackets": b"<tool_call>" + b"[" * 200_000,
    "10,000 deep": b'<tool_call>{"name": "f", "parameters": {"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}}</tool_call>",
    "deep and unclosed": b'{"a":' * 100_000,
    "deep and unclosed, by lines": b'<tool_call>\n{"name":\n' * 20_000,
    "unclosed strings": b'<tool_call>{"a": "' * 32_768,
    "two readings of quotes": b'<tool_call>{"' + b'":":",' * 50_000,
    "1 MB string": b'<tool_call>{"name": "f", "parameters": {"a": "' + b"x" * 1_000_000 + b'"}}</tool_call>',
    "1 MB unclosed string": b'<tool_call>{"name": "' + b"x" * 1_000_000,
    "1 MB of escapes": b'<tool_call>{"name": "' + b'\\"' * 500_000,
    "1 MB of backslashes": b'<tool_call>{"name": "' + b"\\" * 1_000_001,
    "1 MB of digits": b'<tool_call>{"name": "f", "parameters": {"a": ' + b"1" * 1_000_000 + b"}}</tool_call>",
    "1 MB of lines": b"\n" * 1_000_000,
    "1 MB of spaces": b"<tool_call>" + b" " * 1_000_000 + b"x",
    "python tags": b"<|python_tag|>\n" * 32_768,
    "python tag and lines": b"<|python_tag|>" + b"\n" * 1_000_000,
    "names": b'{"name": "' * 32_768,
    "lines of names": b'\n{"name": ' * 32_768,
    "open lists": b"\n\n[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("data", LONG.values(), ids=LONG.keys())
def test_long_inputs_take_linear_time(template, data):
    started = time.process_time()
    answer = check(template, data)
    score(answer, TARGETS[0], template, RewardConfig(), 0.5)
    assert time.process_time() - started < 1.0


def test_the_million_byte_call_is_refused_and_placed():
    answer = check("toolrl", LONG["1 MB string"])
    assert (answer.calls, answer.broken_calls) == ((), 1)
    assert np.diff(answer.span_ends, prepend=0).max() > 1_000_000  # as one PARAM span
