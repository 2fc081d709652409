"""Drills in copying and looking up, for the supervised start of a tiny policy.

A transformer of a million parameters learns to copy a name it has never seen only after many steps on the world alone, where a
record holds two or three such tokens. Drills are dense: every record is made of them. Two kinds, in equal parts:
`echo` (say these quoted names and values again) and `lookup` (which tools do these things; the thought answers, in the
very words the world's thoughts use). Only training tools occur. Drills are for imitation; they are never rewarded.
"""

import random

from rest_jax.answer import Target
from rest_jax.data.records import StepRecord
from rest_jax.data.synthetic import Draft, Maker, thought
from rest_jax.data.synthetic_words import value, words


def drills(seed: int, size: int) -> list[StepRecord]:
    """`size` records, seeded; record i depends on (seed, i) only."""
    return [_drill(seed, i) for i in range(size)]


def _drill(seed: int, index: int) -> StepRecord:
    name = f"drill-{seed}-{index}"
    rng = random.Random(name)
    maker = Maker(rng, "train")
    kind, draft = ("echo", _echo(maker)) if index % 2 else ("lookup", _lookup(maker))
    return StepRecord(
        id=f"synthetic-{name}-{kind}",
        source="synthetic",
        tools=tuple(tool.schema() for tool in draft.tools),
        history=tuple(draft.history),
        target=draft.target,
    )


def _echo(maker: Maker) -> Draft:
    rng = maker.rng
    pieces = [f'"{maker.name(rng.randint(1, 3))}"' for _ in range(rng.randint(6, 16))]
    pieces += [f"{word} {value(rng, word)[1]}" for word in words(rng, rng.randint(0, 4))]
    rng.shuffle(pieces)
    said = ", ".join(pieces)
    history = [{"role": "user", "content": f"say {said}"}]
    return Draft(
        [maker.tool(most=1)], history, Target(response=f"say {said}", think="say it again")
    )


def _lookup(maker: Maker) -> Draft:
    rng = maker.rng
    tools = [maker.tool(most=1)]
    tools += [
        maker.similar(tools[0]) if rng.random() < 0.5 else maker.tool(most=1) for _ in range(3)
    ]
    rng.shuffle(tools)
    asked = rng.sample(tools, len(tools))
    request = " and ".join(f"{tool.action} the {tool.thing}" for tool in asked)
    history = [{"role": "user", "content": f"which tools {request}"}]
    target = Target(response="These tools.", think=thought(*((tool, tool.name) for tool in asked)))
    return Draft(tools, history, target)
