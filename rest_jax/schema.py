"""The config explained: the JSON schema that editors read, and the page docs/configuration.md. Both come from `config.py`.

What a key means is the comment of its field there: behind it, or in the lines above it. A comment above holds for the fields
after it, too, as long as they have the same type and no comment of their own.
"""

import ast
import functools
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from rest_jax.config import Config, Section

# A value may refer to another one, which only the merge of all files resolves.
_REFERENCE = {"type": "string", "pattern": r"^\$\{.+\}$"}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_FORMS = {
    "integer": "int", "number": "float", "boolean": "true, false", "string": "text", "object": "mapping",
}  # fmt: skip


def schema() -> dict[str, Any]:
    """JSON schema of a config file. Nothing is required in it, since files are merged; unknown keys are refused."""
    found = Config.model_json_schema()
    for name, kind in _sections():
        shape = found if kind is Config else found["$defs"][name]
        shape.pop("required", None)
        shape["properties"] = {
            key: _described(value, descriptions(kind)[key])
            for key, value in shape["properties"].items()
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _described(shape: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The shape of a key with its meaning; `${...}` is allowed too."""
    if "$ref" in shape:
        return {"$ref": shape["$ref"]}  # a section: its docstring says what it is
    shape = {name: value for name, value in shape.items() if name != "title"}
    beside = {name: shape.pop(name) for name in ("default",) if name in shape}
    if shape.get("type") != "string" or "enum" in shape:
        shape = {"anyOf": [*shape.get("anyOf", [shape]), _REFERENCE]}
    return {"description": text, **beside, **shape}


def reference() -> str:
    """docs/configuration.md: every key with its values, its default and its meaning."""
    found = Config.model_json_schema()
    lines = [_HEAD, *_table("", Config, found)]
    for name, kind in _sections():
        if kind is not Config:
            section = next(k for k, f in Config.model_fields.items() if f.annotation is kind)
            says = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
            lines += [
                f"\n## {section}\n",
                f"{says}\n",
                *_table(f"{section}.", kind, found["$defs"][name]),
            ]
    return "\n".join(lines) + "\n"


def _table(prefix: str, kind: type[Section], shape: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | values | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, value in shape["properties"].items():
        if "$ref" not in value:
            cells = (
                f"`{prefix}{key}`",
                _values(value),
                f"`{_value(value['default'])}`" if "default" in value else _made(prefix + key),
                descriptions(kind)[key],
            )
            yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _made(key: str) -> str:
    """The default of a key without one of its own: `config.load` names a run."""
    return "the names of its files" if key == "name" else "none: give one"


def _values(shape: Mapping[str, Any]) -> str:
    """What a key may be, in words."""
    if "anyOf" in shape:
        return " or ".join(_values(each) for each in shape["anyOf"])
    if shape.get("type") == "null":
        return "`null`"
    if "prefixItems" in shape:
        return f"list of {', '.join(map(_values, shape['prefixItems']))}"
    if shape.get("type") == "array":
        return f"list of {_values(shape['items'])}"
    allowed = shape.get("enum", [shape["const"]] if "const" in shape else [])
    if allowed:
        return ", ".join(f"`{_value(each)}`" for each in allowed)
    limits = [f"{sign} {shape[name]}" for name, sign in _LIMITS.items() if name in shape]
    return " ".join([_FORMS[shape["type"]], *limits])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sections() -> Iterator[tuple[str, type[Section]]]:
    """Config, then the sections in its order, by the names of their classes."""
    yield "Config", Config
    for field in Config.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield field.annotation.__name__, field.annotation


@functools.cache
def descriptions(kind: type[pydantic.BaseModel]) -> dict[str, str]:
    """Key -> what its comments in the source say. ValueError for a field without one, sections apart."""
    source = textwrap.dedent(inspect.getsource(kind))
    comments = {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found, shared = {}, (None, "")
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        beside = [
            comments[n][0] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in comments
        ]
        above, line = [], node.lineno - 1
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        form, text = ast.dump(node.annotation), " ".join([*above, *beside])
        if above:
            shared = form, text
        elif beside or shared[0] != form:
            shared = None, ""
        found[node.target.id] = text or shared[1]
    missing = [
        key
        for key, field in kind.model_fields.items()
        if not found.get(key) and field.annotation not in Section.__subclasses__()
    ]
    if missing:
        raise ValueError(f"{kind.__name__}: no comment says what is {', '.join(missing)}")
    return found


_HEAD = """# Configuration

Every key of a config. The page is made from `rest_jax/config.py` by `python tools/make_configuration.py`.

A file holds sections and keys (`rollout:`, below it `group_size: 8`), a word of the command line one of them
(`rollout.group_size=8`). [Commands](commands.md#configs) says how files and words are merged; `rest-jax config show FILES`
prints what came of it, with the origin of each value. `null` is no value, and so is None in a meaning; `${...}` refers to
another key.

Editors know the keys, their values and their meaning from the schema (VS Code with the extension YAML):

```
rest-jax schema --output rest.schema.json
```

and, as the first line of a config, `# yaml-language-server: $schema=rest.schema.json`, relative to the file.

## The run
"""
