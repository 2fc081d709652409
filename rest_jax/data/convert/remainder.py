"""What a record cannot say of the raw item it came from, so that every source has an exact way back.

A source writes an item anew from its records (`rebuild`). Where that differs from the raw item (ids of calls, spaces in a
JSON string, fields nobody trains on), the difference is kept in `StepRecord.extra["raw"]` of the last record: a list of
`[path, value]` (set) and `[path]` (drop), paths being lists of keys and indices. Mostly it is empty or short.
Equality is that of JSON: `true` is not 1, 1 is not 1.0; the order of an object's keys does not count.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rest_jax.data.convert import fields
from rest_jax.data.records import StepRecord

KEY = "raw"

_STYLES: tuple[dict[str, Any], ...] = (
    {"ensure_ascii": False},
    {"ensure_ascii": True},
    {"ensure_ascii": False, "separators": (",", ":")},
    {"ensure_ascii": True, "separators": (",", ":")},
    *({"ensure_ascii": ascii_only, "indent": n} for n in (2, 4) for ascii_only in (False, True)),
)

Rebuild = Callable[[Sequence[StepRecord]], Any]


def keep(
    records: list[StepRecord],
    raw: Any,
    rebuild: Rebuild,
    where: str,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> list[StepRecord]:
    """The records, the last one with `extra` and with what `rebuild` of them lacks of `raw`. RecordError when `raw` nests too
    deeply.
    """
    fields.check_depth(raw, where)
    last = dataclasses.replace(records[-1], extra={**records[-1].extra, **extra})
    edits = difference(rebuild([*records[:-1], last]), raw)
    if edits:
        last = dataclasses.replace(last, extra={**last.extra, KEY: edits})
    return [*records[:-1], last]


def restored(records: Sequence[StepRecord], rebuild: Rebuild) -> Any:
    """The raw item of which `keep` made these records."""
    return apply(rebuild(records), records[-1].extra.get(KEY, []))


def difference(made: Any, raw: Any) -> list[list[Any]]:
    """The edits that turn `made` into `raw`."""
    edits: list[list[Any]] = []
    _differ(made, raw, [], edits)
    return edits


def apply(made: Any, edits: Sequence[Sequence[Any]]) -> Any:
    """`made` with the edits done, on a copy."""
    holder = {"": copy.deepcopy(made)}
    for path, *value in edits:
        node: Any = holder
        *way, last = ["", *path]
        for key in way:
            node = node[key]
        if not value:
            del node[last]
        elif isinstance(node, list) and last == len(node):
            node.append(copy.deepcopy(value[0]))
        else:
            node[last] = copy.deepcopy(value[0])
    return holder[""]


def style_of(value: Any, text: str, usual: int = 0) -> int | None:
    """Which way of writing JSON gives this text, the usual one if it does: an index for `written`. None when no way does."""
    ways = (usual, *range(len(_STYLES)))
    return next((way for way in ways if written(value, way) == text), None)


def written(value: Any, style: int) -> str:
    """JSON text written in one of the ways that data sets have; 0 is Python's with letters as they are, 1 with escapes."""
    return json.dumps(value, **_STYLES[style])


def _differ(made: Any, raw: Any, path: list[Any], edits: list[list[Any]]) -> None:
    if type(made) is not type(raw):
        edits.append([path, raw])
    elif isinstance(raw, dict):
        edits.extend([[*path, key]] for key in made if key not in raw)
        for key, value in raw.items():
            if key in made:
                _differ(made[key], value, [*path, key], edits)
            else:
                edits.append([[*path, key], value])
    elif isinstance(raw, list):
        for i, (old, new) in enumerate(zip(made, raw, strict=False)):
            _differ(old, new, [*path, i], edits)
        edits.extend([[*path, i], raw[i]] for i in range(len(made), len(raw)))
        edits.extend([[*path, i]] for i in reversed(range(len(raw), len(made))))
    elif made != raw:
        edits.append([path, raw])
