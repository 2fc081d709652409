"""EvalExample-out evaluation: greedy answers to prepared prompts, scored like training but at the final reward scale.

Rates: format (S_format), exact (format and all calls equal gold as multisets; for gold without calls, none made), spurious
(a call among prompts that should have none), accuracy (mean S_acc).
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rest_jax.config import Config, RewardConfig, RolloutConfig
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.tokenize import load_split, prepare
from rest_jax.distributed import gather, is_first_process
from rest_jax.models.load import Policy
from rest_jax.rewards import Score
from rest_jax.rollout.scheduler import policy_sampler
from rest_jax.rollout.scoring import score_rollout
from rest_jax.run.folder import Run
from rest_jax.run.metrics import METRICS_FILE, read_lines, summary_table
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target
from rest_jax.types import Params, PromptBatch, RolloutBatch, Sampling

SAMPLES_SHOWN = 8
TABLE = (
    "eval/exact",
    "eval/format",
    "eval/spurious",
    "eval/accuracy",
    "eval/reward",
    "eval/response_tokens",
)


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

    def __init__(
        self,
        policy: Policy,
        held: Sequence[EvalExample],
        template: str,
        reward: RewardConfig,
        rollout: RolloutConfig,
    ):
        self.policy, self.held, self.reward = policy, held, reward
        self.template = TEMPLATES[template]
        greedy = Sampling(greedy=True)
        self._sampler = policy_sampler(policy, 1, rollout.max_response_tokens, greedy, rollout)
        self._width = bucketed([h.prompt for h in held])

    @classmethod
    def of(cls, config: Config, policy: Policy, held: Sequence[EvalExample]) -> "Evaluator | None":
        """The evaluator of a run; None without held-out prompts."""
        if not held:
            return None
        return cls(policy, held, config.data.template, config.reward, config.rollout)

    def record(self, run: Run, step: int, params: Params) -> str:
        """Evaluates, writes the metrics line and a few samples, and returns one line for the user."""
        started = time.monotonic()
        values, samples = self(params)
        shown = [{"split": "eval", **s} for s in samples[:SAMPLES_SHOWN]]
        run.write(step, values | {"time/eval": time.monotonic() - started}, shown)
        return (
            f"held out at step {step}: exact {values['eval/exact']:.1%}, format {values['eval/format']:.1%}, "
            f"spurious {values['eval/spurious']:.1%}, reward {values['eval/reward']:.3f}"
        )

    def __call__(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(metrics, one sample a prompt) for weights in the rollout layout. Every process evaluates every prompt."""
        rollout = self._sample(params)
        targets, tokenizer = [h.target for h in self.held], self.policy.tokenizer
        _, found = score_rollout(rollout, targets, tokenizer, self.template, self.reward, 1.0)
        scores = [score for (score,) in found]
        lengths = rollout.response_length[:, 0].tolist()
        answers = [row[0, :n] for row, n in zip(rollout.responses, lengths, strict=True)]
        cut = sum(int(ids[-1]) not in tokenizer.stop_ids for ids in answers)
        samples = [
            {"id": h.id, "response": tokenizer.text(ids), **dataclasses.asdict(score)}
            for h, ids, score in zip(self.held, answers, scores, strict=True)
        ]
        return summarise(scores, targets, lengths, cut), samples

    def _sample(self, params: Params) -> RolloutBatch:
        """Greedy answers to all; each process samples its share and gets the others'."""
        share = -(-len(self.held) // jax.process_count())
        rows = np.minimum(np.arange(share * jax.process_count()), len(self.held) - 1)
        own = rows[jax.process_index() * share :][:share]
        tokens, length = pad(
            [self.held[i].prompt for i in own], self._width, self.policy.tokenizer.pad_id
        )
        batch = PromptBatch(tokens=tokens, length=length, row=own.astype(np.int32))
        out = self._sampler(params, batch, jax.random.key(0), 0)
        return jax.tree.map(lambda x: x[: len(self.held)], gather(out))


def summarise(
    scores: Sequence[Score], targets: Sequence[Target], lengths: Sequence[int], cut: int
) -> dict[str, float]:
    """The eval/ metrics. Without prompts that should have no call, the spurious rate is 0."""
    without = [s.spurious for s, t in zip(scores, targets, strict=True) if not t.calls]
    return {
        "eval/reward": float(np.mean([s.reward for s in scores])),
        "eval/format": float(np.mean([s.format_score for s in scores])),
        "eval/exact": float(np.mean([s.exact for s in scores])),
        "eval/spurious": float(np.mean(without)) if without else 0.0,
        "eval/accuracy": float(np.mean([s.accuracy for s in scores])),
        "eval/response_tokens": float(np.mean(lengths)),
        "eval/truncated": cut / len(scores),
        "eval/prompts": float(len(scores)),
    }


def evaluations(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics lines of a run's held-out evaluations, in order. UserError when it has no metrics."""
    return [line for line in read_lines(folder / METRICS_FILE) if "eval/exact" in line]


def report_evaluations(folder: pathlib.Path) -> None:
    """Prints the table of the first and the last evaluation of a run (one column when there is one), and writes its curves."""
    if not is_first_process():
        return
    from rest_jax.analysis.curves import write_curves

    lines = evaluations(folder)
    if lines:
        shown = [lines[0], lines[-1]][: len(lines)]
        rows = [["held out", *(f"step {line['step']}" for line in shown)]]
        print(summary_table(rows + [[name, *(line[name] for line in shown)] for name in TABLE]))
    print(f"curves: {write_curves(folder)}", flush=True)
