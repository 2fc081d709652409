"""Held-out evaluation: greedy completions of prepared prompts, scored like training but at the final reward scale.

Rates: format (S_format), exact (format and all calls equal gold as multisets; for gold without calls, none made), spurious
(a call among prompts that should have none), accuracy (mean S_acc).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rest_jax.config import Config
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.tokenize import load_split, prepare
from rest_jax.distributed import gather, is_first_process
from rest_jax.models.load import Policy
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.rollout.scoring import score_rollout, summarise_scores, truncated
from rest_jax.run.metrics import METRICS_FILE, read_lines, summary_table
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target
from rest_jax.types import Params, PromptBatch, RolloutBatch, Sampling, TrainState

# metric -> the field of `Score` that it is the mean of
RATES = {
    "eval/exact": "exact",
    "eval/format": "format_score",
    "eval/spurious": "spurious",
    "eval/accuracy": "accuracy",
    "eval/reward": "reward",
}


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """One held-out prompt: its ids, its gold answer, its record's id."""

    prompt: np.ndarray  # int32 [T]
    target: Target
    id: str


def held_out(config: Config, policy: Policy) -> list[EvalExample]:
    """The held-out prompts; empty without `data.eval`."""
    if config.data.eval is None:
        return []
    records = load_split(config.data.eval, config.data, config.data.eval_limit)
    prepared = prepare(records, policy.tokenizer, TEMPLATES[config.data.template], config.data)
    pairs = zip(prepared.prompts, prepared.records, strict=True)
    return [EvalExample(prompt, record.target, record.id) for prompt, record in pairs]


class Evaluator:
    """Greedy evaluation of any weights on fixed prompts. A resource: it holds the compiled rollout."""

    def __init__(self, config: Config, policy: Policy, examples: Sequence[EvalExample]):
        self.policy, self.examples, self.reward = policy, examples, config.reward
        self.template = TEMPLATES[config.data.template]
        self._sampler = make_sampler(policy, config.rollout, 1, Sampling(greedy=True))
        self._width = bucketed([example.prompt for example in examples])

    @classmethod
    def of(
        cls, config: Config, policy: Policy, examples: Sequence[EvalExample]
    ) -> "Evaluator | None":
        """The evaluator of a run; None without held-out prompts."""
        return cls(config, policy, examples) if examples else None

    def __call__(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(the eval/ metrics, one sample a prompt) for weights in the rollout layout. Every process evaluates every prompt."""
        rollout = self._sample(params)
        targets, tokenizer = [example.target for example in self.examples], self.policy.tokenizer
        _, scores = score_rollout(rollout, targets, tokenizer, self.template, self.reward, 1.0)
        means = summarise_scores(scores, targets)
        metrics = {
            **{metric: means[field] for metric, field in RATES.items()},
            "eval/response_tokens": float(np.mean(rollout.response_length)),
            "eval/truncated": truncated(rollout, tokenizer.stop_ids),
            "eval/prompts": float(len(scores)),
        }
        rows = zip(self.examples, rollout.responses, rollout.response_length, scores, strict=True)
        return metrics, [
            {
                "id": example.id,
                "response": tokenizer.text(ids[0, : length[0]]),
                **dataclasses.asdict(score),
            }
            for example, ids, length, (score,) in rows
        ]

    def _sample(self, params: Params) -> RolloutBatch:
        """Greedy completions of all; each process samples its share and gets the others'."""
        examples = self.examples
        share = -(-len(examples) // jax.process_count())
        rows = np.minimum(np.arange(share * jax.process_count()), len(examples) - 1)
        own = rows[jax.process_index() * share :][:share]
        prompts = [examples[i].prompt for i in own]
        tokens, length = pad(prompts, self._width, self.policy.tokenizer.pad_id)
        batch = PromptBatch(tokens=tokens, length=length, row=own.astype(np.int32))
        out = self._sampler(params, batch, jax.random.key(0), 0)
        return jax.tree.map(lambda x: x[: len(examples)], gather(out))


def evaluation(
    evaluator: "Evaluator | None", rollout_params: Callable[[Params], Params]
) -> Callable[[TrainState], tuple[dict[str, float], list[dict[str, Any]]]] | None:
    """What `run.loop.Loop` calls with a train state; None without held-out prompts."""
    if evaluator is None:
        return None
    return functools.partial(_evaluate_state, evaluator, rollout_params)


def _evaluate_state(evaluator: "Evaluator", rollout_params, state: TrainState):
    return evaluator(rollout_params(state.params))


def evaluations(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics lines of a run's held-out evaluations, in order. UserError when it has no metrics."""
    return [line for line in read_lines(folder / METRICS_FILE) if "eval/exact" in line]


def report_evaluations(folder: pathlib.Path) -> None:
    """Prints the table of the first and the last evaluation of a run, and draws its curves."""
    if not is_first_process():
        return
    # matplotlib takes a second to import, which the start of a run need not wait for
    from rest_jax.analysis.curves import write_curves

    lines = evaluations(folder)
    if lines:
        # a run without an evaluation at its start may have one alone
        ends = lines[:1] + lines[1:][-1:]
        rows: list[list[Any]] = [["held out", *(f"step {line['step']}" for line in ends)]]
        for name in (*RATES, "eval/response_tokens"):
            rows.append([name, *(line[name] for line in ends)])
        print(summary_table(rows))
    print(f"curves: {write_curves(folder)}", flush=True)
