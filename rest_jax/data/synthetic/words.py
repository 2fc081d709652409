"""The words of the synthetic tool world: actions, objects, parameters with their values, masked names.

A tool is an (action, object) pair. `split_of` decides by a hash of the pair alone whether it is a training or a held-out tool:
no seed enters, so a held-out pair never occurs in any training set, while every single word occurs in both, and so do names.
"""

import dataclasses
import functools
import hashlib
import json
import random
from typing import Any, Literal

Split = Literal["train", "eval"]

ACTIONS = (
    *("book", "cancel", "find", "check", "update", "rate", "share", "print", "order", "send"),
    *("track", "open", "close", "copy", "move", "sell", "rent", "list", "repair", "review"),
)
OBJECTS = (
    *("hotel", "flight", "ticket", "parcel", "photo", "report", "song", "movie", "car", "bike"),
    *("table", "meeting", "course", "recipe", "map", "phone", "house", "room", "cup", "letter"),
    *("lamp", "door", "garden", "boat", "game", "menu", "train", "bag", "chair", "rope"),
)
HELD_OUT_FRACTION = 0.2

STRINGS = {
    "city": ("paris", "rome", "oslo", "cairo", "lima", "delhi", "tokyo", "dublin"),
    "color": ("red", "blue", "green", "black", "white", "pink"),
    "owner": ("anna", "ben", "carl", "dora", "emma", "felix", "gina", "hugo"),
    "day": ("monday", "tuesday", "friday", "sunday", "today"),
    "size": ("small", "medium", "large", "huge"),
}
INTEGERS = ("count", "page", "level", "nights", "guests")
NUMBERS = ("price", "weight", "score")
BOOLEANS = ("express", "public", "insured", "urgent")
LISTS = {"tags": ("new", "old", "hot", "cold", "fresh", "rare")}
CODE = "code"  # a string no list holds: it has to be copied

PARAMETER_TYPES: dict[str, str] = {
    **dict.fromkeys(STRINGS, "string"),
    **dict.fromkeys(INTEGERS, "integer"),
    **dict.fromkeys(NUMBERS, "number"),
    **dict.fromkeys(BOOLEANS, "boolean"),
    **dict.fromkeys(LISTS, "array"),
    CODE: "string",
}
# how often a parameter is of each word: types matter more than words, lists are rare
_WEIGHTS = {"string": 1.0, "integer": 1.0, "number": 1.0, "boolean": 1.0, "array": 0.3}

# masked names are made of these: pronounceable, and few enough to be single words of a small BPE
_SYLLABLES = """
bal bem bik bof bur dak del dim dov dun fap fek fil fom fuz gat gev gim gol gur kab ked kiv kol kum
laz lek lim lop luv mab meg mik mov muz nal nep nid nof nur pab pel piv pom puz rak rel rik rof rum
sab sek sil sov suz tal tev tim tof tuz vak vel vim vop vur zab zed zik zol zum
"""
SYLLABLES = tuple(_SYLLABLES.split())


@dataclasses.dataclass(frozen=True)
class Tool:
    """An (action, object) pair under a masked name; `parameters` maps a word to its masked name, in order."""

    action: str
    thing: str
    name: str
    parameters: dict[str, str]

    @property
    def does(self) -> str:
        return f"{self.action} {self.thing}"

    @property
    def signature(self) -> str:
        return ", ".join(f"{m}: {PARAMETER_TYPES[word]}" for word, m in self.parameters.items())

    def schema(self) -> dict[str, Any]:
        """The tool as a prompt shows it (flat form)."""
        parameters = {
            mask: {"description": word, "type": PARAMETER_TYPES[word]}
            for word, mask in self.parameters.items()
        }
        return {"name": self.name, "description": self.does, "parameters": parameters}


@functools.cache
def split_of(action: str, thing: str) -> Split:
    """Whether a tool is a training or a held-out one; depends on nothing but the pair."""
    digest = hashlib.sha256(f"{action} {thing}".encode()).digest()
    return "eval" if digest[0] < 256 * HELD_OUT_FRACTION else "train"


@functools.cache
def pairs(split: Split) -> tuple[tuple[str, str], ...]:
    """All (action, object) pairs of a split, in a fixed order."""
    return tuple((a, o) for a in ACTIONS for o in OBJECTS if split_of(a, o) == split)


def words(rng: random.Random, count: int) -> list[str]:
    """`count` different parameter words."""
    pool = list(PARAMETER_TYPES)
    share = {kind: sum(k == kind for k in PARAMETER_TYPES.values()) for kind in _WEIGHTS}
    weights = [_WEIGHTS[PARAMETER_TYPES[w]] / share[PARAMETER_TYPES[w]] for w in pool]
    chosen: list[str] = []
    while len(chosen) < count:
        word = rng.choices(pool, weights)[0]
        if word not in chosen:
            chosen.append(word)
    return chosen


def value(rng: random.Random, word: str) -> tuple[Any, str]:
    """A JSON value for a parameter word and the way a request says it (texts in quotes, truth as yes or no)."""
    kind = PARAMETER_TYPES[word]
    if word == CODE:
        code = rng.choice(SYLLABLES) + str(rng.randrange(10, 100))
        return code, json.dumps(code)
    if kind == "string":
        text = rng.choice(STRINGS[word])
        return text, json.dumps(text)
    if kind == "integer":
        number = rng.randrange(1, 100)
        return number, str(number)
    if kind == "number":
        number = rng.randrange(1, 50) + rng.choice((0.25, 0.5, 0.75))
        return number, str(number)
    if kind == "boolean":
        yes = rng.random() < 0.5
        return yes, "yes" if yes else "no"
    items = rng.sample(LISTS[word], 2)
    return items, json.dumps(items)
