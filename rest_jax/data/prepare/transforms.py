"""Changes to step records that make tool use harder to learn by heart: names masked, the right tool taken away.

Pure functions StepRecord -> StepRecord, or None where the record does not allow the change; `unmaskable` and `unremovable`
say why. A changed record has no verbatim prompt, verbatim answer or way back to its source any more: they would contradict it.
"""

import dataclasses
import json
import random
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from rest_jax.data.convert import hammer
from rest_jax.data.prepare import masking, seeded
from rest_jax.data.records import StepRecord, to_json
from rest_jax.tool_calls import Call, Target

NO_TOOL = hammer.NO_CALL  # the answer when the right tool is missing
TEXT_ONLY = "the prompt is there only as text"

# Words that a sentence may hold without meaning a tool: "search", "Weather", "send money"
_PLAIN = re.compile(r"[A-Za-z]?[a-z]*( [a-z]+)*").fullmatch


_Rename = Callable[[str], str]


def structured(record: StepRecord) -> bool:
    """Whether tools and history say the prompt, so that it can be written anew from them."""
    return record.messages is None or bool(record.tools and record.history)


def rewritten(record: StepRecord, **changes: Any) -> StepRecord:
    """The record with other tools, history or target, without its verbatim prompt and its way back to the source."""
    return dataclasses.replace(record, messages=None, extra={}, **changes)


def not_offered(record: StepRecord) -> set[str]:
    """Names that the record calls, in its history or its target, and does not offer; none where the tools are not known."""
    if not structured(record):
        return set()
    calls = {*called(record), *(call.name for call in record.target.calls)}
    return calls - {tool["name"] for tool in record.tools}


def called(record: StepRecord) -> list[str]:
    """Names of the tools called in the history."""
    return [call["name"] for turn in record.history for call in turn.get("calls") or ()]


# --- name masking ---------------------------------------------------------------------------------------------------


def unmaskable(record: StepRecord) -> str | None:
    """Why the names of this record cannot be masked, None if they can."""
    if not structured(record):
        return TEXT_ONLY
    if not record.tools:
        return "no tool is offered"
    if not_offered(record):
        return "it calls a tool that is not offered"
    return None


def mask_names(record: StepRecord, seed: int) -> StepRecord | None:
    """Random words for the names of tools and parameters and for defaults, descriptions kept. Depends on seed and id.

    The same name becomes the same word everywhere in the record: tools, nested properties (`masking` says where), calls of
    the history and of the target. In texts: names of tools in thoughts, answers, observations and the system text, names of
    parameters in thoughts and answers, as whole words; a name that is a plain word only in quotes. What the user says stays.
    A default is masked when it is text and neither its description, nor its enum, nor the dialogue has it; arguments
    equal to it become the new default.
    """
    if unmaskable(record) is not None:
        return None
    rng = seeded.generator(seed, "mask", record.id)
    raw = to_json(record)
    word = _words(rng, json.dumps([raw["tools"], raw["history"], raw["target"]]))
    names: dict[str, str] = {}  # of tools
    mask = masking.Mask(word, {}, {}, "\n".join(_texts(record)))
    tools = []
    schemas: dict[str, list[masking.Schema]] = {}  # by tool
    for tool in record.tools:
        name, whole = names.setdefault(tool["name"], word()), masking.whole_schema(tool)
        tools.append({**masking.mask_tool(tool, whole, mask), "name": name})
        schemas.setdefault(tool["name"], []).append((whole, whole))

    def mask_call(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return names[name], masking.mask_value(arguments, schemas[name], mask)

    of_tools, of_all = _replacer(names, mask.said), _replacer(mask.names | names, mask.said)
    target = record.target
    return rewritten(
        record,
        tools=tuple(tools),
        history=tuple(_mask_turn(turn, mask_call, of_tools, of_all) for turn in record.history),
        target=Target(
            calls=tuple(Call(*mask_call(call.name, call.arguments)) for call in target.calls),
            response=None if target.response is None else of_all(target.response),
            think=None if target.think is None else of_all(target.think),
        ),
    )


def _words(rng: random.Random, text: str) -> Callable[[], str]:
    """A source of random words of 6 to 10 letters, none of them twice and none in the text."""
    used: set[str] = set()

    def word() -> str:
        while True:
            made = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(6, 10)))
            if made not in used and made not in text:
                used.add(made)
                return made

    return word


def _texts(record: StepRecord) -> list[str]:
    """All that is said in the dialogue and in its answer."""
    target = record.target
    texts = [turn.get(field) for turn in record.history for field in ("content", "think")]
    return [text for text in (*texts, target.response, target.think) if text]


def _mask_turn(
    turn: dict[str, Any], mask_call: Callable, of_tools: _Rename, of_all: _Rename
) -> dict[str, Any]:
    if turn["role"] == "user":
        return turn
    replace = of_all if turn["role"] == "assistant" else of_tools
    masked = dict(turn)
    for field in ("content", "think"):
        if turn.get(field):
            masked[field] = replace(turn[field])
    if turn.get("calls"):
        pairs = [mask_call(call["name"], call["arguments"]) for call in turn["calls"]]
        masked["calls"] = [{"name": name, "arguments": arguments} for name, arguments in pairs]
    return masked


def _replacer(names: Mapping[str, str], said: str) -> _Rename:
    """Replaces whole-word mentions of names in parts of `said`; of names that are plain words only those in quotes."""
    longest_first = sorted((name for name in names if name in said), key=len, reverse=True)
    marked = "|".join(re.escape(name) for name in longest_first if not _PLAIN(name))
    plain = "|".join(re.escape(name) for name in longest_first if name and _PLAIN(name))
    either = [rf"(?<!\w)(?:{marked})(?!\w)"] if marked else []
    either += [rf"(?<=[\"'`])(?:{plain})(?=[\"'`])"] if plain else []
    if not either:
        return lambda text: text
    pattern = re.compile("|".join(either))
    return lambda text: pattern.sub(lambda found: names[found[0]], text)


# --- irrelevance ----------------------------------------------------------------------------------------------------


def unremovable(record: StepRecord) -> str | None:
    """Why the right tools of this record cannot be taken away, None if they can."""
    if not structured(record):
        return TEXT_ONLY
    right = {call.name for call in record.target.calls}
    if not right:
        return "it calls no tool"
    if right & set(called(record)):
        return "the history calls the right tool too"
    if not right & {tool["name"] for tool in record.tools}:
        return "the right tool is not offered"
    if right >= {tool["name"] for tool in record.tools}:
        return "no other tool is offered"
    return None


def remove_right_tools(record: StepRecord, response: str = NO_TOOL) -> StepRecord | None:
    """Without the tools that the target calls; the answer is then `response` and no call."""
    if unremovable(record) is not None:
        return None
    right = {call.name for call in record.target.calls}
    tools = tuple(tool for tool in record.tools if tool["name"] not in right)
    return rewritten(record, tools=tools, target=Target(response=response))
