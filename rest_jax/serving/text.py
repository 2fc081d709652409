"""Drawn tokens as text: what of a completion can be told already, and what it is.

A `Completion` takes the pieces of the stream (`add`) and tells its new part (`read`): the tokens, and the text of which no later
token takes anything back. It ends before a stop string, of which no beginning is told either; characters are told whole. A
`Turn` reads an assistant's turn by the parser of a template, as rewards do: its thought, its text and its calls, which are told
once their block is closed. What the parser cannot read is text. No jax in here.
"""

import codecs
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.requests import Piece
from rest_jax.templates import TAGS, Template
from rest_jax.templates.parser import (
    CALL_CLOSE,
    CALL_OPEN,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
)
from rest_jax.tool_calls import Answer, Call, Region

_BEGINNINGS = frozenset(tag.encode()[:n] for tag in TAGS for n in range(1, len(tag)))
_tag = re.compile("|".join(map(re.escape, sorted(TAGS))).encode()).search
_LONGEST = max(map(len, _BEGINNINGS))
# Where a bare call may begin, in text behind which another token may come.
_bare_call = re.compile(rb"\{|(?:\A|\n)[ \t]*;?[ \t]*\[").search
# What a thought that is not closed may end with and be over: a block is evident once its JSON begins.
_begins_block = re.compile(
    rb'(?:<tool_call>|<response>)\s*\Z|\n[ \t]*\{[ \t\r\n]*(?:"(?:n(?:a(?:me?)?)?)?)?\Z'
).search


@dataclasses.dataclass(frozen=True)
class Token:
    """A drawn token."""

    id: int
    data: bytes
    logp: float
    top: tuple[tuple[bytes, float], ...]  # the most probable tokens and their log-probs
    offset: int  # characters of the text before it


@dataclasses.dataclass(frozen=True)
class Delta:
    """A part of a completion, or all of it."""

    tokens: Sequence[Token] = ()
    thought: str = ""
    text: str = ""
    calls: Sequence[Call] = ()
    first_call: int = 0  # number of the first of the calls
    finish: str | None = None  # stop, length, tool_calls; None: more comes


class Reading(Protocol):
    """How bytes are read."""

    def read(self, data: bytes, end: int, final: bool) -> Delta:
        """What is new up to `end`; more comes unless `final`."""
        ...


@dataclasses.dataclass
class Completion:
    """One completion as it is drawn. `opening`: how the answer begins in the prompt already (a call that is required)."""

    tokenizer: Tokenizer
    reading: Reading
    stops: Sequence[bytes] = ()
    opening: bytes = b""
    finish: str | None = None

    def __post_init__(self):
        self._data = bytearray(self.opening)
        self._tokens: list[Token] = []  # not told yet
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self.drawn = 0

    def add(self, piece: Piece) -> None:
        """Takes what was drawn, up to the token that completes a stop string: then `finish` is set before the stream's own."""
        pieces = self.tokenizer.pieces
        ids, logp = piece.ids.tolist(), piece.logp.tolist()
        top = [()] * len(ids) if piece.top is None else _alternatives(*piece.top, pieces)
        for i, (token, p, others) in enumerate(zip(ids, logp, top, strict=True)):
            self._tokens.append(Token(token, pieces[token], p, others, self._offset))
            self.drawn += 1
            if piece.finish == "stop" and i == len(ids) - 1:
                break  # the end of the turn is no text
            before = len(self._data)
            self._data += pieces[token]
            self._offset += len(self._characters.decode(pieces[token]))
            if (stop := self._stop(before)) is not None:
                del self._data[stop:]
                self.finish = "stop"
                return
        self.finish = piece.finish

    def read(self) -> Delta:
        """What is certain and has not been told."""
        told = self.reading.read(bytes(self._data), self._certain(), self.finish is not None)
        tokens, self._tokens = self._tokens, []
        finish = self.finish
        if finish == "stop" and told.first_call + len(told.calls):
            finish = "tool_calls"
        return dataclasses.replace(told, tokens=tokens, finish=finish)

    def _stop(self, before: int) -> int | None:
        """Where the first stop string begins that the bytes from `before` on complete."""
        found = []
        for stop in self.stops:
            at = self._data.find(stop, max(len(self.opening), before - len(stop) + 1))
            if at >= 0:
                found.append(at)
        return min(found, default=None)

    def _certain(self) -> int:
        """The bytes that are neither the beginning of a stop string nor of a character."""
        end = len(self._data)
        if self.finish is not None:
            return end
        most = end - len(self.opening)
        end -= max(
            (
                n
                for stop in self.stops
                for n in range(1, min(len(stop), most + 1))
                if self._data.endswith(stop[:n])
            ),
            default=0,
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(self._data[max(0, end - 4) : end])
        return end - len(decoder.getstate()[0])


def _alternatives(
    ids: np.ndarray, logp: np.ndarray, pieces: Sequence[bytes]
) -> list[tuple[tuple[bytes, float], ...]]:
    return [
        tuple((pieces[i], p) for i, p in zip(*row, strict=True))
        for row in zip(ids.tolist(), logp.tolist(), strict=True)
    ]


@dataclasses.dataclass
class Plain:
    """All bytes are text."""

    told: int = 0

    def read(self, data: bytes, end: int, final: bool) -> Delta:
        """The new text."""
        text = data[self.told : end].decode("utf-8", "replace")
        self.told = max(self.told, end)
        return Delta(text=text)


_THOUGHT, _TEXT, _CALL, _MARKUP = "thought", "text", "call", "markup"
_ROLES = {
    Region.THINK: _THOUGHT,
    Region.RESPONSE: _TEXT,
    Region.OTHER: _TEXT,
    Region.NAME: _CALL,
    Region.PARAM: _CALL,
    Region.SCAFFOLD: _MARKUP,
    Region.TAG: _MARKUP,
}
_OF_A_CALL = (Region.NAME, Region.PARAM, Region.SCAFFOLD)


@dataclasses.dataclass
class Turn:
    """An assistant's turn in a template. `calls`: how many of its calls are told, None for all; 0: nobody has offered a tool, and
    calls are text.
    """

    template: Template
    calls: int | None
    told: int = 0  # bytes that are behind us
    told_calls: int = 0

    def __post_init__(self):
        self._said = {_THOUGHT: False, _TEXT: False}

    def read(self, data: bytes, end: int, final: bool) -> Delta:
        """The new thought, text and calls. Thoughts are told while they are written, text once it begins no tag and no call."""
        data = data[:end]
        # what is so whatever comes next is so when a letter comes
        answer = self.template.parse(data if final else data + b"x")
        spans = self._spans(answer, end)
        in_thought = not final and self._in_thought(data)
        limit = end if final else self._limit(data, spans, in_thought)
        new = {_THOUGHT: "", _TEXT: ""}
        for start, stop, role in spans:
            if role in new and start < limit and stop > self.told:
                ended = final or stop < limit
                new[role] += self._new(data, start, min(stop, limit), role, ended)
                if not ended:
                    break
        else:
            self.told = max(self.told, limit)
        first, calls = self.told_calls, ()
        if not in_thought:
            calls = answer.calls[first : self.calls]
            self.told_calls += len(calls)
        return Delta(thought=new[_THOUGHT], text=new[_TEXT], calls=calls, first_call=first)

    def _new(self, data: bytes, start: int, stop: int, role: str, ended: bool) -> str:
        """What of the span from `start` on is new up to `stop`, without the space around it: space at a loose end waits."""
        first = max(start, self.told)
        piece = data[first:stop].rstrip()
        self.told = stop if ended else first + len(piece)
        if first > start:
            return piece.decode("utf-8", "replace")
        piece = piece.lstrip()
        joint = "\n" if piece and self._said[role] else ""
        self._said[role] |= bool(piece)
        return joint + piece.decode("utf-8", "replace")

    def _spans(self, answer: Answer, end: int) -> list[tuple[int, int, str]]:
        """(start, stop, role) of the parts of the first `end` bytes, neighbours of one role as one. What is no call though it has
        the form of one is text.
        """
        unread = list(itertools.chain.from_iterable(answer.unread))
        ends = sorted({0, *(min(cut, end) for cut in (*answer.span_ends.tolist(), *unread))})
        within, inside = (
            np.searchsorted(cuts, ends[:-1], side="right") for cuts in (answer.span_ends, unread)
        )
        regions = [Region(r) for r in answer.span_regions[within].tolist()]
        roles = [
            _TEXT if odd else _ROLES[region]
            for region, odd in zip(regions, (inside % 2).tolist(), strict=True)
        ]
        if self.calls == 0:  # then the text of a call is text, tags apart
            for is_call, run in itertools.groupby(
                range(len(regions)), lambda i: regions[i] in _OF_A_CALL
            ):
                members = list(run)
                if is_call and any(regions[i] == Region.NAME for i in members):
                    roles[members[0] : members[-1] + 1] = [_TEXT] * len(members)
        return [
            (ends[members[0]], ends[members[-1] + 1], role)
            for role, members in (
                (role, list(run))
                for role, run in itertools.groupby(range(len(roles)), key=roles.__getitem__)
            )
        ]

    def _in_thought(self, data: bytes) -> bool:
        opened = self.template.thought_open or data.lstrip().startswith(THINK_OPEN)
        return opened and THINK_CLOSE not in data

    def _limit(self, data: bytes, spans: list[tuple[int, int, str]], in_thought: bool) -> int:
        """Up to where nothing will be read in another way, but for answers with a second end of the thought."""
        limit = len(data) - next(
            (n for n in range(min(_LONGEST, len(data)), 0, -1) if data[-n:] in _BEGINNINGS), 0
        )
        if in_thought:
            end = next((stop for _, stop, role in spans if role == _THOUGHT), 0)
            block = _begins_block(data[:end])
            return min(limit, end if block is None else block.start())
        if self.calls == 0:
            return limit
        if self.template.bare:
            last = max((stop for _, stop, role in spans if role == _CALL), default=0)
            for start, stop, role in spans:
                if role == _TEXT and start >= last and (call := _bare_call(data[start:stop])):
                    return min(limit, start + call.start())
            return limit
        behind = max(0, data.rfind(THINK_CLOSE))
        opened = data.rfind(CALL_OPEN, behind)
        if opened >= 0 and data.find(CALL_CLOSE, opened) < 0:
            limit = min(limit, opened)
        # a tag in a response is text once the response is closed
        opened = data.find(RESPONSE_OPEN, max(behind, data.rfind(RESPONSE_CLOSE)))
        if opened >= 0 and (tag := _tag(data, opened + 1)) and tag[0] != RESPONSE_CLOSE:
            limit = min(limit, tag.start())
        return limit
