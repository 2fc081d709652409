"""The prompt of a request is that of the training record of the same dialogue, id for id."""

import json

import numpy as np
import pytest

from rest_jax.data.convert import SOURCES
from rest_jax.data.tokenize import Encoder
from rest_jax.serving.prompts import Served, read_chat
from rest_jax.serving.protocol import ChatRequest
from rest_jax.templates import TEMPLATES
from tests.conftest import REPOSITORY

CHATS = json.loads((REPOSITORY / "tests/data/convert/fixtures/openai.json").read_text())


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_those_of_training(tokenizer, template):
    encoder, seen = Encoder(tokenizer, TEMPLATES[template]), 0
    served = Served("tiny", encoder, max_prompt_tokens=10**6, max_new_tokens=16)
    for chat in CHATS:
        ends = [i for i, message in enumerate(chat["messages"]) if message["role"] == "assistant"]
        records = SOURCES["openai"](chat, "r", "here")
        if len(records) != len(ends):  # several messages are one turn
            continue
        for end, record in zip(ends, records, strict=True):
            body = ChatRequest(
                messages=chat["messages"][:end],
                tools=chat.get("tools") or chat.get("functions") or [],
            )
            np.testing.assert_array_equal(
                read_chat(served, body).prompts[0], encoder([record])[0][0]
            )
            seen += 1
    assert seen > 3
