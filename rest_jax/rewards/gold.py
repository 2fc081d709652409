"""Gold answers that a template can say: what sources write as text is read, and each gold answer is scored as its own completion.

In: the gold answer of a record and the template, behind whose prompt it stands. Out: the answer to train on, for which the
rendered text scores `exact`; or the reason why there is none. Host code without jax.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from rest_jax.config import RewardConfig
from rest_jax.rewards.score import score
from rest_jax.templates import TEMPLATES, Template
from rest_jax.tool_calls import Answer, Block, Call, Target

# A closing tag alone, as models write it whose prompt has opened the thought; not one that a sentence mentions.
_closing_line = re.compile(r"(?:\A|\n)[ \t]*</think>|</think>[ \t]*(?:\n|\Z)").search
_own_tags = re.compile(r"\A\s*<think>|</think>\s*\Z").sub
_call_as_text = re.compile(r"<tool_call>\s*[{\[]").search
# How other formats begin a thought and end it.
_THOUGHT_TAG = r"(?:<{0}(?:think|thinking|thought|reasoning)>|\[{0}THINK\]|◁{0}think▷)"
_thought_start = re.compile(rf"\A\s*{_THOUGHT_TAG.format('')}", re.IGNORECASE)
_thought_begin = re.compile(_THOUGHT_TAG.format(""), re.IGNORECASE).search
_thought_end = re.compile(_THOUGHT_TAG.format("/"), re.IGNORECASE)
# How other formats begin a call,
_foreign_call = re.compile(
    r"<(?:tool|function)_?calls?>\s*[{\[<]|<function=|<invoke name=|<start_function_call>|<\|(?:tool|function)[_▁]?calls?"
    r"|\[TOOL_CALLS\]|<｜(?:tool▁calls?|DSML)|<\|channel\|>|✿FUNCTION✿|functools\s*\[|```tool_(?:code|call)|<\|START_ACTION\|>"
    r"|<\|python_(?:tag|start)\|>(?!\s*[{\[])|\bto=functions\.",
    re.IGNORECASE,
).search
# and where one of a tool on offer is one, by the name in it: a member of an object (JSON's or Python's), an element or an
# attribute of markup, ReAct's, and code, behind the tag of a call or as all of the text.
_NAMED = r"(?i:name|(?:tool|function|action|api|recipient)(?:_?name)?)"
_CALL_TAG = r"<\|?[\w:▁-]{0,40}(?i:tool|function|call|action|invoke|python)[\w:▁-]{0,40}"
_CODE = r"(?:(?:print\(|await\b|\w++\s*+=)\s*+)*+\[?\s*+(?:functions\.)?([\w.-]++)"
_call_of = re.compile(
    rf"[{{,]\s*+[\"']{_NAMED}[\"']\s*+:\s*+[\"'](?:functions\.)?([^\"'\\]++)[\"']"
    rf"|<{_NAMED}>\s*+([^<>\s]++)\s*+</|<([\w.-]++)>(?=\s*+[{{<])"
    rf"|{_CALL_TAG}\s++(?:[^<>]*?\s)?name\s*+=\s*+[\"']([^\"'<>]++)|{_CALL_TAG}\|?>\s*+{_CODE}"
    rf"|^Action:\s*+([\w.-]++)|\A\s*+(?:```\w*+\s++)?{_CODE}\((?=.*\)[\]`;\s]*\Z)",
    re.MULTILINE | re.DOTALL,
).finditer
_may_be_bare = re.compile(r"\s*(?:<\|python_tag\|>|[{\[])").match


class GoldError(ValueError):
    """A gold answer that cannot be reached; the text says why."""


def reachable(target: Target, template: Template, tools: Collection[str] = ()) -> Target:
    """The gold answer that the template's own text scores `exact` for. `tools`: the names of the tools on offer.

    White space is no response; a thought and calls in the text are read (`read_turn`); verbatim text that says something else
    is dropped. GoldError when the answer is empty, or what is rendered of it is not read back.
    """
    turn = {"content": target.response, "think": target.think, "calls": target.calls}
    turn = _read(turn, tools)
    target = dataclasses.replace(
        target, response=turn["content"], think=turn["think"], calls=tuple(turn["calls"])
    )
    if not target.calls and target.response is None and not (target.think or "").strip():
        raise GoldError("the gold answer is empty")
    fault = _fault(target, template)
    if fault and target.text is not None:
        target = dataclasses.replace(target, text=None)
        fault = _fault(target, template)
    if fault:
        raise GoldError(f"the template {template.name} cannot say the gold answer: {fault}")
    return target


def read_turn(turn: Mapping[str, Any], tools: Collection[str]) -> dict[str, Any]:
    """An assistant turn of a dialogue ({"role", "content", "calls", "think"}) in which the thought and the calls that its content
    holds as text are read; as it was where they cannot be read.
    """
    given = {
        "content": turn.get("content"),
        "think": turn.get("think"),
        "calls": tuple(Call(c["name"], c["arguments"]) for c in turn.get("calls") or ()),
    }
    try:
        found = _read(given, tools)
    except GoldError:
        return dict(turn)
    if found == given or (found["content"] is None and not found["calls"] and not found["think"]):
        return dict(turn)
    calls = [dataclasses.asdict(call) for call in found["calls"]]
    read = {"content": found["content"], "think": found["think"], "calls": calls}
    kept = {key: value for key, value in read.items() if value or key == "content"}
    others = {key: value for key, value in turn.items() if key not in read}
    return others | kept


def _read(turn: dict[str, Any], tools: Collection[str]) -> dict[str, Any]:
    """Content, thought and calls (`Call`s), with what stands in the content as text. GoldError when it cannot be read."""
    content = turn["content"]
    if turn["think"]:
        turn = {**turn, "think": _own_tags("", turn["think"])}
    if content is None or not content.strip():
        return {**turn, "content": None}
    answer = _answer_in(content, tools)
    if answer is None:
        return turn
    if turn["calls"] and answer.calls and answer.calls != tuple(turn["calls"]):
        raise GoldError("its text has other calls than its tool calls")
    thoughts = dict.fromkeys(
        t for t in ((turn["think"] or "").strip(), (answer.think or "").strip()) if t
    )
    return {
        "content": answer.response,
        "think": "\n".join(thoughts) or turn["think"],
        "calls": turn["calls"] or answer.calls,
    }


def _answer_in(content: str, tools: Collection[str]) -> Answer | None:
    """The parse of a text with a thought or calls in it; None for plain text. GoldError when they cannot be read."""
    opened = _thought_start.match(content) is not None
    if opened and not content.lstrip().startswith("<think>"):
        content = _thought_end.sub("</think>", _thought_start.sub("<think>", content), count=1)
    data = content.encode("utf-8", "replace")
    closed = _closing_line(content) is not None and "<think>" not in content
    if opened or closed or _call_as_text(content):
        for name in ("toolrl", "hermes"):
            answer = TEMPLATES[name].parse(data)
            if not {Block.BROKEN, Block.TEXT} & set(answer.blocks):
                _check_plain(answer.response or "", tools)
                return answer
        raise GoldError("its text has a thought or a call that cannot be read")
    if _may_be_bare(content) and not _foreign_call(content):
        answer = TEMPLATES["llama3"].parse(data)
        if (
            answer.calls
            and not answer.broken_calls
            and {c.name for c in answer.calls} <= set(tools)
        ):
            return answer
    _check_plain(content, tools)
    return None


def _check_plain(text: str, tools: Collection[str]) -> None:
    """GoldError for a text that still has a call in it, or a thought from its first tag to its last."""
    if _foreign_call(text) or any(
        name in tools for found in _call_of(text) for name in found.groups()
    ):
        raise GoldError("its text has a call that cannot be read")
    begun = _thought_begin(text)
    if begun is not None and _thought_end.search(text, begun.end()):
        raise GoldError("its text has a thought that cannot be read")


def _fault(target: Target, template: Template) -> str | None:
    """What the template's text of a gold answer does not give back, None when it scores `exact`."""
    try:
        text = template.render_answer(target)
        data = text.encode()
    except UnicodeEncodeError as error:
        return f"half a character ({error.object[error.start]!a})"
    except (ValueError, TypeError, RecursionError) as error:
        return f"not a JSON value: {error}"
    answer = template.parse(data)
    found = score(answer, target, template.name, RewardConfig(), 1.0)
    if target.calls and (answer.broken_calls or found.accuracy < 1.0):
        return "its calls are not read back"
    if (answer.response or "") != (target.response or "").strip():
        return "its response is not read back"
    if (answer.think or "") != (target.think or "").strip():
        return "its thought is not read back"
    if not found.exact:
        return "its text is not in the format"
    return None
