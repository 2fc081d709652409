"""Completions of any kind go through parser, regions, rewards, the line of the viewer and the page.

REST_JAX_FUZZED of them in the slow test, 3,000 by default; a few hundred always.
"""

import os
import random

import numpy as np
import pytest

from rest_jax.analysis.page import embedded
from rest_jax.rewards.score import correctness_bounds, format_bounds
from rest_jax.rollout.tokens import read_record, token_record
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Region, Target
from tests.experiences import HOSTILE, REWARD, RIGHT, Bytes, experience_of, record

CALL = '{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}'
BASES = {
    "toolrl": RIGHT,
    "hermes": f"<think> ask </think>\n<tool_call>\n{CALL}\n</tool_call>",
    "llama3": CALL.replace("arguments", "parameters"),
}
PIECES = [
    HOSTILE, "<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>", "<|im_end|>", "{", "}", "[" * 40,
    "]" * 40, '{"a":' * 40, '"', "\\", "\\ud800", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "NaN",
    "-Infinity", "1e999", "9" * 400, "null", "true", ",", ":", "//", "\x1b[31m", "\x00", "\r", "\u2028", "\ufeff", "\u200b",
    "=1+1", "</script>", "\udcff\udc80", "\udced\udca0\udc80", CALL, '"name"', '"parameters"', "```json\n", " " * 50, "\n",
]  # fmt: skip


def fuzzed(base: str, rng: random.Random) -> str:
    """A text with some changes: pieces put in, parts cut, repeated or reversed, letters exchanged; or pieces alone."""
    text = base if rng.random() < 0.85 else ""
    for _ in range(rng.randint(1, 6)):
        at, end = sorted(rng.randint(0, len(text)) for _ in range(2))
        end = min(end, at + 60)
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 1:
            text = text[:at] + text[end:]
        elif kind == 2:
            text = text[:end] + text[at:end] + text[end:]
        elif kind == 3:
            text = text[:at] + text[at:end][::-1] + text[end:]
        else:
            text = text[:at] + chr(rng.choice([rng.randrange(128), 0xDC80 + rng.randrange(128)])) + text[at + 1 :]  # fmt: skip
    return text[:2000]


def check(name: str, count: int, seed: int) -> None:
    rng, template, tokenizer = random.Random(seed), TEMPLATES[name], Bytes()
    targets = [None, Target(), Target(response="No.")]
    for group in range(-(-count // 16)):
        texts = [fuzzed(BASES[name], rng) for _ in range(16)]
        one = record(HOSTILE, targets[group % 3])
        experience, values = experience_of([(one, texts)], template=template)
        scored, length = experience.scored, experience.scored.rollout.response_length
        alive = np.arange(scored.region.shape[2]) < length[..., None]
        assert ((scored.region != Region.NONE) == alive).all()
        low, high = (
            sum(x)
            for x in zip(format_bounds(REWARD, 0.5), correctness_bounds(REWARD, 0.5), strict=True)
        )
        assert ((scored.reward >= low - 1e-5) & (scored.reward <= high + 1e-5)).all()
        line = token_record(values, experience, tokenizer, template, REWARD)
        (prompt,) = read_record(line)["prompts"]
        # the last of a group has no end of its turn
        ends = ["<|im_end|>"] * (len(texts) - 1) + [""]
        for text, end, shown in zip(texts, ends, prompt["completions"], strict=True):
            whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            assert "".join(shown["tokens"]["text"]) == whole + end
            assert len(shown["tokens"]["region"]) == shown["length"] == len(shown["tokens"]["id"])
        assert not set("<>&") & set(embedded({"prompt": prompt, "texts": texts}))


@pytest.mark.parametrize("name", BASES)
def test_a_few(name):
    check(name, 96, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_many(name):
    check(name, -(-int(os.environ.get("REST_JAX_FUZZED", "3000")) // 3), 1)
