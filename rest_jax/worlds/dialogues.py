"""Dialogues of worlds as a source of queries (`records.Source`): each world's turns, from its first messages to its score."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from rest_jax.errors import UserError
from rest_jax.worlds.records import Message, Query, Reply, Tool, World, assistant_message


@dataclasses.dataclass
class Dialogue:
    """One dialogue so far; `messages` are all that were said, those of the world and of the model."""

    world: World
    messages: list[Message]
    tools: list[Tool]
    turns: int = 0
    tokens: int = 0  # that the model has written
    truncated: bool = False  # a turn did not end within its limit
    score: float = 0.0  # once it is done


class Dialogues:
    """The dialogues of tasks, `at_once` of them at a time. Those that are done are in `finished`, by key."""

    def __init__(
        self,
        make_world: Callable[[], World],
        tasks: Mapping[Hashable, Any],
        at_once: int,
        show: Callable[[int, str], None] = lambda *_: None,
    ):
        """`show` is told how many are done, and of the last one."""
        self.finished: dict[Hashable, Dialogue] = {}
        self._make_world = make_world
        self._waiting = collections.deque(tasks.items())
        self._open: dict[Hashable, Dialogue] = {}
        self._ready: list[Hashable] = []
        self._at_once, self._show = at_once, show

    def poll(self, block: bool) -> list[tuple[Hashable, Query]] | None:
        """`Source.poll`. A world has its results at once, so that there is never anything to wait for."""
        while self._waiting and len(self._open) < self._at_once:
            key, task = self._waiting.popleft()
            world = self._make_world()
            self._open[key] = Dialogue(world, *world.reset(task))
            self._ready.append(key)
        ready, self._ready = self._ready, []
        if not self._open:
            return None
        return [(key, self._query(self._open[key])) for key in ready]

    def reply(self, key: Hashable, reply: Reply) -> None:
        """`Source.reply`. A turn that was cut, or has a call that cannot be read, makes no calls: it is something said.

        A dialogue without a token left for a turn is over. UserError where there is none for the first.
        """
        dialogue = self._open[key]
        if not len(reply.ids) and not dialogue.turns:
            raise UserError(
                f"dialogue {key}: its first prompt has {reply.prompt_tokens:,} tokens, which leaves no token for a completion; "
                "raise rollout.cache_tokens, or use a model with more positions (max_position_embeddings)"
            )
        dialogue.truncated = dialogue.truncated or reply.truncated
        if len(reply.ids):
            _continue(dialogue, reply)
        if dialogue.world.done or not len(reply.ids):
            dialogue.score = dialogue.world.score()
            self.finished[key] = self._open.pop(key)
            self._show(len(self.finished), f"{dialogue.turns} turns, {dialogue.tokens} tokens")
        else:
            self._ready.append(key)

    @staticmethod
    def _query(dialogue: Dialogue) -> Query:
        return Query(tuple(dialogue.messages), tuple(dialogue.tools))


def _continue(dialogue: Dialogue, reply: Reply) -> None:
    """Tells the world what the model has written, and keeps both and what the world says to it."""
    world, answer = dialogue.world, reply.answer
    dialogue.turns += 1
    dialogue.tokens += len(reply.ids)
    if answer.calls and not answer.broken_calls and not reply.truncated:
        said = assistant_message(answer, first=len(dialogue.messages))
        dialogue.messages += [said, *_results(said, world.call(answer.calls))]
    else:
        said = {"role": "assistant", "content": reply.text}
        dialogue.messages += [said, *world.say(reply.text)]


def _results(said: Message, results: list[str]) -> list[Message]:
    calls = said["tool_calls"]
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": result}
        for call, result in zip(calls, results, strict=True)
    ]
