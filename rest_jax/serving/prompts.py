"""From the body of a request to token ids: what the policy is to continue, and how its answer is read.

A chat goes the way of the training data: messages and tools are read by `data.fields` and `data.convert.openai`, written by the
template that the policy was trained on, and control tokens that they quote are plain text. A call that is required is begun for
the policy. All of it may take long, so it is no work for the thread that serves.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rest_jax.data import fields
from rest_jax.data.convert.openai import history
from rest_jax.data.fields import RecordError
from rest_jax.data.records import decompose
from rest_jax.data.tokenize import Encoder
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.serving.protocol import ApiError, ChatRequest, CompletionRequest
from rest_jax.serving.text import Completion, Plain, Turn


@dataclasses.dataclass(frozen=True)
class Served:
    """The policy as clients see it."""

    name: str
    encoder: Encoder  # of the template that the policy was trained on
    max_prompt_tokens: int
    max_new_tokens: int  # of an answer

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's tokenizer."""
        return self.encoder.tokenizer


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of the policy: `n` completions of each prompt."""

    prompts: Sequence[np.ndarray]  # int32 [T] each
    max_tokens: int
    stops: Sequence[bytes]
    calls: int | None = 0  # tools are on offer, and so many may be called; None: any number
    opening: bytes = b""  # the beginning of the answer that the prompt has already


def read_chat(served: Served, request: ChatRequest) -> Asked:
    """The prompt of a chat. ApiError 400 for messages or tools that cannot be read, or are too long."""
    choice = request.tool_choice or ("auto" if request.tools else "none")
    try:
        tools = fields.tools(list(request.tools), "tools")
        names = [tool["name"] for tool in tools]
        if choice not in ("none", "auto") and not tools:
            raise RecordError("tool_choice: a call is required, and there are no tools")
        if isinstance(choice, tuple) and choice[0] not in names:
            raise RecordError(f"tool_choice: {fields.shown(choice[0])} is not one of the tools")
        if choice == "required" and len(names) == 1:
            choice = (names[0],)
        offered = () if choice == "none" else tools
        ids = encode_chat(served.encoder, request.messages, offered)
    except UserError as error:
        message = str(error).removeprefix("record 'messages': ")
        param = next((p for p in ("tools", "tool_choice") if message.startswith(p)), "messages")
        raise ApiError(400, message, param) from error
    opening = ""
    if choice not in ("none", "auto"):
        tokenizer, template = served.tokenizer, served.encoder.template
        name = choice[0] if isinstance(choice, tuple) else None
        opening = template.call_opening(name)
        begun = template.call_opening(None if name is None else tokenizer.mask(name))
        ids = np.concatenate([ids, tokenizer.encode_all([begun])[0]])
    return _checked(
        served,
        Asked(
            prompts=[ids],
            max_tokens=request.max_new_tokens or served.max_new_tokens,
            stops=[stop.encode() for stop in request.stop],
            calls=0 if not offered else None if request.parallel_tool_calls else 1,
            opening=opening.encode(),
        ),
        "messages",
        request.limit,
    )


def encode_chat(
    encoder: Encoder, messages: Sequence[Any], tools: Sequence[dict[str, Any]]
) -> np.ndarray:
    """int32 [T]: the prompt of a chat, with the tools on offer. RecordError for messages that are none."""
    # as the records of training: what follows is a turn of the assistant
    turns = [*history(messages, tools, "messages"), {"role": "assistant", "content": None}]
    record = decompose("messages", "openai", tuple(tools), turns)[-1]
    return encoder([record])[0][0]


def read_completion(served: Served, request: CompletionRequest) -> Asked:
    """The prompts of a completion. ApiError 400 for ids that are none, and for prompts that are too long or empty."""
    size = served.tokenizer.vocab_size
    prompts = []
    for prompt in request.prompt:
        if isinstance(prompt, str):
            prompts.append(served.tokenizer.encode(prompt))
            continue
        if (most := max(prompt)) >= size:
            raise ApiError(400, f"prompt: the id {most} is above the vocabulary's {size}", "prompt")
        prompts.append(np.asarray(prompt, np.int32))
    stops = [stop.encode() for stop in request.stop]
    return _checked(served, Asked(prompts, request.max_tokens, stops), "prompt", request.limit)


def completion(
    served: Served, request: ChatRequest | CompletionRequest, asked: Asked
) -> Completion:
    """A completion of what is asked, before anything is drawn."""
    is_chat = isinstance(request, ChatRequest)
    reading = Turn(served.encoder.template, asked.calls) if is_chat else Plain()
    return Completion(served.tokenizer, reading, asked.stops, asked.opening)


def _checked(served: Served, asked: Asked, field: str, limit: str) -> Asked:
    lengths = [len(prompt) for prompt in asked.prompts]
    if not min(lengths):
        raise ApiError(400, f"{field}: a prompt without tokens", field)
    if max(lengths) > served.max_prompt_tokens:
        raise ApiError(
            400,
            f"{field}: {max(lengths):,} tokens, at most {served.max_prompt_tokens:,} are taken",
            field,
            "context_length_exceeded",
        )
    if asked.max_tokens > served.max_new_tokens:
        raise ApiError(
            400,
            f"{limit}: {asked.max_tokens:,}, at most {served.max_new_tokens:,} are given",
            limit,
        )
    return asked
