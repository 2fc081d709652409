"""The command `rest-jax chat`: a dialogue in the terminal, with a model that is loaded or with any server of OpenAI's protocol.

Tools come from a file or from a world. The functions of a Python file are called, with what their signatures and docstrings say
as their schemas; of a JSON list of tools the user types the results; a world makes the calls itself, and the user is the one who
wants something of it. Calls and results are shown.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import inspect
import json
import pathlib
import re
import runpy
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from rest_jax import tool_calls
from rest_jax.data import fields
from rest_jax.errors import UserError
from rest_jax.evaluation.tau2 import Tau2
from rest_jax.files import local_path
from rest_jax.rollout.generate import read_tools
from rest_jax.templates.rendering import signature
from rest_jax.texts import printable
from rest_jax.worlds.records import Message, World
from rest_jax.worlds.synthetic import Shop, tasks

MAX_ROUNDS = 32  # answers with calls in a row
_SHOWN = 2000  # characters of a result
_NO_TOOLS = "no tools (--tools FILE or --world NAME offers some)"
_HELP = "/new begins anew, Ctrl-C breaks off an answer, Ctrl-D ends"

Call = Callable[[str, Mapping[str, Any]], str]


@dataclasses.dataclass(frozen=True)
class Server:
    """Where the model is."""

    url: str  # without /v1
    model: str
    api_key: str | None = None


@dataclasses.dataclass(frozen=True)
class Tools:
    """What the model may call. `call`: executes it. `begin`: before a dialogue, gives the messages that open it."""

    schemas: Sequence[Mapping[str, Any]]
    call: Call
    begin: Callable[[], list[Message]] = list
    judge: Callable[[], str] = str  # what is said of the dialogue after every turn


class ServerFault(Exception):
    """An answer that did not come; the text says why."""


def connect(url: str, model: str | None, api_key: str | None) -> Server:
    """The server at a URL, with or without /v1. UserError when none answers."""
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise UserError(
            "--api-key (REST_JAX_API_KEY): it has characters that no key has; see to line ends"
        )
    base = url.rstrip("/").removesuffix("/v1")
    try:
        with _open(Server(base, "", api_key), "models") as got:
            models = [each["id"] for each in json.load(got)["data"]]
    except (ServerFault, ValueError, KeyError, TypeError) as error:
        raise UserError(f"chat {url}: {error}") from error
    if model is None and not models:
        raise UserError(f"chat {url}: it serves no model")
    return Server(base, model or models[0], api_key)


def chat(server: Server, tools: Tools, system: str | None, sampling: Mapping[str, Any]) -> None:
    """The dialogue, until the input ends. `sampling`: fields of every request."""
    console = Console(highlight=False)
    _show(console, server.model, "bold")
    offered = f"{len(tools.schemas)} tools" if tools.schemas else _NO_TOOLS
    console.print(f", {offered}; {_HELP}", markup=False)
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = [*start, *_begin(console, tools)]
    while (text := _typed(console)) is not None:
        if not text:
            continue
        if text == "/new":
            messages = [*start, *_begin(console, tools)]
            continue
        before = len(messages)
        messages.append({"role": "user", "content": text})
        try:
            _turn(console, server, tools, messages, sampling)
            _show(console, tools.judge(), "yellow")
        except (ServerFault, KeyboardInterrupt) as error:
            del messages[before:]
            _show(console, f"\n{str(error) or 'broken off'}; what you said is taken back\n", "red")


def _begin(console: Console, tools: Tools) -> list[Message]:
    """The messages that open a dialogue. What the user is to say in it is only shown."""
    messages = tools.begin()
    for message in messages:
        if message["role"] == "user":
            _show(console, f"(your task: {message['content']})\n", "yellow")
    return [message for message in messages if message["role"] != "user"]


def _turn(
    console: Console,
    server: Server,
    tools: Tools,
    messages: list[Message],
    sampling: Mapping[str, Any],
) -> None:
    """Answers, until one has no calls; they are added to the messages."""
    body = {"model": server.model, "messages": messages, "stream": True, **sampling}
    if tools.schemas:
        body["tools"] = list(tools.schemas)
    for _ in range(MAX_ROUNDS):
        messages.append(message := _answer(console, server, body))
        if not message.get("tool_calls"):
            return
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            _show(console, f"{name} {arguments}\n", "cyan")
            result = _result(tools.call, name, arguments)
            _show(console, f"{result[:_SHOWN]}\n", "green")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    raise ServerFault(f"{MAX_ROUNDS} answers with calls in a row")


def _result(call: Call, name: str, arguments: str) -> str:
    try:
        return call(name, fields.mapping(json.loads(arguments or "{}"), "arguments"))
    except Exception as error:  # whatever a tool raises is for the model to read
        return f"error: {type(error).__name__}: {error}"


def _answer(console: Console, server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    """The message of one answer, which is shown as it comes."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    shown = last = ""
    finish = None
    for chunk in _chunks(server, body):
        for choice in chunk.get("choices") or ():
            delta, finish = choice.get("delta") or {}, choice.get("finish_reason") or finish
            for key, style in (("reasoning_content", "dim"), ("content", "")):
                if said := delta.get(key):
                    _show(console, ("\n" if shown not in ("", key) else "") + said, style)
                    message[key] = message.get(key, "") + said
                    shown, last = key, said
            for call in delta.get("tool_calls") or ():
                _add_call(calls.setdefault(call.get("index", 0), {}), call)
    if last and not last.endswith("\n"):
        _show(console, "\n")
    if finish == "length":
        _show(console, "(cut off: the limit of tokens)\n", "yellow")
    if calls:
        message["tool_calls"] = [calls[i] for i in sorted(calls)]
    return message


def _add_call(call: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Puts a part of a call to it: other servers send its arguments in pieces."""
    function = call.setdefault("function", {"name": "", "arguments": ""})
    call.setdefault("type", "function")
    call.setdefault("id", part.get("id"))
    for key in function:
        function[key] += (part.get("function") or {}).get(key) or ""


def _chunks(server: Server, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of an answer. ServerFault for an error, and for a connection that is lost."""
    with _open(server, "chat/completions", json.dumps(body).encode()) as got:
        try:
            for line in got:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if line.startswith(b"data:"):
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServerFault(_reason(chunk))
                    yield chunk
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerFault(f"{server.url}: {error}") from error


@contextlib.contextmanager
def _open(server: Server, path: str, data: bytes | None = None) -> Iterator[Any]:
    headers = {"Content-Type": "application/json"}
    if server.api_key is not None:
        headers["Authorization"] = f"Bearer {server.api_key}"
    try:
        request = urllib.request.Request(f"{server.url}/v1/{path}", data, headers)
        host = urllib.parse.urlsplit(server.url).hostname
        direct = (
            [urllib.request.ProxyHandler({})] if host in ("127.0.0.1", "localhost", "::1") else []
        )
        got = urllib.request.build_opener(*direct).open(request)
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(ValueError):
            raise ServerFault(_reason(json.loads(error.read()))) from error
        raise ServerFault(f"{server.url}: status {error.code}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerFault(f"{server.url}: {getattr(error, 'reason', error)}") from error
    with got:
        yield got


def _reason(body: Any) -> str:
    """What an error object says."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message") if isinstance(error, dict) else error or body)[:500]


def _show(console: Console, text: str, style: str = "") -> None:
    console.out(printable(text), style=style or None, end="", highlight=False)


def _typed(console: Console) -> str | None:
    """What the user types, without the space around it; None at the end."""
    try:
        return console.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


# --- tools ------------------------------------------------------------------------------------------------------------


def load_tools(path: str | None) -> Tools:
    """The tools of a Python file or of a JSON list. UserError for a file that has none."""
    if path is None:
        return Tools((), _no_tool)
    if pathlib.PurePath(path).suffix == ".py":
        return _functions(local_path("tools", path))
    schemas = [signature(tool) for tool in read_tools(path)]
    return Tools(schemas, lambda name, _: input(f"the result of {name}: "))


def open_tools(
    path: str | None, world: str | None, data: str | None
) -> contextlib.AbstractContextManager[Tools]:
    """The tools of a file, or of a world (`_open_world`)."""
    return contextlib.nullcontext(load_tools(path)) if world is None else _open_world(world, data)


@contextlib.contextmanager
def _open_world(name: str, data: str | None) -> Iterator[Tools]:
    """The tools of a world and one of its tasks: "synthetic:3" is the task 3 of `worlds.synthetic`, "tau2:telecom:3" the ticket 3
    of tau2, whose package is in the virtual environment `data`. UserError for another name.
    """
    found = re.fullmatch(r"(synthetic|tau2:telecom)(?::(\d{1,6}))?", name)
    if found is None:
        raise UserError(
            f"--world {name}: unknown; synthetic or tau2:telecom, with :N behind it for its task N"
        )
    number = int(found[2] or 0)
    if found[1] == "synthetic":
        yield _world_tools(Shop(), tasks(0, number + 1)[-1])
        return
    with Tau2(data) as package:
        items = package.load(None)
        if number >= len(items):
            raise UserError(f"--world {name}: the tasks are 0 to {len(items) - 1}")
        yield _world_tools(package.world(), items[number].id)


def _world_tools(world: World, task: Any) -> Tools:
    return Tools(
        schemas=world.reset(task)[1],
        call=lambda tool, arguments: world.call([tool_calls.Call(tool, dict(arguments))])[0],
        begin=lambda: world.reset(task)[0],
        judge=lambda: f"(score {world.score():g})\n",
    )


def _no_tool(name: str, arguments: Mapping[str, Any]) -> str:
    raise LookupError(f"there is no tool {name}")


def _functions(path: pathlib.Path) -> Tools:
    """The public functions that a Python file defines."""
    from transformers.utils.chat_template_utils import get_json_schema

    name = "rest_jax_tools"
    try:
        found = {
            key: value
            for key, value in runpy.run_path(str(path), run_name=name).items()
            if inspect.isfunction(value) and value.__module__ == name and key[0] != "_"
        }
        schemas = [get_json_schema(function) for function in found.values()]
    except (Exception, SystemExit) as error:  # the file is a program
        raise UserError(f"tools {path}: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(f"tools {path}: no function is defined there")

    def call(name: str, arguments: Mapping[str, Any]) -> str:
        result = found.get(name, lambda **_: _no_tool(name, {}))(**arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        return (
            result
            if isinstance(result, str)
            else json.dumps(result, ensure_ascii=False, default=str)
        )

    return Tools(schemas, call)
