"""Tests of NAME.py: python -m pytest test_NAME.py"""

import pathlib

from rest_jax import plugins
from rest_jax.rewards.plugin import plain
from rest_jax.templates import TEMPLATES

FILE = pathlib.Path(__file__).with_name(pathlib.Path(__file__).name.removeprefix("test_"))
score = plugins.load(plugins.read(f"{FILE}:score", "test"))

RECORD = {"tools": [{"name": "weather"}], "extra": {}, "target": {"calls": [], "response": None}}


def ask(text: str, **extra) -> dict[str, float]:
    """The parts that a completion gets."""
    completion = plain(TEMPLATES["toolrl"].parse(text.encode()))
    return score(completion, text, RECORD | {"extra": extra}, RECORD["target"])


def call(name: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "parameters": {{}}}}\n</tool_call>'


def test_a_brief_thought():
    assert ask("<think> ask </think>")["brief"] == 0.5
    assert ask("no thought")["brief"] == 0.0


def test_the_record_says_how_brief():
    long = f"<think> {'word ' * 60}</think>"
    assert ask(long)["brief"] == 0.0
    assert ask(long, difficulty=2)["brief"] == 0.5


def test_tools_that_are_not_offered():
    assert ask(call("weather"))["known_tools"] == 0.0
    assert ask(call("wether"))["known_tools"] == -1.0
