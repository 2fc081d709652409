"""Limits of time and size on chat templates, which are programs that come with a model.

jinja2's sandbox keeps a template away from the interpreter, but lets it run for ever and fill the memory. `rendering()` is the
block in which the environment that transformers compiles templates with (`install`) raises TemplateLimitError: loops and
calls look at the processor time of the thread, and what makes a large text or number of small ones is measured beforehand.
Lists and objects are measured where they are made, as the text that they would be: one that holds another twice, and that in
another twice, would grow without end.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 2.0  # of processor time, for one chat
MAX_CHARACTERS = 2**24  # of a chat, and of every text on the way
_MAX_NUMBER = 2**20  # of a width, a count or the bits of a number
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that takes too long or writes too much."""


def install() -> None:
    """Makes transformers compile chat templates in the limited environment."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment  # pyright: ignore[reportPrivateImportUsage]


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """The limits hold within the block. All that is raised in it is a jinja2.TemplateError."""
    token = _deadline.set(time.thread_time() + SECONDS)
    try:
        yield
    except jinja2.TemplateError:
        raise
    except Exception as error:  # a template is a program: it fails with errors of any class
        said = f"{type(error).__name__}: {error}"
        raise jinja2.TemplateRuntimeError(said) from error
    finally:
        _deadline.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits; what it intercepts is not computed while a template is compiled either."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.filters = _Filters(self.filters, self)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def _parse(self, *args: Any) -> nodes.Template:
        tree = _Watched().visit(super()._parse(*args))
        tree.set_environment(self)
        return tree

    def tick(self) -> None:
        """TemplateLimitError once the time is over; called in every turn of a loop."""
        if time.thread_time() > _deadline.get():
            raise TemplateLimitError(f"the chat template takes longer than {SECONDS:g} s")

    def measured(self, value: Any) -> Any:
        """The value, if the texts in it are not too large with what it holds more than once counted as often."""
        waiting, size, turns = [value], 0, 0
        while waiting:
            inner = waiting.pop()
            if isinstance(inner, dict):
                waiting += [*inner.keys(), *inner.values()]
            elif isinstance(inner, list | tuple | set):
                waiting += inner
            size += len(inner) if isinstance(inner, str | list | tuple | set | dict) else 1
            _check_size(size)
            turns += 1
            if turns % 1024 == 0:
                self.tick()
        return value

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The texts as one: the output of a template, a macro or a block."""
        kept, size = [], 0
        for part in parts:
            self.tick()
            _check_size(size := size + len(part))
            kept.append(part)
        return "".join(kept)

    def join(self, *values: Any) -> str:
        """`a ~ b`."""
        return self.concat(map(str, values))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What the template calls: functions, macros, methods."""
        self.tick()
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_growth(method.__name__, (owner, *args, *kwargs.values()))
        self.measured((args, kwargs))
        return self.measured(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
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
        return self.measured(super().call_binop(context, operator, left, right))


class _Namespace(Namespace):
    """jinja2's, without what it holds in its text."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Filters(dict[str, Callable[..., Any]]):
    """Filters that are refused what would make a large text of a small one."""

    def __init__(self, filters: dict[str, Callable[..., Any]], environment: LimitedEnvironment):
        super().__init__(filters)
        self.environment = environment

    def __getitem__(self, name: str) -> Callable[..., Any]:
        function = super().__getitem__(name)

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            _check_growth(name, (*args, *kwargs.values()))
            return self.environment.measured(function(*args, **kwargs))

        return guarded

    def get(self, name: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[name] if name in self else default  # noqa: SIM401


class _Watched(NodeTransformer):
    """Has loops look at the time, and measures what `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
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


def _size(value: Any) -> int:
    """Characters of a text, or of the texts of a list."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(len(x) if isinstance(x, str) else 1 for x in value)
    return 0


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TemplateLimitError(
            f"the chat template makes a text of more than {MAX_CHARACTERS:,} characters"
        )


def _check_number(number: int) -> None:
    if abs(number) > _MAX_NUMBER:
        raise TemplateLimitError(f"the chat template works with a number above {_MAX_NUMBER:,}")


def _check_growth(name: str, values: tuple[Any, ...]) -> None:
    """What a filter is given, or a method of the text that comes first. TemplateLimitError if that may be a large text."""
    texts = [x for x in values if isinstance(x, str)]
    lists = [x for x in values if isinstance(x, list | tuple)]
    numbers = [x for x in values[1:] if isinstance(x, int)]
    if name == "replace" and len(texts) == 3:
        _check_size(texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join":
        count = max(map(len, lists), default=MAX_RANGE)
        _check_size(sum(map(len, texts)) * count + sum(map(_size, lists)))
    elif name in ("format", "format_map") and texts:
        if re.search(r"\d{7}", texts[0]):
            raise TemplateLimitError("the chat template writes with a width of seven digits")
        if not re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", texts[0]):
            numbers = []  # are values, none a width
    if name not in ("default", "d"):
        for number in numbers:
            _check_number(number)
