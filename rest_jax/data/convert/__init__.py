"""Other people's data as step records: one module a source, `SOURCES` names them.

In: one raw item of a source. Out: its step records. `convert(raw, name, where)` makes ids from `name`; every fault is a
`RecordError` that opens with `where` (file and place) and names the field and the value. What else an item says is the `extra` of
each of its records.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rest_jax.data import fields
from rest_jax.data.convert import openai, rlla, toolace, xlam
from rest_jax.data.records import StepRecord

Convert = Callable[[Any, str, str], list[StepRecord]]


def _with_extra(convert: Convert, read: Sequence[str]) -> Convert:
    """The source with all fields of an item that it does not read as the `extra` of its records."""

    def converted(raw: Any, name: str, where: str) -> list[StepRecord]:
        records = convert(raw, name, where)
        if not (extra := fields.others(fields.item(raw, where), read)):
            return records
        if isinstance(info := extra.get("extra_info"), Mapping):  # rlla's repeats the fields
            extra["extra_info"] = fields.others(info, read)
        return [dataclasses.replace(one, extra={**extra, **one.extra}) for one in records]

    return converted


SOURCES: dict[str, Convert] = {
    "openai": _with_extra(openai.convert, openai.READ),
    "toolace": _with_extra(toolace.convert, toolace.READ),
    "xlam": _with_extra(xlam.convert, xlam.READ),
    "hammer": _with_extra(xlam.convert_hammer, xlam.READ),
    "rlla": _with_extra(rlla.convert, rlla.READ),
    "api_bank": _with_extra(rlla.convert_api_bank, rlla.READ_API_BANK),
}
