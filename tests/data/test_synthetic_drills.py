"""Drills: seeded, of training tools only, their answers determined by their prompts."""

import re

from rest_jax.data.synthetic_drills import drills
from rest_jax.data.synthetic_words import split_of


def test_seeded_and_independent_of_size():
    assert drills(3, 10) == drills(3, 30)[:10]
    assert drills(3, 10) != drills(4, 10)


def test_only_training_tools_occur():
    for record in drills(0, 200):
        for tool in record.tools:
            assert split_of(*tool["description"].split()) == "train"


def test_echo_says_the_request_again():
    echoes = [r for r in drills(0, 100) if r.id.endswith("echo")]
    assert len(echoes) == 50
    for record in echoes:
        assert record.target.response == record.history[0]["content"]


def test_lookup_names_the_tool_of_each_description_in_the_order_asked():
    for record in drills(0, 100):
        if not record.id.endswith("lookup"):
            continue
        names = {tool["description"]: tool["name"] for tool in record.tools}
        asked = record.history[0]["content"].removeprefix("which tools ").split(" and ")
        said = re.findall(r'(\w+ \w+): "(\w+)" fits', record.target.think.removeprefix("need to "))
        assert said == [(a.replace(" the ", " "), names[a.replace(" the ", " ")]) for a in asked]
