"""Bodies of the commands that use a finished model: export, generate, evaluate; and `data inspect`, which looks at records.

A model is an HF folder, a hub id, a converted folder or the folder of a run. For a run, its own config gives the
defaults (template, limits, sampling), for anything else the config models do; `overrides` ("key=value") come on top.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.data import tokenize as prepare_lib
from rest_jax.data.files import iter_records
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.prepare import summary
from rest_jax.data.records import StepRecord
from rest_jax.distributed import num_data_shards
from rest_jax.errors import UserError
from rest_jax.evaluation.heldout import EvalExample, Evaluator
from rest_jax.files import atomic_write
from rest_jax.models.hf import write as hf
from rest_jax.models.load import Policy
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.engine import rollout_cast
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.run.folder import MODEL_FOLDER
from rest_jax.run.metrics import summary_table
from rest_jax.run.policy import config_of, is_run, load_policy
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target
from rest_jax.types import PromptBatch, Sampling


def export(source: str, out: str, dtype: str | None) -> int:
    """Writes `source` as an HF folder `out`, which must not exist yet."""
    source = config_lib.locate(source)
    if is_run(source):
        config = config_of(source, [])
        policy = load_policy(config.model, config.mesh)
        hf.export(policy.params, pathlib.Path(source) / MODEL_FOLDER, out, dtype)
    else:
        hf.export(source, hf.find_source(source), out, dtype)
    print(f"exported {source} to {out}")
    return 0


def generate(
    source: str,
    *,
    prompt: str | None,
    tools: str | None,
    file: str | None,
    limit: int | None,
    samples: int,
    greedy: bool,
    overrides: Sequence[str],
) -> int:
    """Prints answers: to `prompt` as plain text, to the records of `file` as one JSON line an answer."""
    config = config_of(source, overrides)
    if file is not None:
        records = prepare_lib.load_split(file, config.data, limit)
    else:
        history = ({"role": "user", "content": prompt},)
        records = [StepRecord("prompt", "", tuple(_read_tools(tools)), history, Target())]
    policy = load_policy(config.model, config.mesh)
    for record, texts in sample(policy, config, records, samples, greedy):
        for text in texts:
            print(text if file is None else json.dumps({"id": record.id, "text": text}), flush=True)
    return 0


def sample(
    policy: Policy, config: Config, records: Sequence[StepRecord], samples: int, greedy: bool
) -> Iterator[tuple[StepRecord, list[str]]]:
    """(record, its answers) in order; records too long for the limit are left out."""
    template = TEMPLATES[config.data.template]
    prepared = prepare_lib.prepare(records, policy.tokenizer, template, config.data)
    r, tokenizer = config.rollout, policy.tokenizer
    sampling = Sampling(r.temperature, r.top_k, r.top_p, greedy)
    sampler = make_sampler(policy, r, samples, sampling)
    params = rollout_cast(policy)(policy.params)
    width, call = (
        bucketed(prepared.prompts),
        max(1, r.decode_slots // samples) * num_data_shards(policy.mesh),
    )
    for start in range(0, prepared.size, call):
        index = np.arange(start, min(start + call, prepared.size))
        tokens, length = pad([prepared.prompts[i] for i in index], width, tokenizer.pad_id)
        batch = PromptBatch(tokens, length, index.astype(np.int32))
        out = sampler(params, batch, jax.random.key(config.seed), 0)
        for row, i in enumerate(index):
            lengths, ids = out.response_length[row], out.responses[row]
            texts = [
                tokenizer.text(_unstopped(x[:n], tokenizer))
                for x, n in zip(ids, lengths, strict=True)
            ]
            yield prepared.records[i], texts


def evaluate(
    source: str,
    data: Sequence[str],
    *,
    limit: int | None,
    output: str | None,
    overrides: Sequence[str],
) -> int:
    """Prints one row of rates for each data set; `output` gets every answer with its scores."""
    config = config_of(source, overrides)
    records = {spec: prepare_lib.load_split(spec, config.data, limit) for spec in data}
    policy = load_policy(config.model, config.mesh)
    params = rollout_cast(policy)(policy.params)
    template = TEMPLATES[config.data.template]
    table: list[list[Any]] = []
    with _lines(output) as file:
        for spec, found in records.items():
            prepared = prepare_lib.prepare(found, policy.tokenizer, template, config.data)
            print(f"{spec}: {prepared.summary()}", flush=True)
            pairs = zip(prepared.prompts, prepared.records, strict=True)
            examples = [EvalExample(prompt, record.target, record.id) for prompt, record in pairs]
            evaluator = Evaluator(config, policy, examples)
            rates, answers = evaluator(params)
            table = table or [["data", *(name.removeprefix("eval/") for name in rates)]]
            table.append([spec, *rates.values()])
            if file is not None:
                file.writelines(json.dumps({"data": spec, **answer}) + "\n" for answer in answers)
    print(summary_table(table))
    return 0


def inspect(
    file: str, *, tokenizer: str | None, limit: int | None, overrides: Sequence[str]
) -> int:
    """Prints what a file of records holds, with token counts when a tokenizer is given."""
    config = config_lib.from_overrides({"name": "data", "model": {"source": "none"}}, overrides)
    data, count = config.data, None
    if tokenizer is not None:
        loaded = Tokenizer.load(config_lib.locate(tokenizer))
        count = summary.TokenCounter(loaded, TEMPLATES[data.template], data.brief_prompt)
    world = prepare_lib.is_world(file)
    records = prepare_lib.load_split(file, data, limit) if world else iter_records(file, limit)
    tally = summary.Tally()
    for record in records:
        tally.add(record, None if count is None else count(record))
    if not tally.records:
        raise UserError(f"data {file}: no records")
    print(summary.to_text(tally))
    return 0


def _unstopped(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of an answer without its end-of-turn id."""
    return ids[:-1] if len(ids) and int(ids[-1]) in tokenizer.stop_ids else ids


def _read_tools(path: str | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    try:
        tools = json.loads(pathlib.Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"tools {path}: not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(t, dict) and "name" in t for t in tools):
        raise UserError(f"tools {path}: a list of objects with a name is needed")
    return tools


@contextlib.contextmanager
def _lines(output: str | None) -> Iterator[TextIO | None]:
    """The output file, which appears under its name only once it is whole."""
    if output is None:
        yield None
        return
    with atomic_write(output) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
