"""From sampled ids to rewards and regions, on the host: ids -> bytes -> parse -> score and region
labels.

In: a `RolloutBatch` of NumPy arrays and one `Target` a prompt. Out: the `ScoredBatch` and a `Score`
for every response. Text is derived from the ids, never the reverse; one parse serves the reward and
the regions.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rest_jax.config import RewardConfig
from rest_jax.distributed import gather
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rewards.score import PARTS, Score, score
from rest_jax.rl.regions import label_tokens, mark_phrases
from rest_jax.templates import Template
from rest_jax.tool_calls import Target
from rest_jax.types import RolloutBatch, ScoredBatch


def score_rollout(
    rollout: RolloutBatch,
    targets: Sequence[Target],
    tokenizer: Tokenizer,
    template: Template,
    cfg: RewardConfig,
    progress: float,
    phrases: Sequence[str] = (),
) -> tuple[ScoredBatch, list[list[Score]]]:
    """Scores and labels every response at reward progress `progress` in [0, 1], and marks the tokens of `phrases` if there
    are any.

    The text of a response is the bytes of its ids before a final stop id, which is the end-of-turn
    token. A response that never stops is parsed as it is. Returns the batch (NumPy, validated) and
    the scores, [P][G]. ValueError when the number of targets is not that of the prompts, or an id
    is outside the vocabulary.
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

    def field(name: str) -> np.ndarray:
        values = [getattr(s, name) for s in scores]
        return np.array(values, np.float32).reshape(prompts, group)

    marked: Any = None
    if phrases:
        marked = mark_phrases(texts, token_bytes, phrases).reshape(rollout.responses.shape)
    scored = ScoredBatch(
        rollout=rollout,
        region=region.reshape(prompts, group, width),  # type: ignore[arg-type]
        reward=field("reward"),  # type: ignore[arg-type]
        format_score=field("format_score"),  # type: ignore[arg-type]
        parts=np.stack([field(name) for name in PARTS], axis=-1),  # type: ignore[arg-type]
        exact=field("exact") > 0,  # type: ignore[arg-type]
        marked=marked,
    )
    return scored.validate(), [scores[p * group : (p + 1) * group] for p in range(prompts)]


def summarise_scores(
    scores: Sequence[Sequence[Score]], targets: Sequence[Target], mesh: Mesh | None = None
) -> dict[str, float]:
    """The mean of every field of `Score` over all completions, [P][G] for P targets.

    `spurious` is the share among the completions of prompts that should have no call; 0 without such prompts. With a mesh the
    scores are those of this process's rows, and the means are over all processes, which must all call it.
    """
    names = [f.name for f in fields(Score)]
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
