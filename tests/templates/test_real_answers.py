"""All real rlla answers: read like an independent JSON parse reads them, every name and argument object covered."""

import json
import re

import numpy as np
import pytest

from rest_jax.config import RewardConfig
from rest_jax.rewards.score import score
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Region, Target


@pytest.fixture(scope="module")
def records(data_dir):
    return json.loads((data_dir / "rlla" / "rlla_sft.json").read_text())


def lines_of_calls(text: str) -> list[tuple[int, str]]:
    """(character offset, line) of every call, by plain string search."""
    start = text.rindex("</think>")
    if "<tool_call>" not in text[start:]:
        return []
    start = text.index("<tool_call>", start) + len("<tool_call>")
    block = text[start : text.index("</tool_call>", start)]
    found = []
    for line in block.splitlines(keepends=True):
        if line.strip():
            found.append((start, line.strip()))
        start += len(line)
    return found


def test_there_are_400(records):
    assert len(records) == 400


def test_calls_equal_an_independent_parse(records):
    total = 0
    for record in records:
        text = record["output"]
        answer = TEMPLATES["toolrl"].parse(text.encode())
        expected = [json.loads(line) for _, line in lines_of_calls(text)]
        assert list(answer.calls) == [Call(e["name"], e["parameters"]) for e in expected]
        assert answer.broken_calls == 0
        total += len(expected)
    assert total == 576


def test_every_name_and_argument_object_is_covered_exactly(records):
    for record in records:
        text = record["output"]
        answer = TEMPLATES["toolrl"].parse(text.encode())
        region = np.repeat(answer.span_regions, np.diff(answer.span_ends, prepend=0))
        expected = np.zeros(len(text.encode()), np.int8)
        for offset, line in lines_of_calls(text):
            name = line.index('"name": "') + len('"name": "')
            name_end = line.index('", "parameters": ', name)
            arguments = name_end + len('", "parameters": ')
            for first, last, r in [
                (name, name_end, Region.NAME),
                (arguments, len(line) - 1, Region.PARAM),
            ]:
                at = len(text[: offset + first].encode())
                expected[at : at + len(line[first:last].encode())] = r
        placed = np.isin(region, [Region.NAME, Region.PARAM])
        np.testing.assert_array_equal(np.where(placed, region, 0), expected)
        assert Region.OTHER not in region


def test_each_answer_scores_full_marks_against_itself(records):
    for record in records:
        answer = TEMPLATES["toolrl"].parse(record["output"].encode())
        target = Target(answer.calls, answer.response, answer.think, record["output"])
        found = score(answer, target, "toolrl", RewardConfig(), 1.0)
        assert (found.format_score, found.accuracy, found.exact, found.spurious) == (
            1.0,
            1.0,
            True,
            False,
        )
        assert found.reward == (4.0 if answer.calls else 1.0)
        assert TEMPLATES["toolrl"].render_answer(target) == record["output"]


@pytest.mark.parametrize("template", ["hermes", "llama3"])
def test_real_answers_survive_being_written_in_another_template(records, template):
    for record in records:
        source = TEMPLATES["toolrl"].parse(record["output"].encode())
        target = Target(source.calls, source.response, source.think, record["output"])
        text = TEMPLATES[template].render_answer(target)
        assert text != record["output"]
        found = score(
            TEMPLATES[template].parse(text.encode()), target, template, RewardConfig(), 1.0
        )
        assert (found.format_score, found.accuracy, found.exact) == (1.0, 1.0, True), text


def test_prompts_are_reproduced_to_the_letter(records):
    """The system text from its tool list, the user text from its turns."""
    turns = 0
    for record in records:
        listed = (
            record["instruction"].split("the following tools:\n")[1].split("\n\n**Steps for")[0]
        )
        tools = []
        for entry in ("\n" + listed).split("\nParameters: "):
            if tools:
                tools[-1]["parameters"] = json.loads(entry.split("\n")[0])
            if ". Name: " in entry:
                head = entry[entry.index(". Name: ") + len(". Name: ") :]
                name, _, description = head.partition("\nDescription: ")
                tools.append({"name": name, "description": description})
        history = read_dialogue(record["input"])
        system, user = TEMPLATES["toolrl"].render_prompt(tools, history)
        letters = re.sub(
            r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), record["instruction"]
        )
        assert system == {"role": "system", "content": letters}
        assert user == {"role": "user", "content": record["input"]}
        turns += len(history)
    assert turns > 450


def read_dialogue(text: str) -> list[dict]:
    """Turns of an rlla dialogue; each begins a line with its opening tag."""
    history = []
    rest = text.removeprefix("**Dialogue Records History**\n")
    while rest := rest.lstrip("\n"):
        tag = rest[1 : rest.index(">")]
        body, rest = rest[len(tag) + 2 :].split(f"</{tag}>", 1)
        if tag == "user":
            history.append({"role": "user", "content": body[1:-1]})
        elif tag == "obs":
            history.append({"role": "tool", "content": body[1:-1]})
        elif tag == "think":
            history.append({"role": "assistant", "content": None, "think": body[1:-1]})
        elif tag == "tool_call":
            calls = [json.loads(line) for line in body.strip().split("\n")]
            history[-1]["calls"] = [
                {"name": c["name"], "arguments": c["parameters"]} for c in calls
            ]
        else:
            history[-1]["content"] = body[1:-1]
    return history
