"""Held-out evaluation: greedy completions of prepared prompts, scored like training but at the final reward scale.

`Evaluator` measures any weights, `evaluate` is the command `rest-jax evaluate`, `report_evaluations` closes a run. A run may
answer public benchmarks with them (`evaluation.benchmarks`): their prompts are sampled in the same rollout.
Rates: format (S_format), exact (format and all calls equal gold as multisets; for gold without calls, none made), spurious
(a call among prompts that should have none), accuracy (mean S_acc).
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rest_jax.config import Config
from rest_jax.data.cache import load_prompts
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.records import StepRecord, gold
from rest_jax.data.tokenize import Prepared, load_split, prepare
from rest_jax.distributed import is_first_process, say
from rest_jax.evaluation.benchmark import BENCHMARKS, completions, encode, load, score_items
from rest_jax.evaluation.statistics import estimate, rate_interval
from rest_jax.files import Location, as_path, atomic_write, check_output
from rest_jax.models.policy import Policy, check_positions
from rest_jax.rewards.plugin import check_plugin
from rest_jax.rewards.score import PluginScore
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.rollout.scoring import plugin_metrics, score_records, summarise_scores, truncated
from rest_jax.run.load import load_policy, model_files
from rest_jax.run.metrics import (
    METRICS_FILE,
    is_eval,
    is_part,
    read_lines,
    shown_value,
    summary_table,
)
from rest_jax.templates import TEMPLATES
from rest_jax.types import Params, PromptBatch, RolloutBatch, Sampling

# metric -> the field of `Score` that it is the mean of
RATES = {
    "eval/exact": "exact",
    "eval/format": "format_score",
    "eval/spurious": "spurious",
    "eval/accuracy": "accuracy",
    "eval/reward": "reward",
}
# metric -> the field of a sample that it is the mean of
_FIELDS = RATES | {"eval/response_tokens": "response_tokens", "eval/truncated": "truncated"}
# What the intervals of a curve need beside its values; a table has the intervals themselves.
_SPREADS = {"eval/reward_std": "reward", "eval/accuracy_std": "accuracy"}
_FOR_CURVES = (*_SPREADS, "eval/prompts_without_calls")
_YES_OR_NO = ("eval/exact", "eval/format", "eval/spurious", "eval/truncated")


class BenchmarkPrompts(NamedTuple):
    """The items of a public benchmark, with their prompts as token ids."""

    name: str
    items: Sequence[Any]
    prompts: Sequence[np.ndarray]


class _Measured(NamedTuple):
    """What the table of held-out records says of a data set."""

    data: str
    rates: Mapping[str, float]
    ends: Mapping[str, tuple[float | None, float | None]]  # of their intervals


class Examples(NamedTuple):
    """What an evaluation asks: held-out records and benchmarks, one of them at least."""

    records: Prepared | None
    benchmarks: tuple[BenchmarkPrompts, ...] = ()

    @property
    def prompts(self) -> list[np.ndarray]:
        """int32 [T] each: those of the records, then those of the benchmarks."""
        own = self.records.prompts if self.records is not None else []
        return [*own, *(ids for each in self.benchmarks for ids in each.prompts)]

    def summary(self, config: Config) -> str:
        """One line; `config` is that of `held_out`."""
        parts = []
        if self.records is not None:
            parts.append(self.records.summary(config.data.eval_limit, "data.eval_limit"))
        parts += [f"{each.name}: {len(each.items)} items" for each in self.benchmarks]
        return "; ".join(parts)


def describe_data(
    config: Config, records: Prepared, examples: Examples | None
) -> list[tuple[str, str]]:
    """What a run trains on and what it is evaluated on, as fields of its banner."""
    read = records.summary(config.data.train_limit, "data.train_limit")
    return [
        ("train", f"{config.data.train}: {read}"),
        ("held out", examples.summary(config) if examples else "none"),
    ]


def held_out(config: Config, policy: Policy, keep: bool) -> Examples | None:
    """What a run evaluates: its held-out records, tokenised and, if `keep`, kept beside the run, and its benchmarks. None without
    `data.eval` and `evaluation.benchmarks`. UserError when a prompt may outgrow the model.
    """
    data, records = config.data, None
    most = config.rollout.max_response_tokens
    if data.eval is not None:
        records = load_prompts(config, data.eval, data.eval_limit, policy.tokenizer, keep)
        check_positions(policy.config, int(records.prompts.lengths.max()), most)
    benchmarks = []
    for name in config.evaluation.benchmarks:
        items = load(name, str(config.evaluation.data), config.evaluation.limit)
        ids = encode(policy.tokenizer, [item.messages for item in items])
        keys = f"rollout.max_response_tokens, or leave {name} out of evaluation.benchmarks"
        check_positions(policy.config, max(map(len, ids)), most, keys)
        benchmarks.append(BenchmarkPrompts(name, items, ids))
    if records is None and not benchmarks:
        return None
    return Examples(records, tuple(benchmarks))


class Evaluator:
    """Greedy evaluation of any weights on fixed prompts. A resource: it holds the compiled rollout."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        examples: Examples,
        check: Callable[[], None] = lambda: None,
    ):
        """`check` is called between the calls of a rollout; what it raises ends the evaluation."""
        self.policy, self.examples, self.reward = policy, examples, config.reward
        self.template = TEMPLATES[config.data.template].behind(policy.tokenizer.thought_open)
        self._sampler = make_sampler(policy, config.rollout, 1, Sampling(greedy=True))
        self._sampler.between_calls = check
        self._rollout_params = rollout_cast(policy)
        prompts = examples.prompts
        self.size, self.width = len(prompts), bucketed(prompts)

    def __call__(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(the eval/ metrics, one sample a held-out prompt) for training weights. Every process has all of them."""
        rollout = self._sample(self._rollout_params(params))
        records, metrics, samples, start = self.examples.records, {}, [], 0
        if records is not None:
            start = records.size
            metrics, samples = self._score(records, _rows(rollout, 0, start))
        for name, items, prompts in self.examples.benchmarks:
            own = _rows(rollout, start, start + len(prompts))
            lines = score_items(name, items, completions(own, self.policy.tokenizer))
            for score in BENCHMARKS[name].SCORES:
                metrics[f"eval/{name}/{score}"] = float(np.mean([line[score] for line in lines]))
            metrics[f"eval/{name}/items"] = float(len(items))
            start += len(prompts)
        return metrics, samples

    def _score(
        self, data: Prepared, rollout: RolloutBatch
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and samples of the held-out records."""
        tokenizer = self.policy.tokenizer
        _, scores = score_records(rollout, data.records, tokenizer, self.template, self.reward)
        targets = [record.target for record in data.records]
        outcomes = [s.outcome for (s,) in scores if isinstance(s, PluginScore)]
        means = summarise_scores(scores, targets)
        lengths = rollout.response_length[:, 0]
        cut = truncated(rollout, tokenizer.stop_ids)[:, 0]
        metrics = {
            **{metric: means[field] for metric, field in RATES.items()},
            "eval/response_tokens": float(np.mean(lengths)),
            "eval/truncated": float(np.mean(cut)),
            "eval/prompts": float(len(scores)),
            "eval/prompts_without_calls": float(sum(not target.calls for target in targets)),
            **{n: float(np.std([getattr(s, f) for (s,) in scores])) for n, f in _SPREADS.items()},
            **{f"eval/{name}": value for name, value in plugin_metrics(outcomes).items()},
        }
        rows = zip(
            data.records,
            self._prompt_texts,
            rollout.responses[:, 0],
            lengths,
            cut,
            scores,
            strict=True,
        )
        return metrics, [
            {
                "id": record.id,
                "prompt": prompt,
                "gold": gold(record.target),
                "response": tokenizer.text(ids[:length]),
                "response_tokens": int(length),
                "truncated": bool(is_cut),
                **dataclasses.asdict(score),
            }
            for record, prompt, ids, length, is_cut, (score,) in rows
        ]

    @functools.cached_property
    def _prompt_texts(self) -> list[str]:
        """Of the held-out records, once for all evaluations: prompts are much longer than answers."""
        data = self.examples.records
        return [self.policy.tokenizer.text(ids) for ids in data.prompts] if data else []

    def _sample(self, params: Params) -> RolloutBatch:
        """Greedy completions of all."""
        padded = pad(self.examples.prompts, self.width, self.policy.tokenizer.pad_id)
        batch = PromptBatch(*padded, np.arange(self.size, dtype=np.int32))
        return self._sampler.sample_all(params, batch, jax.random.key(0))


def _rows(rollout: RolloutBatch, begin: int, end: int) -> RolloutBatch:
    return jax.tree.map(lambda x: x[begin:end], rollout)


def intervals(
    samples: Sequence[Mapping[str, Any]], records: Sequence[StepRecord]
) -> dict[str, tuple[float | None, float | None]]:
    """The 95 % interval of each metric of these samples of `Evaluator`, one a record: Wilson's of rates, the bootstrap's of other
    means. None where there are too few samples.
    """
    # only prompts that should have no call can have a spurious one
    callless = [s for s, record in zip(samples, records, strict=True) if not record.target.calls]
    found: dict[str, tuple[float | None, float | None]] = {}
    for metric, field in _FIELDS.items():
        counted = callless if metric == "eval/spurious" else samples
        values = [float(sample[field]) for sample in counted]
        found[metric] = None, None
        if metric in _YES_OR_NO and values:
            found[metric] = rate_interval(int(sum(values)), len(values))
        elif len(values) > 1:
            mean = estimate(values)
            found[metric] = mean.low, mean.high
    return found


def evaluate(
    config: Config, data: Sequence[str], limit: int | None = None, output: str | None = None
) -> str:
    """The table of rates of greedy completions, for each data set a row and two of the 95 % intervals: `rest-jax evaluate`.

    `limit` is the number of records read of each data set, `output` the JSONL file for the scored completions, which
    appears once all are written. Of many processes the first has the table and writes the file. UserError for a model or
    data that cannot be used.
    """
    check_plugin(config.reward)
    if output is not None:
        check_output(output, [*data, *model_files(config.model.source)])
    sets = {spec: load_split(spec, config.data, limit) for spec in data}
    policy = load_policy(config.model, config.mesh, config.rollout.tensor)
    template = TEMPLATES[config.data.template]
    tokenised = {
        spec: prepare(records, policy.tokenizer, template, config.data)
        for spec, records in sets.items()
    }
    for prepared in tokenised.values():
        longest = int(prepared.prompts.lengths.max())
        check_positions(policy.config, longest, config.rollout.max_response_tokens)
    measured: list[_Measured] = []
    with contextlib.ExitStack() as stack:
        file = None
        # Opened first: a folder that is missing is known before hours of sampling.
        if output is not None and is_first_process():
            partial = stack.enter_context(atomic_write(output))
            file = stack.enter_context(partial.open("w", encoding="utf-8"))
        for spec, prepared in tokenised.items():
            say(f"{spec}: {prepared.summary(limit, '--limit')}")
            rates, scored = Evaluator(config, policy, Examples(prepared))(policy.params)
            rates = {name: value for name, value in rates.items() if name not in _FOR_CURVES}
            measured.append(_Measured(spec, rates, intervals(scored, prepared.records)))
            if file is not None:
                file.writelines(json.dumps({"data": spec, **line}) + "\n" for line in scored)
    return _table(measured) if is_first_process() else ""


def _table(measured: Sequence[_Measured]) -> str:
    """Each data set in a row, and the ends of its intervals in two."""
    # A plug-in may name other parts for each set; one that has none of a part has 0 of it.
    zeros = {name: 0.0 for each in measured for name in each.rates if is_part(name)}
    names = [*(name for name in measured[0].rates if name not in zeros), *sorted(zeros)]
    rows: list[list[Any]] = [["data", *(name.removeprefix("eval/") for name in names)]]
    for spec, rates, ends in measured:
        values = {**zeros, **rates}
        rows.append([spec, *(shown_value(name, values[name]) for name in names)])
        for i, end in enumerate(("95 % from", "95 % to")):
            rows.append([end, *(shown_value(n, ends.get(n, (None, None))[i]) for n in names)])
    return summary_table(rows)


def evaluations(folder: Location) -> list[dict[str, Any]]:
    """The metrics lines of a run's held-out evaluations, in order. UserError when it has no metrics."""
    return [line for line in read_lines(as_path(folder) / METRICS_FILE) if any(map(is_eval, line))]
