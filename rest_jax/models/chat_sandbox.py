"""Limits of time and size on chat templates, which are programs that come with a model.

jinja2's sandbox keeps a template away from the interpreter, but lets it run for ever and fill the memory. `rendering()` is the
block in which the environment that transformers compiles templates with (`install`) raises TemplateLimitError: loops, calls,
filters, tests, comparisons and what a filter yields look at the processor time of the thread. No single step may be long, since
none can be stopped: what makes a large text or number of small ones is measured beforehand, what is slow gets short texts only.
Lists and objects are measured where they are made, as the text that they would be: one that holds another twice, and that in
another twice, would grow without end.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import wraps
from types import GeneratorType
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 2.0  # of processor time, for one chat
MAX_CHARACTERS = 2**24  # of a chat, and of every text on the way
_MAX_NUMBER = 2**20  # of a width, a count or the bits of a number
# letters or entries for a filter that is written in Python, or takes the square of the time
_MAX_SLOW = 10**5
_MAX_COMPARED = 2**30  # letters of a text times those looked for at each of them
# Filters that take a few nanoseconds a letter, or whose entries are watched one by one.
# fmt: off
_QUICK = frozenset((
    "attr", "count", "d", "default", "e", "escape", "first", "forceescape", "format", "indent", "items", "join", "last",
    "length", "list", "lower", "map", "reject", "rejectattr", "replace", "reverse", "safe", "select", "selectattr", "string",
    "tojson", "trim", "upper",
))
# fmt: on
_BACKWARDS = frozenset(
    ("strip", "lstrip", "rstrip", "trim", "rfind", "rindex", "rpartition", "rsplit")
)
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
_date: ContextVar[Callable[[str], str] | None] = ContextVar("date", default=None)


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that takes too long or writes too much."""


def install() -> None:
    """Makes transformers compile chat templates in the limited environment."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not LimitedEnvironment:  # pyright: ignore[reportPrivateImportUsage]
        chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment  # pyright: ignore[reportPrivateImportUsage]
        # What is compiled already has no limits.
        chat_template_utils._compile_jinja_template.cache_clear()


@contextlib.contextmanager
def rendering(date: Callable[[str], str] | None = None) -> Iterator[None]:
    """The limits hold within the block. All that is raised in it is a jinja2.TemplateError. `date` writes the date in the format
    that a template asks for, None: today's.
    """
    token = _deadline.set(time.thread_time() + SECONDS)
    dated = _date.set(date)
    try:
        yield
    except jinja2.TemplateError:
        raise
    except Exception as error:  # a template is a program: it fails with errors of any class
        said = f"{type(error).__name__}: {error}"
        raise jinja2.TemplateRuntimeError(said) from error
    finally:
        _deadline.reset(token)
        _date.reset(dated)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits; what it intercepts is not computed while a template is compiled either."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tick, self.measured = _tick, _measured  # for the calls that `_Watched` puts in
        self.filters = _Guarded(self.filters, _guarded_filter)
        self.tests = _Guarded(self.tests, _guarded_test)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"], self.filters["pprint"]  # neither is of use to a chat

    def _parse(self, *args: Any) -> nodes.Template:
        tree = _Watched().visit(super()._parse(*args))
        tree.set_environment(self)
        return tree

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The texts as one: the output of a template, a macro or a block."""
        kept, size = [], 0
        for part in parts:
            _tick()
            _check_size(size := size + len(part))
            kept.append(part)
        return "".join(kept)

    def join(self, *values: Any) -> str:
        """`a ~ b`."""
        return self.concat(map(str, values))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What the template calls: functions, macros, methods."""
        if obj is _tick or obj is _measured:
            return obj(*args)
        _tick()
        date = _date.get()
        if date is not None and obj is self.globals.get("strftime_now"):
            # Not a value given to the template: transformers makes plain data of those.
            obj = date
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            _check_growth(method.__name__, (owner, *args, *kwargs.values()))
        _measured((args, kwargs))
        return _measured(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_growth("format", (left, *(right if isinstance(right, tuple) else (right,))))
        elif isinstance(left, int) and isinstance(right, int):
            power = operator == "**"
            bits = left.bit_length() * (max(right, 0) if power else 1) + right.bit_length()
            _check_number(bits)
        elif operator == "*":
            times = right if isinstance(right, int) else left if isinstance(left, int) else 1
            _check_size(max(_size(left), _size(right)) * max(times, 0))
        return _measured(super().call_binop(context, operator, left, right))


class _Namespace(Namespace):
    """jinja2's, without what it holds in its text."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Guarded(dict[str, Callable[..., Any]]):
    """Filters or tests, each behind its guard."""

    def __init__(self, functions: dict[str, Callable[..., Any]], guard: Callable[..., Any]):
        super().__init__(functions)
        self.guard = guard

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.guard(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[name] if name in self else default  # noqa: SIM401


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refused what would make a large text of a small one, or take long."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _tick()
        named = [kwargs[key] for key in sorted(kwargs, reverse=True)]  # of `replace`: old, new
        values = (*args, *named)
        _check_growth(name, values)
        if name == "tojson":
            indents = [x for x in values[1:] if isinstance(x, str | int)]
            widest = max((len(x) if isinstance(x, str) else x for x in indents), default=0)
            _measured(values, widest)
        elif name not in _QUICK:
            _check_slow(name, values)
        return _measured(function(*args, **kwargs))

    return guarded


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The test, which looks at the time: `select` calls one for every entry."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _tick()
        return function(*args, **kwargs)

    return guarded


class _Watched(NodeTransformer):
    """Has loops, comparisons and slices look at the time, and measures what `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call_of_tick()).set_lineno(node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _after_tick(node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _after_tick(node.node)
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # the names of a loop
            return node
        measured = nodes.EnvironmentAttribute("measured")
        return nodes.Call(measured, [node], [], None, None).set_lineno(node.lineno)

    visit_Tuple = visit_Dict = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)


def _call_of_tick() -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)


def _after_tick(node: nodes.Expr) -> nodes.Expr:
    """`tick() or` the expression."""
    return nodes.Or(_call_of_tick(), node, lineno=node.lineno)


def _tick() -> None:
    """TemplateLimitError once the time is over."""
    if time.thread_time() > _deadline.get():
        raise TemplateLimitError(f"the chat template takes longer than {SECONDS:g} s")


def _measured(value: Any, indent: int = 0) -> Any:
    """The value, if the texts in it are not too large with what it holds more than once counted as often, each entry indented
    by as much as JSON is. What is yet to be made is measured as it is made.
    """
    if isinstance(value, GeneratorType):
        return _counted(value)
    level, depth, size, turns = [value], 0, 0, 0
    while level:
        below = []
        for inner in level:
            if isinstance(inner, dict):
                below += [*inner.keys(), *inner.values()]
            elif isinstance(inner, list | tuple | set):
                below += inner
            is_sized = isinstance(inner, str | bytes | list | tuple | set | dict)
            size += (len(inner) if is_sized else 1) + indent * depth
            _check_size(size)
            turns += 1
            if turns % 1024 == 0:
                _tick()
        level, depth = below, depth + 1
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    size = 0
    for value in values:
        _tick()
        _check_size(size := size + _size(_measured(value)) + 1)
        yield value


def _size(value: Any) -> int:
    """Characters of a text, or of the texts of a list."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(len(x) if isinstance(x, str | bytes) else 1 for x in value)
    return 0


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TemplateLimitError(
            f"the chat template makes a text of more than {MAX_CHARACTERS:,} characters"
        )


def _check_number(number: int) -> None:
    if abs(number) > _MAX_NUMBER:
        raise TemplateLimitError(f"the chat template works with a number above {_MAX_NUMBER:,}")


def _check_slow(name: str, values: tuple[Any, ...]) -> None:
    """TemplateLimitError for more than a filter copes with that is not quick: `wordwrap`, `urlize`, `striptags`, `sort`."""
    lengths = [len(x) for x in values if isinstance(x, str | bytes | list | tuple | dict)]
    if max(lengths, default=0) > _MAX_SLOW:
        raise TemplateLimitError(
            f"the chat template gives {name!r} a value of {max(lengths):,} letters or entries, more than {_MAX_SLOW:,}"
        )
    _check_size(lengths[0] * sum(lengths[1:]) if lengths else 0)


def _check_growth(name: str, values: tuple[Any, ...]) -> None:
    """What a filter is given, or a method of what comes first. TemplateLimitError if that may be a large text, or take long."""
    texts = [x for x in values if isinstance(x, str | bytes)]
    lists = [x for x in values if isinstance(x, list | tuple)]
    numbers = [x for x in values[1:] if isinstance(x, int)]
    if name == "replace":
        if len(texts) == 2:  # the filter makes a text of what it is given
            texts = [str(values[1]), *texts]
        if len(texts) == 3:
            text, old, new = cast(list[str], texts)  # or all three are bytes
            _check_size(text.count(old) * len(new))
    elif name == "join":
        count = max(map(len, lists), default=MAX_RANGE)
        _check_size(sum(map(len, texts)) * count + sum(map(_size, lists)))
    elif name == "indent" and texts:
        width = max([4, *numbers, *map(len, texts[1:])])
        _check_size(len(texts[0]) + len(texts[0].splitlines()) * width)
    elif name == "expandtabs":
        _check_size(len(texts[0]) * max([8, *numbers]) if "\t" in str(texts[0]) else 0)
    elif name == "translate":
        made = [x for table in values[1:] if isinstance(table, dict) for x in table.values()]
        _check_size(len(texts[0]) * max(map(_size, made), default=0))
    elif name in _BACKWARDS and len(texts) == 2 and len(texts[0]) * len(texts[1]) > _MAX_COMPARED:
        raise TemplateLimitError(
            f"the chat template compares {len(texts[0]):,} letters with {len(texts[1]):,} each ({name})"
        )
    elif name in ("format", "format_map") and texts:
        numbers = _check_format(str(texts[0]), values[1:], numbers)
    if name not in ("default", "d"):
        for number in numbers:
            _check_number(number)


def _check_format(text: str, values: tuple[Any, ...], numbers: list[int]) -> list[int]:
    """What `%` or a format method is given; returns those of the numbers that may be widths. TemplateLimitError if that may be a
    large text.
    """
    if re.search(r"\d{7}", text):
        raise TemplateLimitError("the chat template writes with a width of seven digits")
    if not re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", text):
        numbers = []  # are values, none a width
    fields = text.count("%") + text.count("{")
    inner = [x for value in values if isinstance(value, dict) for x in value.values()]
    largest = max([0, *numbers, *map(_size, values), *map(_size, inner)])
    written = sum(map(int, re.findall(r"\d+", text)))
    _check_size(len(text) + written + fields * largest)
    return numbers
