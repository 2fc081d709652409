"""What methods make of one scored batch: the weight of every token, and its coefficient in the policy gradient.

An arm is a method of configs/method (its sections weights, curriculum and loss) at the start or the end of its curriculum. At the
policy that sampled, where every ratio is 1, the gradient of its loss is that of -sum_t c_t log pi(a_t).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax import config as config_lib
from rest_jax.config import Config, ConfigError, WeightsConfig
from rest_jax.files import absolute
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rl import curriculum
from rest_jax.rl.prepare import StepConfig, prepare, step_config
from rest_jax.rl.regions import mark_phrases
from rest_jax.rl.rules import find_phrases
from rest_jax.types import RolloutBatch, Sampling, ScoredBatch

UNIFORM = "grpo"  # the method whose token weights are all one
_SECTIONS = ("weights", "curriculum", "loss")


class Arm(NamedTuple):
    """A method at a point of its curriculum."""

    name: str
    cfg: StepConfig
    progress: int  # 0: at the start; 1: at the end
    phrases: tuple[str, ...]  # that its rules read
    placebo_of: str | None = None  # the arm with the weights of its rule

    def __call__(self, scored: ScoredBatch, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """(token weights, coefficients), float32 [P, G, T], of a batch (NumPy)."""
        if self.phrases:
            scored = scored.replace(marked=self._mark(scored.rollout, tokenizer))  # type: ignore[attr-defined]
        weight, coefficient = _values(scored, self.cfg, self.progress)
        return np.asarray(weight), np.asarray(coefficient)

    def _mark(self, rollout: RolloutBatch, tokenizer: Tokenizer) -> np.ndarray:
        """bool [P, G, T]: the tokens of the phrases."""
        ids = rollout.responses.reshape(-1, rollout.responses.shape[-1])
        lengths = rollout.response_length.reshape(-1)
        rows = zip(ids.tolist(), lengths.tolist(), strict=True)
        texts = [tokenizer.bytes_of(row[:n]) for row, n in rows]
        marked = mark_phrases(texts, tokenizer.piece_lengths[ids], self.phrases)
        return marked.reshape(rollout.responses.shape)


def make_arms(
    config: Config,
    methods: Sequence[str],
    placebos: Sequence[str] = (),
    groups: int = 1,
) -> list[Arm]:
    """The arms of methods, for batches of `groups` prompts: a method with a curriculum has two. A placebo makes another arm of
    every one whose tokens differ in weight. ConfigError for a method that is none, or is supervised, for two of one name,
    and for a placebo that is none.
    """
    for placebo in placebos:
        config_lib.validate_as(WeightsConfig, {"placebo": placebo}, "placebos")
    arms = []
    for name, method in _by_name(methods).items():
        made = with_method(config, method)
        uniform = made.weights.plugin is None and made.weights.rule == "uniform"
        # an adaptive curriculum is where the format scores of the batch put it
        moves = made.curriculum.shape not in ("constant", "adaptive") and not uniform
        kinds = ["none", *(() if uniform else placebos)]
        for placebo in dict.fromkeys(kinds):
            weights = made.weights.model_copy(update={"placebo": placebo})
            cfg = _of_batch(made.model_copy(update={"weights": weights}), groups)
            said = name if placebo == "none" else f"{name}+{placebo}"
            for progress in (0, 1) if moves else (0,):
                at = f", nu {progress}" if moves else ""
                placebo_of = None if placebo == "none" else f"{name}{at}"
                arms.append(Arm(f"{said}{at}", cfg, progress, find_phrases(made), placebo_of))
    return arms


def _by_name(methods: Sequence[str]) -> dict[str, str]:
    """name -> method, each file once. ConfigError for two files of one name, by which results are known."""
    found: dict[str, str] = {}
    for method in methods:
        path = absolute(config_lib.builtin_file(method, "method"))
        first = found.setdefault(path.stem, method)
        if absolute(config_lib.builtin_file(first, "method")) != path:
            raise ConfigError(f"methods {first}, {method}: two of the name {path.stem}; rename one")
    return found


def with_method(config: Config, method: str) -> Config:
    """The config with weights, curriculum and loss of a method file, or of a builtin one's name."""
    tree = config_lib.read_mapping(config_lib.builtin_file(method, "method"))
    if "sft" in tree:
        raise ConfigError(f"method {method}: supervised, which has no policy gradient")
    made = config.model_dump(mode="json") | {key: tree.get(key, {}) for key in _SECTIONS}
    made["loss"] = {**made["loss"], "vocab_chunk": config.loss.vocab_chunk}
    return config_lib.from_overrides(made)


def _of_batch(config: Config, groups: int) -> StepConfig:
    """One update on `groups` prompts, in a run of which the second step ends the curriculum."""
    moved = config.curriculum.model_copy(update={"steps": 1})
    train = config.train.model_copy(update={"prompts_per_update": None})
    rollout = config.rollout.model_copy(update={"prompts_per_step": groups})
    changed = {"curriculum": moved, "train": train, "rollout": rollout}
    cfg = step_config(config.model_copy(update=changed), 1)
    return dataclasses.replace(
        cfg, sampling=Sampling(), tis_cap=None, noise_groups=None, shown_groups=tuple(range(groups))
    )


@jax.jit(static_argnames=("cfg", "progress"))
def _values(scored: ScoredBatch, cfg: StepConfig, progress: int) -> tuple[jax.Array, jax.Array]:
    state = curriculum.init(cfg.schedule)
    minibatch = jnp.zeros(len(scored.reward), jnp.int32)
    for _ in range(1 + progress):
        batch, state, _, shown = prepare(scored, None, None, minibatch, state, cfg)
    advantage = batch.advantage if batch.advantage.ndim == 3 else batch.advantage[..., None]
    return shown.weight, batch.loss_weight * advantage
