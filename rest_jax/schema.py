"""YAML files as frozen pydantic records: read, validate, and say every fault at once in words for the user.

Used for configs, for the space of a sweep and for studies. A fault is named by its dotted path; a typo comes with the
nearest known name.
"""

import difflib
import pathlib
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

import pydantic
import yaml

from rest_jax.errors import UserError

Model = TypeVar("Model", bound=pydantic.BaseModel)


def read_mapping(
    path: pathlib.Path, what: str, error: type[UserError] = UserError
) -> dict[str, Any]:
    """The mapping that a YAML file holds; `error`, opening with `what` and the path, when it holds none."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise error(f"{what} {path}: not YAML: {' '.join(str(fault).split())}") from fault
    if not isinstance(raw, dict):
        found = type(raw).__name__
        raise error(f"{what} {path}: a mapping is needed at the top, found {found}")
    return raw


def validate(
    model: type[Model], raw: dict[str, Any], origin: str, error: type[UserError] = UserError
) -> Model:
    """The record of a plain tree; `error` lists every fault, opening with `origin`."""
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as found:
        lines = dict.fromkeys(_explain(item, model) for item in found.errors())
        raise error(f"{origin}: " + "; ".join(lines)) from found


def near(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words, in brackets; all of them when none is near."""
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (nearest: {found[0]})" if found else f" (known: {', '.join(known)})"


def _explain(item: Any, model: type[pydantic.BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key{near(str(item['loc'][-1]), _known(model, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{path}: missing, and there is no default"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" or not path:
        return f"{path}: {message}" if path else message
    return f"{path}: {item['input']!r}: {message}"


def _known(model: type[pydantic.BaseModel], place: tuple[Any, ...]) -> list[str]:
    """The keys of the record at a place below `model`."""
    here: Any = model
    for part in place:
        if typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        else:
            fields = here.model_fields.items()
            (here,) = (f.annotation for name, f in fields if part in (name, f.alias))
        if typing.get_origin(here) in (typing.Union, types.UnionType):  # an optional record
            here = next(kind for kind in typing.get_args(here) if kind is not type(None))
    return [field.alias or name for name, field in here.model_fields.items()]
