"""A step's experience: rollouts, scored on the host while the device decodes others.

    Collector.collect(params, state, step) -> Experience

The sampler tells of every prompt whose G responses are complete; a thread parses, rewards and labels them at once, so that
when the last response ends, little is left to wait for. Scores do not depend on when they are computed.
"""

import concurrent.futures
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from rest_jax.config import Config
from rest_jax.data.loader import Loader
from rest_jax.data.records import StepRecord
from rest_jax.distributed import gather
from rest_jax.models.load import Policy
from rest_jax.rewards import Score
from rest_jax.rl.step import BatchLengths
from rest_jax.rollout.scheduler import SamplerStats, policy_sampler
from rest_jax.rollout.scoring import score_rollout
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target
from rest_jax.types import Params, PromptBatch, RolloutBatch, Sampling, ScoredBatch


@dataclasses.dataclass
class Experience:
    """What one step trains on; NumPy rows of this process."""

    scored: ScoredBatch
    scores: list[list[Score]]
    records: list[StepRecord]
    loader_state: dict[str, Any]  # after this batch
    progress: float  # of the reward scale
    staleness: int  # updates between the policy that sampled and the one that trains on it
    stats: SamplerStats
    seconds: dict[
        str, float
    ]  # data: waiting for the loader; score: at work; score_wait: waited for

    @property
    def targets(self) -> list[Target]:
        """The gold answers."""
        return [record.target for record in self.records]


class Collector:
    """Samples and scores. A resource: it holds the compiled sampler and two threads."""

    def __init__(self, config: Config, policy: Policy, batches: Loader[PromptBatch], steps: int):
        r = config.rollout
        sampling = Sampling(r.temperature, r.top_k, r.top_p)
        self.config, self.policy, self.batches, self.steps = config, policy, batches, steps
        self.sampler = policy_sampler(policy, r.group_size, r.max_response_tokens, sampling, r)
        self.template = TEMPLATES[config.data.template]
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "score")

    def collect(self, params: Params, rng: jax.Array, step: int, staleness: int = 0) -> Experience:
        """The experience of step `step` (from 0), sampled with `params` (rollout layout) and the run's key."""
        begun = time.monotonic()
        with jax.profiler.TraceAnnotation("data"):
            batch, records = next(self.batches)
        loaded = time.monotonic()
        progress = min(1.0, step / (self.config.reward.progress_steps or self.steps))
        pending: dict[int, concurrent.futures.Future] = {}

        def on_group(prompt: int, rows: RolloutBatch) -> None:
            target = records[prompt].target
            pending[prompt] = self.pool.submit(self._score, rows, target, progress)

        with jax.profiler.TraceAnnotation("rollout"):
            rollout = self.sampler(params, batch, rng, step, on_group).validate()
        sampled = time.monotonic()
        with jax.profiler.TraceAnnotation("score"):
            parts = [pending[prompt].result() for prompt in range(len(records))]
        return Experience(
            scored=_join(rollout, [part for part, _, _ in parts]),
            scores=[scores for _, scores, _ in parts],
            records=records,
            loader_state=self.batches.get_state(),
            progress=progress,
            staleness=staleness,
            stats=self.sampler.stats,
            seconds={
                "time/data": loaded - begun,
                "time/rollout": sampled - loaded,
                "time/score": sum(seconds for _, _, seconds in parts),
                "time/score_wait": time.monotonic() - sampled,
            },
        )

    def _score(
        self, rows: RolloutBatch, target: Target, progress: float
    ) -> tuple[ScoredBatch, list[Score], float]:
        begun = time.monotonic()
        with jax.profiler.TraceAnnotation("reward"):
            scored, (scores,) = score_rollout(
                rows, [target], self.policy.tokenizer, self.template, self.config.reward, progress
            )
        return scored, scores, time.monotonic() - begun

    def close(self) -> None:
        """Ends the thread."""
        self.pool.shutdown()


def gather_lengths(scored: ScoredBatch) -> BatchLengths:
    """Of the batch of all processes."""
    own = BatchLengths.of(scored)
    arrays = gather((own.prompt_length, own.response_length, own.reward))
    return BatchLengths(*arrays, widths=own.widths)


def _join(rollout: RolloutBatch, parts: list[ScoredBatch]) -> ScoredBatch:
    def rows(field: str) -> Any:
        return np.concatenate([getattr(part, field) for part in parts])

    return ScoredBatch(
        rollout, rows("region"), reward=rows("reward"), format_score=rows("format_score")
    ).validate()
