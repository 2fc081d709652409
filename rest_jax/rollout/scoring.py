"""From sampled ids to rewards and regions, on the host: ids -> bytes -> parse -> score and region
labels.

In: a `RolloutBatch` of NumPy arrays and one `Target` a prompt. Out: the `ScoredBatch` and a `Score`
for every response. Text is derived from the ids, never the reverse; one parse serves the reward and
the regions.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rest_jax.config import RewardConfig
from rest_jax.data.records import StepRecord, to_json
from rest_jax.distributed import exchange, gather
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rewards.plugin import open_plugin
from rest_jax.rewards.score import PARTS, Outcome, Score, add_plugin, score
from rest_jax.rl.regions import label_tokens, mark_phrases
from rest_jax.templates import Template
from rest_jax.tool_calls import Answer, Target
from rest_jax.types import RolloutBatch, ScoredBatch

_TIMEOUT = 6 * 3600  # seconds in which a plug-in has answered


class Scoring(NamedTuple):
    """Completions that are read and scored by the rules; `finish` adds what a plug-in makes of them."""

    batch: ScoredBatch
    scores: list[Score]  # P x G, as the next two
    answers: list[Answer]
    texts: list[bytes]

    def finish(
        self, outcomes: Sequence[Outcome] | None = None
    ) -> tuple[ScoredBatch, list[list[Score]]]:
        """The batch (NumPy, validated) and the scores, [P][G]. `outcomes`: P x G, None without a plug-in."""
        scores: list[Score] = self.scores
        if outcomes is not None:
            pairs = zip(scores, outcomes, strict=True)
            scores = [add_plugin(score, outcome) for score, outcome in pairs]
        prompts, group = self.batch.rollout.response_length.shape

        def field(name: str) -> np.ndarray:
            values = [getattr(s, name) for s in scores]
            return np.array(values, np.float32).reshape(prompts, group)

        batch = dataclasses.replace(
            self.batch,
            reward=field("reward"),
            format_score=field("format_score"),
            parts=np.stack([field(name) for name in PARTS], axis=-1),
            exact=field("exact") > 0,
        )
        return batch.validate(), [scores[p * group : (p + 1) * group] for p in range(prompts)]


def begin_scoring(
    rollout: RolloutBatch,
    targets: Sequence[Target],
    tokenizer: Tokenizer,
    template: Template,
    cfg: RewardConfig,
    progress: float,
    phrases: Sequence[str] = (),
) -> Scoring:
    """Scores and labels every response at reward progress `progress` in [0, 1], and marks the tokens of `phrases` if there
    are any.

    The text of a response is the bytes of its ids before a final stop id, which is the end-of-turn
    token. A response that never stops is parsed as it is. ValueError when the number of targets is
    not that of the prompts, or an id is outside the vocabulary.
    """
    prompts, group, width = rollout.responses.shape
    if len(targets) != prompts:
        raise ValueError(f"score_rollout: {len(targets)} targets for {prompts} prompts")
    ids = np.asarray(rollout.responses).reshape(prompts * group, width)
    length = np.asarray(rollout.response_length).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < len(tokenizer.piece_lengths):
        raise ValueError(
            f"score_rollout: ids {ids.min()} to {ids.max()} for a vocabulary of {len(tokenizer.piece_lengths)}"
        )
    has_stop = _ends_with_stop(ids, length, tokenizer.stop_ids)
    text_length = length - has_stop
    texts = [
        tokenizer.bytes_of(row[:n])
        for row, n in zip(ids.tolist(), text_length.tolist(), strict=True)
    ]
    answers = [template.parse(text) for text in texts]
    token_bytes = tokenizer.piece_lengths[ids]
    region = label_tokens(answers, token_bytes, text_length, has_stop)
    gold = [target for target in targets for _ in range(group)]
    scores = [
        score(answer, target, template.name, cfg, progress, n)
        for answer, target, n in zip(answers, gold, length.tolist(), strict=True)
    ]
    marked: Any = None
    if phrases:
        marked = mark_phrases(texts, token_bytes, phrases).reshape(rollout.responses.shape)
    nothing: Any = np.zeros((prompts, group), np.float32)
    batch = ScoredBatch(
        rollout=rollout,
        region=region.reshape(prompts, group, width),  # type: ignore[arg-type]
        reward=nothing,
        format_score=nothing,
        parts=nothing[..., None],
        exact=nothing > 0,
        marked=marked,
    )
    return Scoring(batch, scores, answers, texts)


def score_rollout(*args: Any) -> tuple[ScoredBatch, list[list[Score]]]:
    """The batch and the scores of `begin_scoring`, without a plug-in."""
    return begin_scoring(*args).finish()


def score_records(
    rollout: RolloutBatch,
    records: Sequence[StepRecord],
    tokenizer: Tokenizer,
    template: Template,
    cfg: RewardConfig,
    phrases: Sequence[str] = (),
) -> tuple[ScoredBatch, list[list[Score]]]:
    """Those of completions that every process has, at the final reward scale, with the plug-in of the config. Every process
    must call it: each asks the plug-in about its share.
    """
    targets = [record.target for record in records]
    scoring = begin_scoring(rollout, targets, tokenizer, template, cfg, 1.0, phrases)
    if (plugin := open_plugin(cfg)) is None:
        return scoring.finish()
    group, asked = rollout.responses.shape[1], {}
    with contextlib.closing(plugin):
        for i in range(jax.process_index(), len(records), jax.process_count()):
            own = slice(i * group, (i + 1) * group)
            said = to_json(records[i]), scoring.answers[own], scoring.texts[own]
            asked[i] = plugin.ask(*said)
        outcomes = share_outcomes(asked)
    return scoring.finish([x for i in range(len(records)) for x in outcomes[i]])


def share_outcomes(asked: Mapping[int, Sequence[Future[Outcome]]]) -> dict[int, list[Outcome]]:
    """row -> what a plug-in makes of its completions, for the rows of all processes, from what each has asked; every process must
    call it. Where several have the same row, the first one's outcome is that of all, so that they continue with the same reward.
    """
    own = {row: [future.result() for future in futures] for row, futures in asked.items()}
    found: dict[int, list[Outcome]] = {}
    for said in exchange(json.dumps(own), _TIMEOUT):
        for row, outcomes in json.loads(said).items():
            found.setdefault(int(row), [Outcome(*one) for one in outcomes])
    return found


def plugin_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The mean of a plug-in's part and of each of its named parts over completions, where one that lacks a name has 0, and how
    many it has failed for; without completions nothing.
    """
    names = sorted({name for outcome in outcomes for name in outcome.parts})
    sums = {f"part/{name}": sum(x.parts.get(name, 0.0) for x in outcomes) for name in names}
    sums |= {"plugin_part": sum(sums.values())} if outcomes else {}
    failures = {"plugin_failures": float(sum(x.fault is not None for x in outcomes))}
    return {name: x / len(outcomes) for name, x in sums.items()} | (failures if outcomes else {})


def summarise_scores(
    scores: Sequence[Sequence[Score]], targets: Sequence[Target], mesh: Mesh | None = None
) -> dict[str, float]:
    """The mean of every field of `Score` over all completions, [P][G] for P targets.

    `spurious` is the share among the completions of prompts that should have no call; 0 without such prompts. With a mesh the
    scores are those of this process's rows, and the means are over all processes, which must all call it.
    """
    names = [f.name for f in dataclasses.fields(Score)]
    table = np.array([[[getattr(s, name) for name in names] for s in group] for group in scores])
    callless = np.array([not target.calls for target in targets])
    if mesh is not None:
        table, callless = gather((table, callless), mesh)
    means = dict(zip(names, np.mean(table, axis=(0, 1)).tolist(), strict=True))
    spurious = table[callless, :, names.index("spurious")]
    return means | {"spurious": float(np.mean(spurious)) if spurious.size else 0.0}


def truncated(rollout: RolloutBatch, stop_ids: Sequence[int]) -> np.ndarray:
    """bool [P, G]: the completions whose last token does not end the turn."""
    return ~_ends_with_stop(rollout.responses, rollout.response_length, stop_ids)


def _ends_with_stop(ids: np.ndarray, length: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    """bool, the shape of `length`: whether the last of a response's ids `[..., T]` is a stop id."""
    last = np.take_along_axis(ids, np.maximum(length - 1, 0)[..., None], axis=-1)[..., 0]
    return (length > 0) & np.isin(last, np.array(stop_ids, ids.dtype))
