"""Completions as text, for reading: the command `rest-jax generate`.

`generate(config, records, ...)` loads the policy that `config.model` names and samples completions to each record, in batches
that fill the decode slots; it yields their texts, without the token that ends the turn.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rest_jax.config import Config
from rest_jax.data import fields
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.ragged import Ragged
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Encoder, encode, fitting, said_aside
from rest_jax.distributed import num_data_shards
from rest_jax.errors import UserError
from rest_jax.files import as_path, store_errors
from rest_jax.models.policy import check_positions
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.run.load import load_policy
from rest_jax.templates import TEMPLATES
from rest_jax.texts import print_text
from rest_jax.tool_calls import Target
from rest_jax.types import PromptBatch, Sampling


def generate(
    config: Config, records: Sequence[StepRecord], samples: int, greedy: bool
) -> Iterator[tuple[StepRecord, list[str]]]:
    """Yields each record with the texts of its `samples` completions, in order. Records longer than
    `data.max_prompt_tokens`, and those that the chat template refuses, are left out. UserError for a model that cannot be loaded.
    """
    policy = load_policy(config.model, config.mesh, config.rollout.tensor)
    r, tokenizer = config.rollout, policy.tokenizer
    # the records may have no gold answer, or one that cannot be reached
    encoder = Encoder(tokenizer, TEMPLATES[config.data.template], config.data.brief_prompt)
    records, columns, refused = encode(records, encoder)
    prompts = [Ragged.of(column) for column in columns]
    prepared = fitting(records, prompts, config.data.max_prompt_tokens, refused)
    if refused:
        print_text(said_aside(refused), sys.stderr)
    longest = int(prepared.prompts.lengths.max())
    check_positions(policy.config, longest, r.max_response_tokens)
    sampling = Sampling(r.temperature, r.top_k, r.top_p, greedy)
    sampler = make_sampler(policy, r, samples, sampling)
    params = rollout_cast(policy)(policy.params)
    width = bucketed(prepared.prompts)
    batch_size = max(1, r.decode_slots // samples) * num_data_shards(policy.mesh)
    for start in range(0, prepared.size, batch_size):
        rows = range(start, min(start + batch_size, prepared.size))
        padded = pad([prepared.prompts[i] for i in rows], width, tokenizer.pad_id)
        batch = PromptBatch(*padded, np.asarray(rows, np.int32))
        out = sampler.sample_all(params, batch, jax.random.key(config.seed))
        for i, ids, lengths in zip(rows, out.responses, out.response_length, strict=True):
            texts = [x[:n] for x, n in zip(ids, lengths, strict=True)]
            texts = [x[:-1] if int(x[-1]) in tokenizer.stop_ids else x for x in texts]
            yield prepared.records[i], [tokenizer.text(x) for x in texts]


def prompt_record(prompt: str, tools: str | None) -> StepRecord:
    """A record of what a user says, with the tools of a JSON file. UserError for a file that is no list of tools."""
    offered = () if tools is None else read_tools(tools)
    history = ({"role": "user", "content": prompt},)
    return StepRecord("prompt", "", offered, history, Target())


def read_tools(path: str) -> tuple[dict[str, Any], ...]:
    """The tools of a JSON file. UserError for a file that is no list of tools."""
    try:
        with store_errors(path):
            text = as_path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"tools {path}: {reason}") from error
    return fields.tools(text, f"tools {path}")
