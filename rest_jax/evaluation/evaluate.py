"""Greedy completions to data sets, scored: the command `rest-jax evaluate`.

In: any model, record files or synthetic worlds. Out: a table with one row of rates for each data set, and on request a JSONL
file with every completion and its scores.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from rest_jax.data.tokenize import load_split, prepare
from rest_jax.evaluation.heldout import EvalExample, Evaluator
from rest_jax.files import atomic_write
from rest_jax.rollout.engine import rollout_cast
from rest_jax.run.metrics import summary_table
from rest_jax.run.policy import config_of, load_policy
from rest_jax.templates import TEMPLATES


def evaluate(
    model: str,
    data: Sequence[str],
    overrides: Sequence[str],
    limit: int | None = None,
    output: str | None = None,
) -> str:
    """The table of rates. `limit` is the number of records read of each data set, `output` the file for the completions,
    which appears once all are written. UserError for a model or data that cannot be used.
    """
    config = config_of(model, overrides)
    sets = {spec: load_split(spec, config.data, limit) for spec in data}
    policy = load_policy(config.model, config.mesh)
    params = rollout_cast(policy)(policy.params)
    template = TEMPLATES[config.data.template]
    rows: list[list[Any]] = []
    with contextlib.ExitStack() as stack:
        file = None
        # Opened first: a folder that is missing is known before hours of sampling.
        if output is not None:
            partial = stack.enter_context(atomic_write(output))
            file = stack.enter_context(partial.open("w", encoding="utf-8"))
        for spec, records in sets.items():
            prepared = prepare(records, policy.tokenizer, template, config.data)
            print(f"{spec}: {prepared.summary()}", flush=True)
            pairs = zip(prepared.prompts, prepared.records, strict=True)
            examples = [EvalExample(prompt, record.target, record.id) for prompt, record in pairs]
            rates, scored = Evaluator(config, policy, examples)(params)
            rows = rows or [["data", *(name.removeprefix("eval/") for name in rates)]]
            rows.append([spec, *rates.values()])
            if file is not None:
                file.writelines(json.dumps({"data": spec, **line}) + "\n" for line in scored)
    return summary_table(rows)
