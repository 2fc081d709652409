"""What clients send and get, in OpenAI's words: completions, chat completions, and errors.

`read_body(data, kind)` makes a request record of the bytes of a body. Null is the default, fields that are not known are ignored,
those of OpenAI that would change an answer and cannot be honoured are refused. Every fault is an `ApiError`, whose `body` is
OpenAI's error object. `CHAT` and `COMPLETION` write answers, whole or in chunks, as plain JSON objects.
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from rest_jax.data import fields
from rest_jax.data.fields import RecordError
from rest_jax.serving.text import Delta, Token

MAX_STOPS, MAX_STOP = 16, 1000  # stop strings, and characters of one
_LEAST_LOGP = -9999.0  # JSON has no infinity
# Fields that would change the answer: the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}


class ApiError(Exception):
    """A request that is not answered; `status` is the HTTP status, `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is not null."""
    return {key: value for key, value in raw.items() if value is not None}


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(_Record):
    """How a stream ends."""

    include_usage: bool = False


class _Sampled(_Record):
    """What completions and chat completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[str] = []
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False

    @pydantic.field_validator("stream_options", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        return _given(value) if isinstance(value, dict) else value

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError("a text, or a list of texts, that are not empty is needed")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"{len(stops)} texts, at most {MAX_STOPS} are taken")
        if (longest := max(map(len, stops), default=0)) > MAX_STOP:
            raise ValueError(f"{longest:,} characters, at most {MAX_STOP:,} are taken")
        return stops


class CompletionRequest(_Sampled):
    """A body of POST /v1/completions."""

    prompt: list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @pydantic.field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> list[Any]:
        prompts = value
        if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
            prompts = [value]
        if isinstance(prompts, list) and prompts:
            if all(isinstance(p, str) for p in prompts):
                return prompts
            if all(isinstance(p, list) and p and all(map(_is_id, p)) for p in prompts):
                return prompts
        raise ValueError("a text, token ids, or a list of one of these is needed")

    @property
    def limit(self) -> str:
        """The field that says how many tokens an answer has at most."""
        return "max_tokens"

    @property
    def top(self) -> int | None:
        """Alternatives of each token; None: no log-probabilities."""
        return self.logprobs


class ChatRequest(_Sampled):
    """A body of POST /v1/chat/completions. `messages` and `tools` are read by `data.fields` and `data.convert.openai`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] = []
    # a name is that of the one tool to be called
    tool_choice: Literal["none", "auto", "required"] | tuple[str] | None = None
    parallel_tool_calls: bool = True
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @pydantic.field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        if value in ("none", "auto", "required"):
            return value
        function = value.get("function") if isinstance(value, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(value, Mapping) and value.get("type") == "function" and isinstance(name, str):
            return (name,)
        known = "none, auto, required or an object with the name of a function is needed"
        raise ValueError(known)

    @pydantic.field_validator("top_logprobs")
    @classmethod
    def _alternatives(cls, value: int, info: pydantic.ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise ValueError("logprobs: true is needed")
        return value

    @property
    def limit(self) -> str:
        """The field that says how many tokens an answer has at most."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of an answer; None: as many as the server gives."""
        return getattr(self, self.limit)

    @property
    def top(self) -> int | None:
        """Alternatives of each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


_Request = TypeVar("_Request", bound=CompletionRequest | ChatRequest)


def read_body(data: bytes, kind: type[_Request]) -> _Request:
    """The request of a body. ApiError 400 for one that cannot be read, with the field."""
    try:
        raw = fields.json_text(data.decode(), "body")
        fields.check_storable(raw, "body")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: not UTF-8: {error.reason} at byte {error.start}") from error
    except RecordError as error:
        raise ApiError(400, str(error)) from error
    if not isinstance(raw, dict):
        raise ApiError(400, f"body: an object is needed, found {fields.kind(raw)}")
    given = _given(raw)
    for key, neutral in _NEUTRAL.items():
        if key in given and given[key] not in neutral:
            raise ApiError(400, f"{key}: {fields.shown(given[key])} is not supported", key)
    try:
        return kind.model_validate(given)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in fault["loc"])[1:]
        message = fault["msg"].removeprefix("Value error, ")
        said = (
            f", not {fields.shown(fault['input'])}" if place and fault["type"] != "missing" else ""
        )
        raise ApiError(400, f"{place or 'body'}: {message}{said}", place or None) from error


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Head:
    """What every object of one answer says."""

    id: str
    created: int
    model: str
    return_token_ids: bool
    top: int | None  # alternatives of each token; None: no log-probabilities

    @classmethod
    def of(cls, request: CompletionRequest | ChatRequest, model: str) -> "Head":
        """The head of a new answer."""
        name = f"{'chatcmpl' if isinstance(request, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
        return cls(name, int(time.time()), model, request.return_token_ids, request.top)


@dataclasses.dataclass(frozen=True)
class Format:
    """How one path answers. A choice is an object with the new part of a completion, in a chunk, or all of it."""

    object: str
    chunk: str
    # (head, delta): what a choice says of a new part, and of a complete one
    part: Callable[[Head, Delta], dict[str, Any]]
    whole: Callable[[Head, Delta], dict[str, Any]]
    first: Mapping[str, Any] | None  # what the first chunk of a choice says, before there is a part
    # whether token ids of a prompt stand beside the choices or in them
    prompt_beside: bool

    def reply(
        self, head: Head, prompts: Sequence[Sequence[int]], deltas: Sequence[Delta]
    ) -> dict[str, Any]:
        """The answer to a request that does not stream; the completions of a prompt follow each other."""
        each = len(deltas) // len(prompts)
        choices = [
            self.choice(head, i, self.whole(head, delta), delta) for i, delta in enumerate(deltas)
        ]
        reply = self._object(head, self.object, choices)
        if head.return_token_ids:
            for i, choice in enumerate(choices):
                (reply if self.prompt_beside else choice)["prompt_token_ids"] = prompts[i // each]
        drawn = sum(len(delta.tokens) for delta in deltas)
        return reply | {"usage": usage(sum(map(len, prompts)), drawn)}

    def chunk_of(
        self, head: Head, index: int, delta: Delta, prompt: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """A new part of completion `index`; `prompt`: its token ids, with the first part that is drawn."""
        choice = self.choice(head, index, self.part(head, delta), delta)
        chunk = self._object(head, self.chunk, [choice])
        if prompt is not None:
            (chunk if self.prompt_beside else choice)["prompt_token_ids"] = prompt
        return chunk

    def opening(self, head: Head, index: int) -> dict[str, Any]:
        """The first chunk of completion `index`."""
        choice = {"index": index, **(self.first or {}), "logprobs": None, "finish_reason": None}
        return self._object(head, self.chunk, [choice])

    def ending(self, head: Head, prompt_tokens: int, drawn: int) -> dict[str, Any]:
        """The last chunk, with the usage."""
        return self._object(head, self.chunk, []) | {"usage": usage(prompt_tokens, drawn)}

    def choice(self, head: Head, index: int, said: dict[str, Any], delta: Delta) -> dict[str, Any]:
        """A choice of an answer or a chunk."""
        choice = {"index": index, "logprobs": None, **said, "finish_reason": delta.finish}
        if head.return_token_ids:
            choice["token_ids"] = [token.id for token in delta.tokens]
        return choice

    def _object(self, head: Head, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": head.id,
            "object": kind,
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }


def usage(prompt_tokens: int, drawn: int) -> dict[str, int]:
    """Tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": drawn,
        "total_tokens": prompt_tokens + drawn,
    }


def _chat_part(head: Head, delta: Delta) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if delta.thought:
        said["reasoning_content"] = delta.thought
    if delta.text:
        said["content"] = delta.text
    if delta.calls:
        said["tool_calls"] = [
            {"index": i, **call} for i, call in enumerate(_calls(delta), delta.first_call)
        ]
    return {"delta": said, "logprobs": _chat_logprobs(head, delta)}


def _chat_whole(head: Head, delta: Delta) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": delta.text or None}
    if delta.thought:
        message["reasoning_content"] = delta.thought
    if delta.calls:
        message["tool_calls"] = _calls(delta)
    elif not delta.text:
        message["content"] = ""
    return {"message": message, "logprobs": _chat_logprobs(head, delta)}


def _calls(delta: Delta) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False),
            },
        }
        for call in delta.calls
    ]


def _chat_logprobs(head: Head, delta: Delta) -> dict[str, Any] | None:
    if head.top is None:
        return None

    def said(data: bytes, logp: float) -> dict[str, Any]:
        return {"token": _text(data), "logprob": _logp(logp), "bytes": list(data)}

    content = [
        said(token.data, token.logp) | {"top_logprobs": [said(*each) for each in token.top]}
        for token in delta.tokens
    ]
    return {"content": content, "refusal": None}


def _completion(head: Head, delta: Delta) -> dict[str, Any]:
    return {"text": delta.text, "logprobs": _completion_logprobs(head, delta.tokens)}


def _completion_logprobs(head: Head, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if head.top is None:
        return None
    alternatives = [
        {_text(data): _logp(logp) for data, logp in (*token.top, (token.data, token.logp))}
        for token in tokens
    ]
    return {
        "tokens": [_text(token.data) for token in tokens],
        "token_logprobs": [_logp(token.logp) for token in tokens],
        "top_logprobs": alternatives if head.top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _logp(value: float) -> float:
    return max(value, _LEAST_LOGP) if value == value else _LEAST_LOGP


CHAT = Format(
    object="chat.completion",
    chunk="chat.completion.chunk",
    part=_chat_part,
    whole=_chat_whole,
    first={"delta": {"role": "assistant", "content": ""}},
    prompt_beside=True,
)
COMPLETION = Format(
    object="text_completion",
    chunk="text_completion",
    part=_completion,
    whole=_completion,
    first=None,
    prompt_beside=False,
)
