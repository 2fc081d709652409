"""What a world of tools, the driver of dialogues and a model say to each other.

    World    one dialogue: reset(task) gives its first messages and its tools; `call` and `say` continue it, `score` judges it
    Source   many dialogues, of worlds or of another process: `poll` gives the queries that wait, `reply` takes a completion
    Query    what is to be completed           Reply    the completion           Tokens    a dialogue, token by token

Messages and tools are those of OpenAI's chat API: roles system, user, assistant (`content`, `tool_calls`, and
`reasoning_content` for its thought) and tool (`tool_call_id`, `content`); a tool is {"type": "function", "function": {"name",
"description", "parameters": JSON schema}}. `evaluation/dialogues.py` is the driver.
"""

import dataclasses
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int8, Int32

from rest_jax.tool_calls import Answer, Call

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Query:
    """A dialogue whose next turn the model has to write: all messages so far."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    max_tokens: int | None = None  # of the completion; None: what the driver allows


@dataclasses.dataclass(frozen=True)
class Reply:
    """The completion of a query. Arrays have one value for each token that was drawn, the stop id among them."""

    text: str  # without the stop token; with the thought's opening tag where the prompt has written it
    answer: Answer  # the parse of the text
    ids: Int32[np.ndarray, " n"]
    logp: Float32[np.ndarray, " n"]  # of the model's own distribution
    entropy: Float32[np.ndarray, " n"]  # nats
    region: Int8[np.ndarray, " n"]  # tool_calls.Region
    truncated: (
        bool  # no stop id within the limit; without ids: the prompt leaves no room for one token
    )
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A dialogue as the model has read and written it, [T]. Tokens that it did not write have 0 in `logp` and `entropy`, and
    region NONE.
    """

    ids: Int32[np.ndarray, " T"]
    logp: Float32[np.ndarray, " T"]
    entropy: Float32[np.ndarray, " T"]
    region: Int8[np.ndarray, " T"]
    turn: Int32[
        np.ndarray, " T"
    ]  # the completion, from 0, that the token is of, or that it came in for


class World(Protocol):
    """The world of one dialogue at a time. What it does depends on the task and the calls alone."""

    done: bool  # the dialogue is over

    def reset(self, task: Any) -> tuple[list[Message], list[Tool]]:
        """Begins the dialogue of a task: the messages that open it, and the tools that are offered."""
        ...

    def call(self, calls: Sequence[Call]) -> list[str]:
        """Makes the calls of one turn, in order, and gives their results, one for each. A call that fails has its error as the
        result. ValueError when the dialogue is done.
        """
        ...

    def say(self, text: str) -> list[Message]:
        """Takes a turn without calls, and gives what the user says to it: nothing where that ends the dialogue. ValueError when
        the dialogue is done.
        """
        ...

    def score(self) -> float:
        """How well the task is done, 0 to 1. A dialogue that was broken off counts as it is."""
        ...

    def snapshot(self) -> Any:
        """The state of the dialogue, for `restore`; nothing that happens later changes it."""
        ...

    def restore(self, state: Any) -> None:
        """Goes back to a state of this dialogue, or of another of the same kind of world."""
        ...


class Source(Protocol):
    """Who asks: dialogues of worlds, or a child process."""

    def poll(self, block: bool) -> list[tuple[Hashable, Query]] | None:
        """The queries that wait for a reply and were not given yet, each with the key of its dialogue, which has one at a time.
        `block`: waits until there is one. None: no more will ever come.
        """
        ...

    def reply(self, key: Hashable, reply: Reply) -> None:
        """Takes the completion of the open query of a dialogue."""
        ...


def assistant_message(answer: Answer, first: int = 0) -> dict[str, Any]:
    """The turn of a model as a message; the ids of its calls are numbered from `first`."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.response}
    if answer.think is not None:
        message["reasoning_content"] = answer.think
    if answer.calls:
        message["tool_calls"] = [_call(call, first + i) for i, call in enumerate(answer.calls)]
    return message


def _call(call: Call, number: int) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{number}", "type": "function", "function": function}
