"""Config files as plain trees: YAML in, one merged tree out. No schema in here; `config.validate` judges the result.

    base: NAME_OR_PATH     the tree of another file under this one's; its `name` and `warm_start` are not taken over, nor
                           its `trainer` where it stands in for the base that the file asks for
    supervised: {...}      what differs under `trainer: sft`; dropped otherwise
    warm_start: NAME       replaced by the tree of that supervised recipe, on the same base

Later wins: base, the base's `supervised`, the file, the file's `supervised`, overrides. Every fault is a ConfigError.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import yaml

from rest_jax import builtin, schema
from rest_jax.errors import UserError

Tree = dict[str, Any]
Trainer = Literal["rl", "sft"]

# The sections of a user's overrides that the warm start follows. Not the seed: one start serves many seeds.
SHARED_WITH_WARM_START = ("output", "model", "data", "mesh", "sft")
_OWN_KEYS = ("name", "warm_start")  # of a file alone, never of what is built on it


class ConfigError(UserError):
    """A config that cannot be used; the text names each place, value and remedy."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One file as it stands, with the base it asks for."""

    path: pathlib.Path
    tree: Tree
    base: str | None

    @property
    def name(self) -> str:
        return str(self.tree.get("name", self.path.stem))


def read(
    path: pathlib.Path,
    overrides: Sequence[str] = (),
    base: str | None = None,
    trainer: Trainer | None = None,
) -> Tree:
    """The tree of a file on its base, or on `base` instead, with `a.b=value` overrides (YAML values) on top.

    The name is the file's own, by default its stem; on another base than its own, that base's name is appended, so that
    the runs of one method on two scales have two folders. `trainer` replaces the file's; supervised, its warm start is left
    out, unless an override asks for one.
    """
    chain = _chain(path, base)
    keys: Tree = {} if trainer is None else {"trainer": trainer}
    for override in overrides:
        if override.partition("=")[0] in ("trainer", "warm_start"):
            apply(keys, override)
    if trainer == "sft":
        keys.setdefault("warm_start", None)
    tree = _merged(chain, keys, replaced=base is not None and _is_another_base(chain))
    tree["name"] = chain[0].name if "name" not in tree else tree["name"]
    if base is not None and _is_another_base(chain):
        tree["name"] = f"{tree['name']}-{chain[1].name}"
    if isinstance(tree.get("warm_start"), str):
        below = chain[1].path if len(chain) > 1 else path
        tree["warm_start"] = _warm_start(tree["warm_start"], chain[0], below, overrides)
    for override in overrides:
        if override.partition("=")[0] not in ("trainer", "warm_start"):
            apply(tree, override)
    return tree


def merge(under: Tree, over: Tree) -> Tree:
    """A new tree: mappings are merged key by key, everything else of `over` replaces what is under it."""
    merged = dict(under)
    for key, value in over.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            value = merge(known, value)
        merged[key] = value
    return merged


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value in `a`, value in `b`) of the leaves in which two plain trees differ, in order of their keys."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b


def apply(tree: Tree, override: str) -> None:
    """Sets the value of one `a.b=value` override, in place."""
    key, sep, value = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error


def _chain(path: pathlib.Path, base: str | None) -> list[Layer]:
    """The file, its base, the base's base and so on."""
    layers = [_read_layer(path)]
    below = layers[0].base if base is None else base
    while below is not None:
        asked = layers[-1].path.parent if base is None or len(layers) > 1 else pathlib.Path()
        found = _find(below, asked)
        words = " -> ".join([*(str(layer.path) for layer in layers), str(found or below)])
        if found is None:
            shipped_ones = ", ".join(builtin.names())
            raise ConfigError(
                f"config {path}: base {below!r} ({words}): no such file in {asked.absolute()}, "
                f"nor a shipped one ({shipped_ones})"
            )
        if any(found.samefile(layer.path) for layer in layers):
            raise ConfigError(f"config {path}: its bases go in a circle: {words}")
        layers.append(_read_layer(found))
        below = layers[-1].base
    return layers


def _find(name: str, folder: pathlib.Path) -> pathlib.Path | None:
    for candidate in (folder / name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    return builtin.shipped_config(name)


def _read_layer(path: pathlib.Path) -> Layer:
    if not path.is_file():
        raise ConfigError(f"config {path}: no such file")
    tree = schema.read_mapping(path, "config", ConfigError)
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"config {path}: base: {base!r}: the name or path of a config is needed")
    if not isinstance(tree.get("supervised", {}), dict):
        raise ConfigError(f"config {path}: supervised: a mapping of sections is needed")
    return Layer(path, tree, base)


def _merged(chain: Sequence[Layer], keys: Tree, replaced: bool) -> Tree:
    """All layers in one, `keys` on top. `replaced`: the base is not the file's own, so it may be of another method."""
    asked = chain[:1] if replaced else chain
    trainers = [tree["trainer"] for tree in (keys, *(c.tree for c in asked)) if "trainer" in tree]
    supervised = trainers[:1] == ["sft"]
    merged: Tree = {}
    own_keys = (*_OWN_KEYS, "trainer") if replaced else _OWN_KEYS
    for layer in reversed(chain):
        own = dict(layer.tree)
        differing = own.pop("supervised", {})
        merged = {key: value for key, value in merged.items() if key not in own_keys}
        merged = merge(merge(merged, own), differing if supervised else {})
    return merge(merged, keys)


def _is_another_base(chain: Sequence[Layer]) -> bool:
    """Whether the base in the chain is not the one that the file itself asks for."""
    own = chain[0].base
    usual = None if own is None else _find(own, chain[0].path.parent)
    return usual is None or not usual.samefile(chain[1].path)


def _warm_start(name: str, asking: Layer, below: pathlib.Path, overrides: Sequence[str]) -> Tree:
    """The tree of the supervised recipe `name` on the base of the file that asks for it."""
    path = _find(name, asking.path.parent)
    if path is None:
        raise ConfigError(
            f"config {asking.path}: warm_start {name!r}: no such file in {asking.path.parent.absolute()}, "
            f"nor a shipped one ({', '.join(builtin.names())})"
        )
    recipe = _read_layer(path)
    if recipe.tree.get("trainer") != "sft" or "warm_start" in recipe.tree:
        raise ConfigError(
            f"config {asking.path}: warm_start {name!r}: {path} is not a supervised recipe without a start of its own "
            "(it needs `trainer: sft`, and no `warm_start`)"
        )
    shared = [word for word in overrides if _section(word) in SHARED_WITH_WARM_START]
    return read(path, shared, base=str(below.absolute()))


def _section(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]
