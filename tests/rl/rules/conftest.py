"""Small steps, written out, for the tests of rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import CurriculumConfig, WeightsConfig
from rest_jax.rewards.score import PARTS
from rest_jax.rl import curriculum
from rest_jax.rl.view import TokenView
from rest_jax.types import RolloutBatch, ScoredBatch


@pytest.fixture(scope="session")
def view():
    """Makes a view of what a test names, in lists [P][G][T] or [P][G]; `length`: tokens of each completion, all by default."""
    state = curriculum.init(curriculum.Schedule(WeightsConfig(), CurriculumConfig(), 10))

    def make(nu=0.0, length=None, advantage=None, **fields) -> TokenView:
        shape = np.shape(next(x for x in fields.values() if np.ndim(x) == 3))
        if length is None:
            length = np.full(shape[:2], shape[2])
        zeros = np.zeros(shape, np.float32)
        plain = {
            "logp": zeros,
            "entropy": zeros,
            "gini": zeros,
            "region": zeros,
            "responses": zeros,
        }
        plain |= {"marked": None, "reward": zeros[..., 0], "exact": zeros[..., 0] > 0}
        plain |= {"parts": np.zeros((*shape[:2], len(PARTS)), np.float32)}
        kinds = {"region": jnp.int8, "responses": jnp.int32, "exact": bool, "marked": bool}
        arrays = {
            name: None if x is None else jnp.asarray(x, kinds.get(name, jnp.float32))
            for name, x in (plain | fields).items()
        }
        return TokenView(
            **arrays,
            mask=jnp.arange(shape[2]) < jnp.asarray(length)[..., None],
            curriculum=state.replace(nu=jnp.float32(nu)),
            key=jax.random.key(0),
            advantage=None if advantage is None else jnp.asarray(advantage, jnp.float32),
        )

    return make


@pytest.fixture(scope="session")
def scored() -> ScoredBatch:
    """Random values, without a policy: eight groups, the second and the fifth of equal rewards."""
    rng = np.random.default_rng(0)
    shape = (8, 4, 12)
    length = rng.integers(0, 13, shape[:2]).astype(np.int32)
    mask = np.arange(shape[2]) < length[..., None]
    values = rng.exponential(size=(3, *shape)).astype(np.float32) * mask
    rollout = RolloutBatch(
        prompt=np.ones((8, 4), np.int32),
        prompt_length=np.full(8, 4, np.int32),
        responses=np.where(mask, rng.integers(1, 4, shape), 0).astype(np.int32),
        response_length=length,
        logp=-values[0],
        entropy=values[1],
        gini=1 - np.exp(-values[2]),
    )
    region = np.where(mask, rng.integers(1, 8, shape), 0).astype(np.int8)
    parts = rng.integers(-2, 3, (*shape[:2], len(PARTS))).astype(np.float32)
    parts[[1, 4]] = 0.1
    reward, exact = parts.sum(-1), parts[..., 1] > 1
    marked = (rng.random(shape) < 0.3) & mask
    form = (parts[..., 0] > 0).astype(np.float32)
    return ScoredBatch(rollout, region, reward, form, parts, exact, marked).validate()
