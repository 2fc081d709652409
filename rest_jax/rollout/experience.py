"""A step's experience: completions sampled on the device, scored on the host while the device decodes others.

    Collector.collect(params, rng, step) -> Experience

The sampler reports every prompt whose G completions are done; a thread parses, rewards and labels them at once, so that
little is left to wait for when the last one ends. Scores do not depend on when they are computed.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rest_jax.config import Config
from rest_jax.data.loader import Loader
from rest_jax.data.records import StepRecord, to_json
from rest_jax.data.tokenize import Prepared
from rest_jax.distributed import gather, local_shards, rows_of_shards
from rest_jax.models.policy import Policy
from rest_jax.rewards.plugin import open_plugin
from rest_jax.rewards.score import Outcome, Score
from rest_jax.rl.prepare import has_advantage
from rest_jax.rl.rules import find_phrases
from rest_jax.rollout.scheduler import SamplerStats, make_sampler, rows_of_group
from rest_jax.rollout.scoring import (
    Scoring,
    begin_scoring,
    plugin_metrics,
    share_outcomes,
    summarise_scores,
    truncated,
)
from rest_jax.run.checkpoint import AHEAD
from rest_jax.templates import TEMPLATES
from rest_jax.types import Params, PromptBatch, RolloutBatch, Routes, Sampling, ScoredBatch

# Fields of `Score` whose means are metrics of the step.
REWARD_MEANS = ("format_part", "correctness_part", "accuracy", "exact", "spurious")


class Sampled(NamedTuple):
    """All N groups that a step has sampled, with those that it does not train on; NumPy, of all processes."""

    prompt_length: np.ndarray  # int32 [N]
    response_length: np.ndarray  # int32 [N, G]
    exact: np.ndarray  # bool [N, G]

    def metrics(self) -> dict[str, float]:
        """Under their names."""
        return {
            "rollout/tokens": int(np.sum(self.response_length)),
            "rollout/groups_sampled": len(self.prompt_length),
            "reward/exact_sampled": float(np.mean(self.exact)),
        }


@dataclasses.dataclass
class Experience:
    """What one step trains on; NumPy rows of this process."""

    scored: ScoredBatch
    scores: list[list[Score]]  # [P][G]
    records: list[StepRecord]
    row: np.ndarray  # int32 [P], as in PromptBatch
    draw: np.ndarray  # int32 [P]: which of the batches that the step took from the data has the prompt; 0 is the first
    outcomes: dict[int, list[Outcome]]  # of a plug-in, by row of the global batch
    progress: float  # of the reward scale
    stats: SamplerStats
    # Of the stages, under their metric names. data: waiting for the loader; score: at work; score_wait: waited for.
    seconds: dict[str, float]
    staleness: int = 0  # updates between the policy that sampled and the one that trains on it
    # of rewards and lengths, over the global batch
    means: dict[str, float] = dataclasses.field(default_factory=dict)
    sampled: Sampled | None = None  # None: what it trains on

    def arrays(self) -> dict[str, np.ndarray]:
        """All that is known of the batch, to be saved when its step fails or a checkpoint comes before it."""
        rollout = vars(self.scored.rollout) | {"draw": self.draw}
        routes = rollout.pop("routes")
        if routes is not None:
            rollout |= {f"routes_{name}": x for name, x in vars(routes).items()}
        return rollout | {"region": self.scored.region, "reward": self.scored.reward}

    def metrics(self) -> dict[str, float]:
        """Rewards and lengths of the global batch, timings of this process."""
        return (
            self.means
            | (self.sampled.metrics() if self.sampled else {})
            | self.seconds
            | {
                "reward/progress": self.progress,
                "rollout/decode_slot_utilisation": self.stats.utilisation,
                "rollout/staleness": self.staleness,
            }
        )

    def replace(self, places: np.ndarray, others: "Experience") -> "Experience":
        """This one with `others` in the places int [n] of its groups, and the costs of both."""

        def put(own: Any, other: Any) -> Any:
            own = np.array(own)
            own[places] = other
            return own

        scores, records = list(self.scores), list(self.records)
        for i, place in enumerate(places):
            scores[place], records[place] = others.scores[i], others.records[i]
        return dataclasses.replace(
            self,
            scored=jax.tree.map(put, self.scored, others.scored) if len(places) else self.scored,
            scores=scores,
            records=records,
            row=put(self.row, others.row),
            draw=put(self.draw, others.draw),
            outcomes=self.outcomes | others.outcomes,
            stats=self.stats + others.stats,
            seconds={name: x + others.seconds[name] for name, x in self.seconds.items()},
        )


class Collector:
    """Samples and scores the batches of a run. A resource: it holds the compiled sampler, a thread, and the workers of a
    plug-in.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        prompts: Prepared,
        steps: int,
        check: Callable[[], None] = lambda: None,
    ):
        """`check` is called between the calls of a rollout and behind it; what it raises ends it."""
        r, mesh = config.rollout, policy.rollout_mesh
        self.config, self.policy, self.steps = config, policy, steps
        sampling = Sampling(r.temperature, r.top_k, r.top_p)
        self.sampler = make_sampler(policy, r, r.group_size, sampling, r.replay_routing)
        self.check = self.sampler.between_calls = check
        self.template = TEMPLATES[config.data.template].behind(policy.tokenizer.thought_open)
        self.phrases = find_phrases(config)
        self.plugin = open_plugin(config.reward)
        self.rows = rows_of_shards(r.prompts_per_step, local_shards(mesh), mesh)
        self.batches = Loader(
            prompts,
            PromptBatch,
            batch=r.prompts_per_step,
            seed=config.seed,
            pad_id=policy.tokenizer.pad_id,
            cfg=config.data,
            num_steps=steps * (1 + r.dynamic_sampling),
            rows=self.rows,
        )
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "score")
        self.position = self.batches.get_state()  # behind the batch collected last
        self.ahead: Experience | None = None  # of the next step, under staleness
        self.saved: dict[str, Any] | None = None  # the same, as a checkpoint has it

    def resume(self, loader_state: dict[str, Any]) -> None:
        """Moves to where a snapshot was taken, or to the start of the data."""
        self.saved, self.ahead = loader_state.pop(AHEAD, None), None
        self.batches.set_state(loader_state)

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """What makes the state that `resume` takes: the position of the data behind the batch collected last, and under AHEAD
        arrays of what was sampled behind it, of all processes, which must all call it.
        """
        return functools.partial(self._state, self.position, self.ahead)

    def _state(self, position: dict[str, Any], ahead: Experience | None) -> dict[str, Any]:
        if ahead is None:
            return position
        rows = gather(ahead.arrays(), self.policy.rollout_mesh)
        measured: dict[str, Any] = {"stats": vars(ahead.stats), "seconds": ahead.seconds}
        if ahead.sampled is not None:
            measured["sampled"] = ahead.sampled._asdict()
        return position | {AHEAD: {"rows": rows, **jax.tree.map(np.asarray, measured)}}

    def collect(self, params: Params, rng: jax.Array, step: int) -> Experience:
        """The experience of step `step` (from 1), with weights in the rollout layout and the run's key.

        With `rollout.staleness` 1 it was sampled a step ahead, and the next step's is sampled now.
        """
        experience = self.ahead or self._sample(params, rng, step, int(self.saved is not None))
        self.position, self.ahead = self.batches.get_state(), None
        if self.config.rollout.staleness == 1 and step < self.steps:
            self.ahead = self._sample(params, rng, step + 1, staleness=1)
        return experience

    def _sample(self, params: Params, rng: jax.Array, step: int, staleness: int) -> Experience:
        """Samples and scores the next batch; one that a checkpoint has is not sampled again, but scored."""
        saved, self.saved = self.saved, None
        progress = min(1.0, (step - 1) / (self.config.reward.progress_steps or self.steps))
        if saved is not None:
            experience = self._read(saved, progress)
        else:
            draw = functools.partial(self._draw, params, rng, step - 1, progress)
            experience = draw(0)
            if self.config.rollout.dynamic_sampling:
                experience = self._replace_equal(experience, draw)
        experience.staleness, experience.means = staleness, self._means(experience)
        return experience

    def _replace_equal(self, experience: Experience, draw: Callable[..., Experience]) -> Experience:
        """Dynamic sampling: groups without advantage make room for those that have their places in the next batch of the data,
        until none is left or the bound is reached.
        """
        mesh, sampled = self.policy.rollout_mesh, []
        equal = np.ones(len(self.rows), bool)
        for number in range(1, self.config.rollout.dynamic_sampling + 2):
            rollout = experience.scored.rollout
            known = rollout.prompt_length, rollout.response_length, experience.scored.exact, equal
            *fields, new = gather(known, mesh)
            sampled.append([np.asarray(x)[new] for x in fields])
            equal = ~np.asarray(has_advantage(experience.scored, self.config.loss))
            if number > self.config.rollout.dynamic_sampling or not gather(equal, mesh).any():
                break
            experience = experience.replace(np.flatnonzero(equal), draw(number, equal))
        fields = (np.concatenate(x) for x in zip(*sampled, strict=True))
        return dataclasses.replace(experience, sampled=Sampled(*fields))

    def _draw(
        self,
        params: Params,
        rng: jax.Array,
        step: int,
        progress: float,
        number: int,
        wanted: np.ndarray | None = None,
    ) -> Experience:
        """The groups of the next batch of the data, which is the `number`th of its step: those in the places bool [P] `wanted`,
        by default all.
        """
        started = time.monotonic()
        with jax.profiler.TraceAnnotation("data"):
            batch, records = next(self.batches)
        loaded = time.monotonic()
        pending = {}
        if self.plugin is not None:
            self.plugin.begin()

        def on_group(prompt: int, rows: RolloutBatch) -> None:
            pending[prompt] = self.pool.submit(self._score, rows, records[prompt], progress)

        with jax.profiler.TraceAnnotation("rollout"):
            rollout = self.sampler(params, batch, rng, step, on_group, wanted=wanted).validate()
        sampled = time.monotonic()
        self.check()
        places = np.arange(len(records))
        if wanted is not None:
            places = np.flatnonzero(wanted)
            rollout = jax.tree.map(lambda x: x[places], rollout)
        return self._finish(
            pending,
            rollout,
            places,
            records=[records[place] for place in places],
            row=batch.row[places],
            draw=np.full(len(places), number, np.int32),
            progress=progress,
            stats=self.sampler.stats,
            seconds={"time/data": loaded - started, "time/rollout": sampled - loaded},
        )

    def _read(self, saved: dict[str, Any], progress: float) -> Experience:
        """What a checkpoint has of the groups of a step, scored anew."""
        rollout = read_rollout(saved["rows"], self.rows)
        draw = saved["rows"].get("draw", np.zeros(self.config.rollout.prompts_per_step, np.int32))
        taken = [next(self.batches) for _ in range(int(draw.max()) + 1)]
        draw = draw[self.rows]
        records = [taken[number][1][place] for place, number in enumerate(draw)]
        if self.plugin is not None:
            self.plugin.begin()
        pending = {
            place: self.pool.submit(self._score, rows_of_group(rollout, place), record, progress)
            for place, record in enumerate(records)
        }
        experience = self._finish(
            pending,
            rollout,
            np.arange(len(records)),
            records=records,
            row=np.stack([batch.row for batch, _ in taken])[draw, np.arange(len(records))],
            draw=draw,
            progress=progress,
            stats=SamplerStats(**{name: int(x) for name, x in saved["stats"].items()}),
            seconds={},
        )
        experience.seconds = {name: float(x) for name, x in saved["seconds"].items()}
        if "sampled" in saved:
            experience.sampled = Sampled(**saved["sampled"])
        return experience

    def _finish(
        self,
        pending: dict[int, concurrent.futures.Future],
        rollout: RolloutBatch,
        places: np.ndarray,
        **known: Any,
    ) -> Experience:
        """Waits for the scores of the groups of a rollout, whose places in the batch are int [n]; `known` is the rest."""
        started = time.monotonic()
        with jax.profiler.TraceAnnotation("score"):
            read = [pending[place].result() for place in places]
            rows, outcomes = self.rows[places].tolist(), {}
            if self.plugin is not None:
                asked = {row: asked for row, (_, asked, _) in zip(rows, read, strict=True)}
                outcomes = share_outcomes(asked)
            parts = [
                scoring.finish(outcomes.get(row))
                for row, (scoring, _, _) in zip(rows, read, strict=True)
            ]
        known["seconds"] |= {
            "time/score": sum(seconds for _, _, seconds in read),
            "time/score_wait": time.monotonic() - started,
        }
        return Experience(
            scored=_join(rollout, [part for part, _ in parts]),
            scores=[scores for _, (scores,) in parts],
            outcomes=outcomes,
            **known,
        )

    def _means(self, experience: Experience) -> dict[str, float]:
        """Of the batch of all processes. It is asked for here, since later the devices are busy with the update."""
        mesh, stop_ids = self.policy.rollout_mesh, self.policy.tokenizer.stop_ids
        rollout, targets = experience.scored.rollout, [x.target for x in experience.records]
        rewards = summarise_scores(experience.scores, targets, mesh)
        lengths, cut = gather(
            (np.asarray(rollout.response_length), truncated(rollout, stop_ids)), mesh
        )
        of_plugin = plugin_metrics(list(itertools.chain(*experience.outcomes.values())))
        return (
            {f"reward/{name}": rewards[name] for name in REWARD_MEANS}
            | {f"reward/{name}": value for name, value in of_plugin.items()}
            | {
                "rollout/truncated": float(np.mean(cut)),
                "rollout/tokens": int(np.sum(lengths)),
            }
        )

    def _score(
        self, rows: RolloutBatch, record: StepRecord, progress: float
    ) -> tuple[Scoring, Sequence[concurrent.futures.Future[Outcome]], float]:
        """A group as it is read, what a plug-in was asked about it, and the seconds of all but its answers."""
        started = time.monotonic()
        with jax.profiler.TraceAnnotation("reward"):
            known = self.policy.tokenizer, self.template, self.config.reward
            scoring = begin_scoring(rows, [record.target], *known, progress, self.phrases)
            asked = []
            if self.plugin is not None:
                asked = self.plugin.ask(to_json(record), scoring.answers, scoring.texts)
        return scoring, asked, time.monotonic() - started

    def close(self) -> None:
        """Ends the thread and the workers."""
        self.pool.shutdown(cancel_futures=True)
        if self.plugin is not None:
            self.plugin.close()


def read_rollout(arrays: dict[str, np.ndarray], rows: np.ndarray) -> RolloutBatch:
    """The rollout of `Experience.arrays`: these rows of those of the global batch."""
    own = {name: np.asarray(x)[rows] for name, x in arrays.items()}
    routes = {name.removeprefix("routes_"): x for name, x in own.items() if "routes_" in name}
    fields = {f.name: own[f.name] for f in dataclasses.fields(RolloutBatch) if f.name in own}
    return RolloutBatch(**fields, routes=Routes(**routes) if routes else None).validate()


def _join(rollout: RolloutBatch, parts: list[ScoredBatch]) -> Any:
    """None of no groups."""
    if not parts:
        return None

    def rows(field: str) -> Any:
        values = [getattr(part, field) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    names = [f.name for f in dataclasses.fields(ScoredBatch) if f.name != "rollout"]
    return ScoredBatch(rollout, **{name: rows(name) for name in names}).validate()
