"""Other people's data as step records: one module a source, `SOURCES` names them.

In: one raw item of a source. Out: its step records. `convert(raw, name, where)` makes ids from `name`; every fault is a
`RecordError` that opens with `where` (file and place) and names the field and the value; one in the place of a record says why
that record is none. What else an item says is the `extra` of each of its records. `OPENED` are sources that need more than the
item: they make their `convert` of the paths of all files. `READERS` are those whose items are in no file.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from rest_jax.data import fields
from rest_jax.data.convert import openai, rlla, sgd, tau2, toolace, xlam
from rest_jax.data.fields import RecordError
from rest_jax.data.items import Item
from rest_jax.data.records import StepRecord

Convert = Callable[[Any, str, str], Sequence[StepRecord | RecordError]]


def _with_extra(convert: Convert, read: Sequence[str]) -> Convert:
    """The source with all fields of an item that it does not read as the `extra` of its records."""

    def converted(raw: Any, name: str, where: str) -> Sequence[StepRecord | RecordError]:
        records = convert(raw, name, where)
        if not (extra := fields.others(fields.item(raw, where), read)):
            return records
        if isinstance(info := extra.get("extra_info"), Mapping):  # rlla's repeats the fields
            extra["extra_info"] = fields.others(info, read)
        return [
            one
            if isinstance(one, RecordError)
            else dataclasses.replace(one, extra={**extra, **one.extra})
            for one in records
        ]

    return converted


SOURCES: dict[str, Convert] = {
    "openai": _with_extra(openai.convert, openai.READ),
    "toolace": _with_extra(toolace.convert, toolace.READ),
    "xlam": _with_extra(xlam.convert, xlam.READ),
    "hammer": _with_extra(xlam.convert_hammer, xlam.READ),
    "rlla": _with_extra(rlla.convert, rlla.READ),
    "api_bank": _with_extra(rlla.convert_api_bank, rlla.READ_API_BANK),
}
OPENED: dict[str, Callable[[Sequence[epath.Path]], Convert]] = {
    "sgd": sgd.open_files,
    "tau2": lambda _: tau2.convert,
}
READERS: dict[str, Callable[[epath.Path], Iterator[Item]]] = {"tau2": tau2.read_tasks}
