"""The command `rest-jax variance MODEL DATA`: the theory of METHOD section 3 checked on one batch of a policy's own answers.

Samples G answers to each of some prompts at temperature 1, scores them at the final reward scale, measures
(`rl/variance.py`), prints three tables and writes variance.json, variance.csv and variance.png.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.analysis.variance.measure import measure
from rest_jax.analysis.variance.report import Settings
from rest_jax.analysis.variance.tables import variance_tables, write_variance
from rest_jax.config import Config
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.tokenize import Prepared, load_split, prepare
from rest_jax.errors import UserError
from rest_jax.models.load import Policy
from rest_jax.rl.advantages import nonzero_advantage
from rest_jax.rl.curriculum import Schedule
from rest_jax.rollout.engine import rollout_cast
from rest_jax.rollout.scheduler import policy_sampler
from rest_jax.rollout.scoring import score_rollout
from rest_jax.run.policy import config_of, is_run, load_policy
from rest_jax.templates import TEMPLATES
from rest_jax.types import PromptBatch, Sampling, ScoredBatch

FOLDER = "variance"


def run(
    source: str,
    data: str,
    *,
    prompts: int,
    tokens: int,
    limit: int | None,
    output: str | None,
    overrides: Sequence[str],
) -> int:
    """Measures and writes; 1 when a token breaks the inequality, else 0. UserError for what cannot be measured.

    `prompts` are drawn by the config's seed from the first `limit` records of `data`. `output` None: `variance/` in the
    run's folder, for other models in the config's output folder.
    """
    config = config_of(source, overrides)
    check(config, prompts)
    records = load_split(data, config.data, limit)
    policy = load_policy(config.model, config.mesh)
    prepared = prepare(records, policy.tokenizer, TEMPLATES[config.data.template], config.data)
    if prepared.size < prompts:
        raise UserError(
            f"--prompts {prompts}: {data} has {prepared.size} that fit; lower it or raise --limit"
        )
    print(f"{data}: {prepared.summary()}", flush=True)
    group_size = config.rollout.group_size
    print(f"sampling {group_size} answers to each of {prompts} prompts", flush=True)
    scored = sample_scored(policy, config, prepared, prompts)
    spread = np.asarray(nonzero_advantage(jnp.asarray(scored.reward)))
    if not spread.any():
        raise UserError(
            f"none of {prompts} groups of {group_size} answers has rewards that differ, so there is no gradient "
            "to measure; raise --prompts or rollout.group_size, or take a policy with a format of its own"
        )
    print(f"gradients of {spread.sum()} groups with advantage; this takes a while", flush=True)
    report = measure(
        policy.decoder,
        policy.params,
        scored,
        Schedule(config.weights, config.curriculum, config.train.steps or 1),
        config.loss.advantage,
        Settings(tokens=tokens, chunk=config.loss.vocab_chunk, seed=config.seed),
    )
    found: dict[str, Any] = {"model": source, "data": data, **report.to_json()}
    print(f"\n{variance_tables(found)}\n")
    folder = pathlib.Path(output) if output else default_folder(source, config)
    print(f"written: {', '.join(map(str, write_variance(found, folder)))}", flush=True)
    return 1 if report.overall.violations else 0


def check(config: Config, prompts: int) -> None:
    """UserError for settings under which the theory does not speak of the sampled tokens."""
    r = config.rollout
    if Sampling(r.temperature, r.top_k, r.top_p) != Sampling():
        raise UserError(
            f"rollout.temperature {r.temperature}, top_k {r.top_k}, top_p {r.top_p}: the inequality is about the policy's own "
            "distribution; add rollout.temperature=1.0 rollout.top_k=0 rollout.top_p=1.0"
        )
    if prompts < 2:
        raise UserError(f"--prompts {prompts}: a variance over groups needs at least 2")


def sample_scored(policy: Policy, config: Config, prepared: Prepared, prompts: int) -> ScoredBatch:
    """G scored answers to each of `prompts` prompts, drawn by the config's seed: NumPy."""
    r, tokenizer = config.rollout, policy.tokenizer
    sampler = policy_sampler(policy, r.group_size, r.max_response_tokens, Sampling(), r)
    index = np.sort(np.random.default_rng(config.seed).permutation(prepared.size)[:prompts])
    chosen = [prepared.prompts[i] for i in index]
    tokens, length = pad(chosen, bucketed(chosen), tokenizer.pad_id)
    batch = PromptBatch(tokens, length, index.astype(np.int32))
    params = rollout_cast(policy)(policy.params)
    rollout = sampler(params, batch, jax.random.key(config.seed), 0)
    targets = [prepared.records[i].target for i in index]
    template = TEMPLATES[config.data.template]
    return score_rollout(rollout, targets, tokenizer, template, config.reward, 1.0)[0]


def default_folder(source: str, config: Config) -> pathlib.Path:
    """Where a measurement goes when nothing is said."""
    return pathlib.Path(source if is_run(source) else config.output) / FOLDER
