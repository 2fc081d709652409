"""Collects an answer from left to right: spans, blocks, calls. Both parsers write with it.

Every byte belongs to exactly one span, because each `put` continues where the last one ended.
"""

import re
from collections.abc import Callable

import numpy as np

from rest_jax.templates.json_calls import Scan, read_call
from rest_jax.tool_calls import Answer, Block, Call, Region

# Plain integers: they become an int8 array at the end, much faster than enum members would.
TAG, SCAFFOLD, NAME, PARAM = map(int, (Region.TAG, Region.SCAFFOLD, Region.NAME, Region.PARAM))
THINK, RESPONSE, OTHER = map(int, (Region.THINK, Region.RESPONSE, Region.OTHER))

THINK_OPEN, THINK_CLOSE = b"<think>", b"</think>"

Search = Callable[[bytes, int], re.Match[bytes] | None]
_other_than_separator = re.compile(rb"[^\s,;\[\]]").search


class Writer:
    """Collects spans, blocks and calls from left to right."""

    def __init__(self, data: bytes):
        self.data = data
        self.end = 0
        self.ends: list[int] = []
        self.regions: list[int] = []
        self.blocks: list[Block] = []
        self.calls: list[Call] = []
        self.broken_calls = 0
        self.think: str | None = None
        self.responses: list[str] = []

    def put(self, end: int, region: int) -> None:
        """Extends the spans to `end`; equal neighbours become one."""
        if end <= self.end:
            return
        if self.regions and self.regions[-1] == region:
            self.ends[-1] = end
        else:
            self.ends.append(end)
            self.regions.append(region)
        self.end = end

    def text(self, start: int, end: int) -> str:
        return self.data[start:end].decode("utf-8", "replace").strip()

    def loose_text(self, end: int, prose: bool) -> None:
        """Text outside any block, up to `end`: the answer to the user where that is allowed, else a
        fault.
        """
        chunk = self.data[self.end : end]
        body = chunk.strip()
        if body:
            first = self.end + len(chunk) - len(chunk.lstrip())
            self.put(first, SCAFFOLD)
            if prose:
                self.responses.append(body.decode("utf-8", "replace"))
            self.blocks.append(Block.RESPONSE if prose else Block.TEXT)
            self.put(first + len(body), RESPONSE if prose else OTHER)
        self.put(end, SCAFFOLD)

    def call(self, start: int, scan: Scan) -> bool:
        """Writes a sound object. Returns whether it is a readable call, which is then kept."""
        if scan.name is None or scan.arguments is None:
            self.put(scan.end, OTHER)
        else:
            values = sorted([(scan.name, NAME), (scan.arguments, PARAM)])
            for (first, last), region in values:
                self.put(first, SCAFFOLD)
                self.put(last, region)
            self.put(scan.end, SCAFFOLD)
        call = read_call(self.data, start, scan)
        if call is None:
            self.broken_calls += 1
            return False
        self.calls.append(call)
        return True

    def answer(self) -> Answer:
        return Answer(
            calls=tuple(self.calls),
            broken_calls=self.broken_calls,
            response="\n".join(self.responses) if self.responses else None,
            think=self.think,
            blocks=tuple(self.blocks),
            span_ends=np.array(self.ends, np.int64),
            span_regions=np.array(self.regions, np.int8),
        )


def closed_thought(out: Writer, implied_open: bool) -> None:
    """Writes all up to the last closing think tag; `implied_open`: the opening tag may be missing
    (it was in the prompt).
    """
    data = out.data
    close = data.rfind(THINK_CLOSE)
    if close < 0:
        return
    opened = data.find(THINK_OPEN, 0, close)
    if opened >= 0:
        out.loose_text(opened, False)
        out.put(opened + len(THINK_OPEN), TAG)
    elif not implied_open:
        out.loose_text(close, False)
    start = out.end
    out.put(close, THINK)
    out.put(close + len(THINK_CLOSE), TAG)
    if opened < 0 and not implied_open:
        out.blocks.append(Block.BROKEN)
        return
    out.think = out.text(start, close)
    out.blocks.append(Block.THINK)
    if data.find(THINK_CLOSE, start, close) >= 0:
        out.blocks.append(Block.BROKEN)


def open_thought(out: Writer, thought_end: Search) -> None:
    """A thought that is never closed: it lasts until a block evidently begins, or to the end."""
    match = thought_end(out.data, out.end)
    out.put(len(out.data) if match is None else match.start(), THINK)


def separators_end(data: bytes, pos: int) -> int:
    """Where white space, commas, semicolons and square brackets, which may separate calls, end."""
    match = _other_than_separator(data, pos)
    return len(data) if match is None else match.start()
