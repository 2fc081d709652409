"""What scores `exact` is read alike by the reader that each format has elsewhere, written here in a few lines: json.loads of
each block (hermes), of each line (toolrl), of the bare object (llama3). Over mutated gold answers.
"""

import json
import random
import re

import pytest

from rest_jax.config import RewardConfig
from rest_jax.rewards.score import score
from rest_jax.rewards.tool_call import same_calls
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target


def read(template: str, text: str) -> list[Call]:
    """The calls of a completion; ValueError, KeyError or TypeError where the reader gives up."""
    head, closed, rest = text.partition("</think>")
    is_thought = head.lstrip().startswith("<think>")
    if template == "hermes":  # the prompt may have opened it
        is_thought |= "<tool_call>" not in head
    body = (rest if closed and is_thought else text).strip()
    if template == "llama3":
        objects = read_bare(body)
        return [Call(o["name"], o["parameters"]) for o in objects]
    key = "arguments" if template == "hermes" else "parameters"
    objects = []
    while (start := body.find("<tool_call>")) >= 0:
        body = body[start + len("<tool_call>") :].lstrip()
        while not body.startswith("</tool_call>"):
            if template == "toolrl":
                line, _, rest = body.partition("\n")
                value, end = json.JSONDecoder().raw_decode(line)
                if line[end:].strip() and not line[end:].lstrip().startswith("</tool_call>"):
                    raise ValueError("more than a call in a line")
                body = body[end:].lstrip()
            else:
                value, end = json.JSONDecoder().raw_decode(body)
                body = body[end:].lstrip()
                if not body.startswith("</tool_call>"):
                    raise ValueError("more than a call in a block")
            objects.append(value)
        body = body.removeprefix("</tool_call>") if template == "hermes" else ""  # toolrl has one
    return [Call(o["name"], o[key]) for o in objects]


def read_bare(body: str) -> list[dict]:
    """The objects of text that ends in one object, or in one a line."""
    lines = body.removeprefix("<|python_tag|>").split("\n")
    first = next((i for i, line in enumerate(lines) if line.lstrip().startswith("{")), len(lines))
    try:
        return [json.loads("\n".join(lines[first:]))]
    except ValueError:
        return [json.loads(line) for line in lines[first:] if line.strip()]


STRINGS = [
    "x",
    "",
    "Köln \U0001f600",
    "a </tool_call> b",
    "</think>",
    "<think>",
    '"}',
    "\n",
    "{}",
    "\u2028",
    "<response>",
]
PIECES = [
    "{", "}", "[", "]", ",", ";", ":", '"', "\\", "\n", " ", "\t", "\r", "\f", "\v", "\x00", "\u00a0", "\u2028", "\ufeff",
    "```json\n", "\n```", "Sure: ", " done, thanks!", "<function=f>", "</function>", "<tool_call>", "</tool_call>",
    "<tool_call>\n</tool_call>", "<think>", "</think>", "<think>\n\n</think>", "<response>", "</response>",
    "<|python_tag|>", "NaN", "Infinity", "null", "1e999", "// why\n", '"a": 1, ', '"name": "f", ', ', "id": 7',
    '{"x": 1}', '{"name": "f"}', '\n{"name": "f", "parameters": {}}', '\n{"name": "f", "arguments": {}}', "parameters",
    "arguments", "'", "é", "\ufffd", "\\ud800", "\\u0061", "true", "1.0", "-0",
    "\u200b", "\u200d", "\u00ad", "<TOOL_CALL>", "</Tool_Call>", "<tool_call >", "< tool_call>", "&lt;tool_call&gt;", "<THINK>",
    '"Name": "f", ', '"n\\u0061me": "f", ', "/* why */", "# why\n", "+1", ".5", "01", "1_000", "0x1", "None", "True", "-Infinity",
    "\\ud83d\\ude00", "\\x41", "\\/", '""', ",}", ",]", "<tool_call>\n[\n", "\n]\n</tool_call>", "\r\n", "\x85", "\u3000",
]  # fmt: skip

TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<response>", "</response>"]
BLOCKS = [
    r"<tool_call>.*?</tool_call>",
    r"<think>.*?</think>",
    r"\{.*\}",
    r"<response>.*</response>",
]


def random_target(rng: random.Random) -> Target:
    """Calls, text or both, with what is special to the formats in strings and keys."""

    def value(depth: int = 0):
        kind = rng.randrange(8 if depth < 2 else 6)
        if kind > 5:
            return [value(depth + 1)] if kind == 6 else {rng.choice(STRINGS): value(depth + 1)}
        return [rng.choice(STRINGS), rng.choice(STRINGS), 1, 2.5, True, None][kind]

    calls = tuple(
        Call(rng.choice("fg"), {k: value() for k in rng.sample("abc", rng.randrange(3))})
        for _ in range(rng.choice([1, 1, 2, 3]))
    )
    response = rng.choice([None, None, None, "Let me see."])
    return Target(calls, response, rng.choice([None, "so", "use <tool_call> or {"]))


def mutated(text: str, rng: random.Random) -> str:
    """The text with something inserted, deleted, exchanged, moved or doubled."""
    i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    edges = [k for k in range(len(text)) if text[k] in '{}[]<>"\n,:'] or [0]
    at = rng.choice(edges) + rng.randrange(2)
    lines = text.split("\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    block, tag = rng.choice(BLOCKS), rng.choice(TAGS)
    match rng.randrange(14):
        case 0:
            return text[:i] + rng.choice(PIECES) + text[i:]
        case 1 | 2:
            return text[:at] + rng.choice(PIECES) + text[at:]
        case 3:
            return text[:i] + text[min(j, i + 3) :]
        case 4:
            return text[:i] + chr(rng.choice([9, 10, 32, 34, 44, 91, 123, 125])) + text[i + 1 :]
        case 5:
            lines.insert(b, lines[a])
        case 6:
            lines.insert(b, lines.pop(a))
        case 7:
            del lines[a]
        case 8:  # a second block, somewhere, or one in the other
            found = re.search(block, text, re.DOTALL)
            return text[:at] + (found[0] if found else "") + text[at:]
        case 9:  # a block that is not closed, not opened, or of another tag
            return text.replace(tag, rng.choice(["", *TAGS]), 1)
        case 10:
            return text[:i] + text[i:j].swapcase() + text[j:]
        case 11:  # a letter as its escape
            return text[:i] + "".join(f"\\u{ord(c):04x}" for c in text[i : i + 1]) + text[i + 1 :]
        case 12:
            return rng.choice(PIECES) + text if rng.randrange(2) else text + rng.choice(PIECES)
        case _:
            old = rng.choice(["parameters", "arguments", "\n", " ", "</think>", "}", '"name"'])
            return text.replace(old, rng.choice(PIECES), rng.choice([1, -1]))
    return "\n".join(lines)


def check(template: str, count: int, seed: int) -> tuple[int, int]:
    """(exact completions, those that are not the gold answer letter for letter)"""
    rng, exact, changed = random.Random(f"{template}/{seed}"), 0, 0
    for _ in range(count):
        target, opened = random_target(rng), rng.random() < 0.2
        form = TEMPLATES[template].behind(opened)
        gold = text = form.render_answer(target)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            text = mutated(text, rng)
        answer = form.parse(text.encode())
        if not score(answer, target, template, RewardConfig(), 1.0).exact:
            continue
        exact, changed = exact + 1, changed + (text != gold)
        try:
            found = read(template, ("<think>" if opened else "") + text)
        except (ValueError, KeyError, TypeError) as error:
            pytest.fail(f"exact, but not read: {text!r}: {error}")
        assert same_calls(target.calls, found), text
    return exact, changed


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_what_is_exact_is_read_by_the_reference_reader(template):
    exact, changed = check(template, 1_000, seed=0)
    assert exact > 40 and changed > 20


@pytest.mark.slow
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_what_is_exact_is_read_by_the_reference_reader_20000(template):
    exact, changed = check(template, 20_000, seed=1)
    assert exact > 1_000 and changed > 800


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_gold_answer_is_exact_and_read(template):
    rng = random.Random(2)
    for _ in range(200):
        target = random_target(rng)
        text = TEMPLATES[template].render_answer(target)
        answer = TEMPLATES[template].parse(text.encode())
        assert score(answer, target, template, RewardConfig(), 1.0).exact, text
        assert same_calls(target.calls, read(template, text)), text
