"""A small folder in API-Bank's layout, and a model of dialogues that writes what a script says."""

import collections
import json
from collections.abc import Callable, Hashable

import numpy as np
import pytest

from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.requests import Piece, Request
from rest_jax.templates import toolrl
from rest_jax.worlds.records import Query, Reply, Source

_ALARM = {"time": {"type": "str", "description": "The time."}, "on": {"type": "bool", "description": ""}}  # fmt: skip
_TOOLS = [
    {"name": "AddAlarm", "description": "Sets an alarm.", "parameters": _ALARM},
    {"name": "Now", "description": "The time of day.", "parameters": {}},
]


def _record(user: str, name: str, **parameters: str) -> dict:
    system, history = toolrl.render_prompt(_TOOLS, [{"role": "user", "content": user}])
    answer = {"name": name, "parameters": parameters}
    return {"system": system["content"], "user": history["content"], "answer": answer}


@pytest.fixture
def bank(tmp_path):
    """Three records of level 1, one of levels 2 and 3 each. Of levels 1 and 3 the answer is a list."""
    levels = {
        1: [
            _record("An alarm at 07:00.", "AddAlarm", time="07:00"),
            _record("An alarm at seven.", "AddAlarm", time="07:00"),
            _record("No alarm at 08:00, False.", "AddAlarm", time="08:00", on="False"),
        ],
        2: [_record("Drop the alarm at 07:00.", "DropAlarm", time="07:00")],
        3: [_record("Alarm: 09:00.", "AddAlarm", at="09:00")],
    }
    folder = tmp_path / "bank"
    folder.mkdir()
    for level, records in levels.items():
        if level != 2:
            records = [r | {"answer": [r["answer"]]} for r in records]
        (folder / f"level-{level}-api_processed.json").write_text(json.dumps(records))
    return folder


class Script:
    """A source whose queries are written down, and the stream that answers them: `write(key, query)` says what the model writes,
    and `spell` in which ids. Like the stream of a policy it has decode slots, draws some tokens a step, and has to prefill what
    no earlier sequence begins with.
    """

    slots, page = 3, 16

    def __init__(
        self, source: Source, tokenizer: Tokenizer, write: Callable[[Hashable, Query], str]
    ):
        self.source, self.tokenizer, self.write = source, tokenizer, write
        self.requests: list[tuple[Hashable, Request]] = []
        self.replies: list[tuple[Hashable, Reply]] = []
        self.prompt_tokens = self.prefilled_tokens = self.most_open = 0
        self._asked: collections.deque = collections.deque()
        self._seen: list[np.ndarray] = []
        self._drawing: dict[int, list[int]] = {}

    def poll(self, block: bool):
        queries = self.source.poll(block)
        self._asked.extend(queries or ())
        return queries

    def reply(self, key: Hashable, reply: Reply) -> None:
        if not len(reply.ids):
            self._asked.remove(next(asked for asked in self._asked if asked[0] == key))
        self.replies.append((key, reply))
        self.source.reply(key, reply)

    def submit(self, request: Request) -> int:
        key, query = self._asked.popleft()
        ids = [*self.spell(self.write(key, query)), self.tokenizer.end_id]
        self._drawing[len(self.requests)] = ids[: request.max_tokens]
        self.requests.append((key, request))
        self.prompt_tokens += len(request.ids)
        self.prefilled_tokens += len(request.ids) - max(
            (_common(request.ids, seen) for seen in self._seen), default=0
        )
        self._seen.append(np.append(request.ids, self._drawing[len(self.requests) - 1]))
        self.most_open = max(self.most_open, len(self._drawing))
        return len(self.requests) - 1

    def step(self) -> list[Piece]:
        pieces = []
        for number in list(self._drawing)[: self.slots]:
            ids = np.array(self._drawing[number][: self.page], np.int32)
            del self._drawing[number][: self.page]
            finish = None
            if not self._drawing[number]:
                del self._drawing[number]
                finish = "stop" if ids[-1] in self.tokenizer.stop_ids else "length"
            logp = -1 - np.arange(len(ids), dtype=np.float32)
            pieces.append(Piece(number, ids, logp, logp + 9, None, finish))
        return pieces

    def spell(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()


class LetterScript(Script):
    """The same, in a token for each byte, but for control tokens: other ids than the tokenizer's."""

    def spell(self, text: str) -> list[int]:
        byte_ids = {piece: i for i, piece in enumerate(self.tokenizer.pieces) if len(piece) == 1}
        control = self.tokenizer._control
        return [
            spelt
            for i in super().spell(text)
            for spelt in (
                [i] if i in control else [byte_ids[bytes([b])] for b in self.tokenizer.pieces[i]]
            )
        ]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Ids at the beginning that two sequences share."""
    size = min(len(a), len(b))
    return int(np.argmin(np.append(a[:size] == b[:size], False)))


@pytest.fixture(params=["Script", "LetterScript"])
def script(request) -> type[Script]:
    """A scripted model, which spells as the tokenizer does or otherwise."""
    return {"Script": Script, "LetterScript": LetterScript}[request.param]
