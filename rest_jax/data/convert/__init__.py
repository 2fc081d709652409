"""Other people's data as step records: one module a source, `SOURCES` names them.

In: one raw item of a source. Out: its step records. `convert(raw, name, where)` makes ids from `name`; every fault is a
`RecordError` that opens with `where` (file and place) and names the field and the value; one in the place of a record says why
that record is none. `OPENED` are sources that need more than the item: they make their `convert` of the paths of all files.
`READERS` are those whose items are in no file.
"""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rest_jax.data.convert import openai, rlla, sgd, tau2, toolace, xlam
from rest_jax.data.fields import RecordError
from rest_jax.data.items import Item
from rest_jax.data.records import StepRecord

Convert = Callable[[Any, str, str], Sequence[StepRecord | RecordError]]

SOURCES: dict[str, Convert] = {
    "openai": openai.convert,
    "toolace": toolace.convert,
    "xlam": xlam.convert,
    "hammer": xlam.convert_hammer,
    "rlla": rlla.convert,
    "api_bank": rlla.convert_api_bank,
}
OPENED: dict[str, Callable[[Sequence[pathlib.Path]], Convert]] = {
    "sgd": sgd.open_files,
    "tau2": lambda _: tau2.convert,
}
READERS: dict[str, Callable[[pathlib.Path], Iterator[Item]]] = {"tau2": tau2.read_tasks}
