"""Completions that a model draws from prompts of some data, scored: what measurements of a policy begin with.

opened = open_data(config, data, limit)     the policy and the prompts that fit
batch = opened.choose(count, seed)          some of them, without repetition
scored = make_draw(opened)(batch, rng)      G completions of each (NumPy), at the final reward scale
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from rest_jax.config import Config
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Prepared, load_split, prepare
from rest_jax.distributed import say
from rest_jax.errors import UserError
from rest_jax.models.policy import Policy, check_positions
from rest_jax.rewards.plugin import check_plugin
from rest_jax.rl.rules import find_phrases
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.rollout.scoring import score_records
from rest_jax.run.load import load_policy
from rest_jax.templates import TEMPLATES, Template
from rest_jax.types import PromptBatch, Sampling, ScoredBatch


class Prompts(NamedTuple):
    """Some prompts of the data, with their records."""

    batch: PromptBatch  # NumPy
    records: list[StepRecord]


class Opened(NamedTuple):
    """A policy and the prompts that it may be given."""

    config: Config
    policy: Policy
    prepared: Prepared

    @property
    def template(self) -> Template:
        """That of the completions."""
        thought_open = self.policy.tokenizer.thought_open
        return TEMPLATES[self.config.data.template].behind(thought_open)

    def choose(self, count: int, seed: int | tuple[int, ...]) -> Prompts:
        """`count` different prompts, drawn by the seed, in the order of the data."""
        index = np.sort(np.random.default_rng(seed).permutation(self.prepared.size)[:count])
        chosen = [self.prepared.prompts[i] for i in index]
        padded = pad(chosen, bucketed(chosen), self.policy.tokenizer.pad_id)
        return Prompts(
            PromptBatch(*padded, index.astype(np.int32)), [self.prepared.records[i] for i in index]
        )


def open_data(
    config: Config, data: str, limit: int | None, least: int = 1, option: str = "--prompts"
) -> Opened:
    """The policy of `config`, and those of the first `limit` records of `data` whose prompts fit. UserError for sampling other
    than from the policy itself, of which the measurements speak, for fewer than `least` prompts, which `option` asks for, and for
    prompts that leave no room for a completion.
    """
    r = config.rollout
    if Sampling(r.temperature, r.top_k, r.top_p) != Sampling():
        raise UserError(
            f"rollout.temperature {r.temperature}, top_k {r.top_k}, top_p {r.top_p}: what is measured is about the policy's own "
            "distribution; add rollout.temperature=1.0 rollout.top_k=0 rollout.top_p=1.0"
        )
    check_plugin(config.reward)
    records = load_split(data, config.data, limit)
    policy = load_policy(config.model, config.mesh, config.rollout.tensor)
    prepared = prepare(records, policy.tokenizer, TEMPLATES[config.data.template], config.data)
    if prepared.size < least:
        raise UserError(
            f"{option}: {least} prompts are needed; {data} has {prepared.size} that fit; lower it or raise --limit"
        )
    check_positions(policy.config, int(prepared.prompts.lengths.max()), r.max_response_tokens)
    say(f"{data}: {prepared.summary(limit, '--limit')}")
    return Opened(config, policy, prepared)


def make_draw(opened: Opened) -> Callable[[Prompts, jax.Array], ScoredBatch]:
    """(prompts, key) -> `rollout.group_size` scored completions of each at temperature 1, NumPy."""
    config, policy = opened.config, opened.policy
    sampler = make_sampler(policy, config.rollout, config.rollout.group_size, Sampling())
    params = rollout_cast(policy)(policy.params)

    def draw(prompts: Prompts, rng: jax.Array) -> ScoredBatch:
        rollout = sampler.sample_all(params, prompts.batch, rng)
        known = policy.tokenizer, opened.template, config.reward, find_phrases(config)
        scored, _ = score_records(rollout, prompts.records, *known)
        return scored

    return draw
