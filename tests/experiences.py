"""Experience of completions that are written down, without a policy: what the token viewer is tried on."""

import pathlib
from collections.abc import Sequence

import numpy as np

from rest_jax.config import RewardConfig
from rest_jax.data.records import StepRecord
from rest_jax.rl.prepare import TokenValues
from rest_jax.rollout.experience import Experience
from rest_jax.rollout.scheduler import SamplerStats
from rest_jax.rollout.scoring import score_rollout
from rest_jax.rollout.tokens import token_record
from rest_jax.run.metrics import MetricsWriter
from rest_jax.templates import TEMPLATES, Template
from rest_jax.tool_calls import Call, Target
from rest_jax.types import RolloutBatch

REWARD, TEMPLATE = RewardConfig(), TEMPLATES["toolrl"]
GOLD = Call("weather", {"city": "Zürich", "days": 2})
RIGHT = """<think> ask </think>
<tool_call>
{"name": "weather", "parameters": {"city": "Zürich", "days": 2}}
</tool_call>"""
WRONG = RIGHT.replace('"days": 2', '"days": "2"')
# Markup, the ends of elements, another direction of writing, no width, a lone surrogate of JSON, line ends of JavaScript.
HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>"
    "\u202egnp.exe\u2069\u200b\u2028 {{ data }} &lt;b&gt; \\u003c <!-- \x00\x07\ud7ff"
)


class Bytes:
    """A tokenizer whose ids are the bytes plus one; id 0 ends the turn."""

    stop_ids = (0,)
    pieces = (b"<|im_end|>", *(bytes([i]) for i in range(256)))
    piece_lengths = np.array([len(p) for p in pieces], np.int32)

    def bytes_of(self, ids) -> bytes:
        return b"".join(self.pieces[int(i)] for i in ids)

    def text(self, ids) -> str:
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def encode(self, text: str) -> list[int]:
        # bytes that are no UTF-8 are written as Python's surrogates
        return [byte + 1 for byte in text.encode("utf-8", "surrogateescape")]


def record(name: str = "one", target: Target | None = None, history: Sequence[dict] = ()):
    return StepRecord(name, "tests", (), tuple(history), target or Target(calls=(GOLD,)))


def experience_of(
    groups: Sequence[tuple[StepRecord, Sequence[str]]],
    trainer: bool = True,
    template: Template = TEMPLATE,
) -> tuple[Experience, TokenValues]:
    """A group of completions for each record, and what a device might have made of their tokens; all but the last of a group
    end. The prompt is the history, a turn a line. With `trainer` its log-probs are 0.5 less than the sampler's.
    """
    tokenizer = Bytes()
    ids = [[[*tokenizer.encode(text), 0] for text in texts] for _, texts in groups]
    for group in ids:
        group[-1].pop()
    length = np.array([[len(x) for x in group] for group in ids], np.int32)
    shape = (*length.shape, int(length.max()))
    responses = np.zeros(shape, np.int32)
    for place in np.ndindex(*length.shape):
        responses[place][: length[place]] = ids[place[0]][place[1]]
    alive = np.arange(shape[2]) < length[..., None]
    prompts = [
        tokenizer.encode(
            "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in r.history)
            or "?"
        )
        for r, _ in groups
    ]
    prompt = np.zeros((len(groups), max(map(len, prompts))), np.int32)
    for row, x in zip(prompt, prompts, strict=True):
        row[: len(x)] = x
    rng = np.random.default_rng(0)
    values = [
        np.where(alive, sign * rng.exponential(size=shape), 0).astype(np.float32)
        for sign in (-1, 1, 1)
    ]
    lengths = np.array([len(x) for x in prompts], np.int32)
    rollout = RolloutBatch(prompt, lengths, responses, length, *values)
    records = [r for r, _ in groups]
    scored, scores = score_rollout(
        rollout, [r.target for r in records], tokenizer, template, REWARD, 0.5
    )
    weight = np.where(alive, 1 + scored.region / 8, 0).astype(np.float32)
    advantage = scored.reward - scored.reward.mean(axis=1, keepdims=True)
    logp = np.where(alive, rollout.logp - 0.5, 0) if trainer else None
    row = np.arange(len(records), dtype=np.int32)
    made = Experience(scored, scores, records, row, row * 0, {}, 0.5, SamplerStats(), {})
    return made, TokenValues(weight, advantage, logp)


def write_run(run: pathlib.Path, groups, steps: int = 2, **options) -> None:
    """A run whose steps all have this experience."""
    experience, values = experience_of(groups, **options)
    line = token_record(values, experience, Bytes(), TEMPLATE, REWARD)
    writer = MetricsWriter(run)
    writer.write(0, {"eval/exact": 0.25, "eval/prompts": 40})
    for step in range(1, steps + 1):
        reward = {"reward/mean": step / 2, "reward/std": 2.0, "reward/group_std": 1.0}
        writer.write(step, reward | {"region/name/weight": 2.0}, tokens=line)
    writer.write(steps, {"eval/exact": 0.5, "eval/prompts": 40})
    writer.close()
