"""Answers of the `reasoned` level of the synthetic world: every call is thought through before it is made.

For each thing asked for, a careful thought goes through the whole tool list, says of each tool whether it fits, and then
writes down every value under its masked name:

    need to send game: review game: "rikpom" no; send game: "zabkiv" yes. so "zabkiv" page_muz 52.

The call repeats what the thought decided, so most mistakes are made while thinking, as in real answers, and reasoning is
most of the tokens. `answer` writes such an answer; the habits of `REASONED_HABITS` spoil it.
"""

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Any

from rest_jax.data.synthetic.words import Tool
from rest_jax.tool_calls import Call, Target

# what the careless demonstrator does, with its probability where the habit applies
REASONED_HABITS: dict[str, float] = {
    "hasty": 0.25,  # does not go through the list: takes the first tool that shares the action or the object
    "forgets_second": 0.55,  # thinks of the first of two parallel calls only
    "stringly": 0.55,  # writes integers, numbers and booleans as strings in the call, not in the thought
    "chatty": 0.15,  # adds a response to calls, which the format does not allow there
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing asked for: `values` by parameter word. `waits`: it needs a result that is not there yet."""

    action: str
    thing: str
    values: dict[str, Any]
    waits: bool = False

    @property
    def does(self) -> str:
        return f"{self.action} {self.thing}"


def answer(
    tasks: Sequence[Task],
    tools: Sequence[Tool],
    done: str,
    report: str,
    nothing: str,
    habits: Collection[str] = (),
) -> Target:
    """The answer to `tasks` with `tools` as listed in the prompt.

    `done` opens the thought of a later step (empty in a first one); `report` answers where nothing is left to do, `nothing`
    where no tool fits. Without habits the answer is right.
    """
    thoughts, calls = [done] if done else [], []
    now = [task for task in tasks if not task.waits]
    for task in now[:1] if "forgets_second" in habits else now:
        chosen = _choose(task, tools, hasty="hasty" in habits)
        thoughts.append(_thought(task, tools, chosen, hasty="hasty" in habits))
        if chosen is not None:
            arguments = _arguments(task, chosen)
            calls.append(Call(chosen.name, arguments))
    thoughts += [f"{task.does}: later." for task in tasks if task.waits]
    if not tasks:
        thoughts.append("report it.")
    response = None
    if not calls:
        response = nothing if tasks else report
    return Target(calls=tuple(calls), response=response, think=" ".join(thoughts))


def _choose(task: Task, tools: Sequence[Tool], hasty: bool) -> Tool | None:
    """The tool that fits, or the first that seems to."""
    enough = any if hasty else all
    fitting = (t for t in tools if enough((t.action == task.action, t.thing == task.thing)))
    return next(fitting, None)


def _thought(task: Task, tools: Sequence[Tool], chosen: Tool | None, hasty: bool) -> str:
    text = f"need to {task.does}"
    if not hasty:
        checks = (
            f'{tool.action} {tool.thing}: "{tool.name}" {"yes" if tool is chosen else "no"}'
            for tool in tools
        )
        text = f"{text}: {'; '.join(checks)}"
    if chosen is None:
        return f"{text}. no tool fits."
    values = ", ".join(f"{k} {json.dumps(v)}" for k, v in _arguments(task, chosen).items())
    return f'{text}. so "{chosen.name}"{" " + values if values else ""}.'


def _arguments(task: Task, tool: Tool) -> dict[str, Any]:
    """The values said, under the tool's masked names, in the tool's order."""
    return {
        mask: task.values[word] for word, mask in tool.parameters.items() if word in task.values
    }
