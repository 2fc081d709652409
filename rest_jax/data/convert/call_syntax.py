"""Calls written as in ToolACE and BFCL, `[Name(a=1), other(b="x")]`: text in, calls out.

Names may hold spaces and punctuation, even brackets: a name ends at the first parenthesis after which a keyword or the closing
parenthesis stands. Values are Python or JSON literals (True and true, None and null), nested to a depth of 32. Nothing is ever
evaluated; reading only moves forward, so time is linear. Faults are `SyntaxFault`s with the character in the text.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 32
MAX_DIGITS = 1000  # of one integer

_space = re.compile(r"\s*+").match
_ARGUMENTS_OPEN = re.compile(r"\(\s*+(?:\)|[^=(),'\"]++=(?!=))")
_arguments_open_anywhere = _ARGUMENTS_OPEN.search
_key = re.compile(r"([^=(),'\"]++)=\s*+").match
_string = re.compile(
    r"'(?P<single>[^'\\]*+(?:\\.[^'\\]*+)*+)'|\"(?P<double>[^\"\\]*+(?:\\.[^\"\\]*+)*+)\"",
    re.DOTALL,
).match
_number = re.compile(
    r"[-+]?+(?:(?:0|[1-9]\d*+)(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d++)?+(?!\w)"
).match
_word = re.compile(r"[A-Za-z]\w*+").match
_escape = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_PLAIN = "\\'\"/"


class SyntaxFault(ValueError):
    """Text that is no list of calls; says what is wrong and at which character."""


def looks_like_calls(text: str) -> bool:
    """Whether a text is meant as a list of calls: it is bracketed, its last item (a comma may follow) ends as a call does, and
    somewhere in it a call's arguments open.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return False
    last = text[:-1].rstrip().removesuffix(",").rstrip()
    return last.endswith(")") and _arguments_open_anywhere(text) is not None


def mentions_call(text: str, names: Iterable[str]) -> str | None:
    """The first of the names that the text follows with an opening parenthesis, None if there is none: `f(` as such, behind
    spaces only where arguments open as in a call ("the search (see below)" is prose).
    """
    said = [re.escape(name) for name in names if name and name in text] if "(" in text else []
    if not said:
        return None
    longest_first = "|".join(sorted(said, key=len, reverse=True))
    opened = rf"(?<!\w)({longest_first})(?:\(|\s++{_ARGUMENTS_OPEN.pattern})"
    found = re.search(opened, text)
    return None if found is None else found[1]


def parse(text: str) -> list[dict[str, Any]]:
    """The calls, {"name", "arguments"}, of a bracketed list. SyntaxFault for anything else."""
    reader = _Reader(text)
    reader.expect("[")
    calls: list[dict[str, Any]] = []
    while not reader.take("]"):
        calls.append(reader.call())
        reader.separate("]")
    if reader.at < len(text):
        raise reader.fault("text after the end")
    return calls


class _Reader:
    """A position in a text that moves forward only."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.skip()

    def skip(self) -> None:
        space = _space(self.text, self.at)
        assert space is not None  # it may be empty
        self.at = space.end()

    def take(self, mark: str) -> bool:
        found = self.text.startswith(mark, self.at)
        if found:
            self.at += len(mark)
            self.skip()
        return found

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise self.fault(f"{mark!r} is needed")

    def separate(self, close: str) -> bool:
        """Takes a comma; without one the closing mark must follow."""
        comma = self.take(",")
        if not comma and not self.text.startswith(close, self.at):
            raise self.fault(f"',' or {close!r} is needed")
        return comma

    def fault(self, what: str) -> SyntaxFault:
        found = repr(self.text[self.at : self.at + 20]) if self.at < len(self.text) else "the end"
        return SyntaxFault(f"character {self.at}: {what}, found {found}")

    def call(self) -> dict[str, Any]:
        opened = _arguments_open_anywhere(self.text, self.at)
        if opened is None:
            raise self.fault("a call is needed, Name(keyword=value)")
        name = self.text[self.at : opened.start()].strip()
        if not name:
            raise self.fault("a name is needed")
        self.at = opened.start()
        self.expect("(")
        arguments: dict[str, Any] = {}
        while not self.take(")"):
            key = _key(self.text, self.at)
            if key is None or not key[1].strip():
                raise self.fault("a keyword and '=' are needed")
            if (word := key[1].strip()) in arguments:
                raise self.fault(f"the keyword {word!r} comes twice")
            self.at = key.end()
            arguments[word] = self.value(1)
            self.separate(")")
        return {"name": name, "arguments": arguments}

    def value(self, depth: int) -> Any:
        """One literal and the space after it."""
        if depth > MAX_DEPTH:
            raise self.fault(f"nested deeper than {MAX_DEPTH}")
        if self.take("["):
            return self._items("]", depth)[0]
        if self.take("("):
            items, commas = self._items(")", depth)
            return items[0] if len(items) == 1 and not commas else items
        if self.take("{"):
            return self._members(depth)
        if (found := _string(self.text, self.at)) is not None:
            self._pass(found)
            body = found["single"] if found["single"] is not None else found["double"]
            return _unescaped(body)
        if (found := _number(self.text, self.at)) is not None:
            return self._number(found)
        word = _word(self.text, self.at)
        if word is None or word[0] not in _WORDS:
            raise self.fault(
                "a value is needed (a string in quotes, a number, a list, a dict, True, False, None)"
            )
        self._pass(word)
        return _WORDS[word[0]]

    def _pass(self, found: re.Match[str]) -> None:
        self.at = found.end()
        self.skip()

    def _items(self, close: str, depth: int) -> tuple[list[Any], int]:
        """(values up to the closing mark, number of commas)."""
        items, commas = [], 0
        while not self.take(close):
            items.append(self.value(depth + 1))
            commas += self.separate(close)
        return items, commas

    def _members(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while not self.take("}"):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self.fault("a key that is a string is needed")
            if key in members:
                raise self.fault(f"the key {key!r} comes twice")
            self.expect(":")
            members[key] = self.value(depth + 1)
            self.separate("}")
        return members

    def _number(self, found: re.Match[str]) -> int | float:
        if not set(found[0]) & set(".eE"):
            if len(found[0]) > MAX_DIGITS:
                raise self.fault(f"an integer of more than {MAX_DIGITS} digits")
            value: int | float = int(found[0])
        else:
            value = float(found[0])
            if not math.isfinite(value):
                raise self.fault("a finite number is needed")
        self._pass(found)
        return value


def _unescaped(body: str) -> str:
    if "\\" not in body:
        return body
    text = _escape.sub(_character, body)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _character(found: re.Match[str]) -> str:
    *codes, octal, letter = found.groups()
    for digits in codes:
        if digits is not None:
            code = int(digits, 16)
            return chr(code) if code <= 0x10FFFF else "�"
    if octal is not None:
        return chr(int(octal, 8))
    return letter if letter in _PLAIN else _LETTERS.get(letter, f"\\{letter}")
