"""Dialogues of worlds as a source: who is asked when, and what a reply does."""

import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target
from rest_jax.worlds.dialogues import Dialogues
from rest_jax.worlds.records import Reply
from rest_jax.worlds.synthetic import Shop, tasks

TASKS = {task.id: task for task in tasks(0, 3)}


def reply(text: str, truncated: bool = False, tokens: int = 5) -> Reply:
    numbers = np.zeros(tokens, np.float32)
    answer = TEMPLATES["hermes"].parse(text.encode())
    ids, region = np.zeros(tokens, np.int32), np.zeros(tokens, np.int8)
    return Reply(text, answer, ids, numbers, numbers, region, truncated, prompt_tokens=9)


def written(*calls: Call, response: str | None = None, think: str | None = None) -> str:
    return TEMPLATES["hermes"].render_answer(Target(calls, response, think))


def asked(source) -> dict:
    return dict(source.poll(block=False))


def test_as_many_are_open_as_may_be_and_each_is_asked_once():
    told = []
    source = Dialogues(Shop, TASKS, at_once=2, show=lambda *said: told.append(said))
    first, second, third = TASKS
    assert asked(source).keys() == {first, second} and asked(source) == {}
    source.reply(first, reply("Done.", tokens=3))  # the customer has another request
    assert asked(source).keys() == {first}
    source.reply(first, reply("", tokens=0))  # no room is left
    assert asked(source).keys() == {third}
    for key in (second, third):
        while key not in source.finished:
            source.reply(key, reply("Done."))
    assert source.poll(block=True) is None
    assert [done for done, _ in told] == [1, 2, 3]
    assert told[0][1] == "1 turns, 3 tokens"


def test_a_first_prompt_without_room_is_refused():
    source = Dialogues(Shop, TASKS, at_once=1)
    (key,) = asked(source)
    with pytest.raises(UserError, match=rf"^dialogue {key}: its first prompt has 9 tokens, "):
        source.reply(key, reply("", tokens=0))


def test_results_stand_behind_their_calls():
    (key, *_) = TASKS
    source = Dialogues(Shop, {key: TASKS[key]}, at_once=1)
    before = asked(source)[key]
    calls = [Call("find_customer", {"name": name}) for name in TASKS[key].customers]
    source.reply(key, reply(written(*calls, response="I look.", think="who?")))
    query = asked(source)[key]
    assert query.messages[:2] == before.messages and query.tools == before.tools
    turn, *results = query.messages[2:]
    assert (turn["content"], turn["reasoning_content"]) == ("I look.", "who?")
    ids = [call["id"] for call in turn["tool_calls"]]
    assert [result["tool_call_id"] for result in results] == ids and len(set(ids)) == 3
    found = [f'{{"customer": "{number}"}}' for number in TASKS[key].customers.values()]
    assert [result["content"] for result in results] == found


@pytest.mark.parametrize(
    ("text", "truncated"),
    [
        (written(Call("find_customer", {"name": "anna"})), True),
        (
            written(Call("find_customer", {"name": "anna"})) + "\n<tool_call>\n{\n</tool_call>",
            False,
        ),
        ("Hello.", False),
    ],
    ids=["cut", "unreadable", "text"],
)
def test_what_makes_no_calls_is_said(text, truncated):
    key = next(task.id for task in TASKS.values() if len(task.requests) == 2)
    source = Dialogues(Shop, {key: TASKS[key]}, at_once=1)
    asked(source)
    source.reply(key, reply(text, truncated))
    turn, answer = asked(source)[key].messages[2:]
    assert turn == {"role": "assistant", "content": text}
    assert answer == {"role": "user", "content": TASKS[key].requests[1]}
