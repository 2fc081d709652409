"""A policy that is certain and uncertain by turns, and a scored batch that it sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.tool_calls import Region
from rest_jax.types import ScoredBatch
from tests import tiny

KINDS = (Region.TAG, Region.NAME, Region.THINK)


@pytest.fixture(scope="session")
def peaked():
    """The parameters of the tiny policy with larger logits."""
    return tiny.params() | {"embed": tiny.params()["embed"] * 8}


@pytest.fixture(scope="session")
def scored(peaked) -> ScoredBatch:
    """Six groups; the region follows from the position alone, in three kinds; group 1 has equal rewards."""
    rollout = tiny.sampler()(peaked, tiny.prompts(6), jax.random.key(1), jnp.int32(0))
    mask = np.arange(tiny.TIME) < rollout.response_length[..., None]
    region = np.where(mask, np.array(KINDS)[np.arange(tiny.TIME) * 3 // tiny.TIME], 0)
    reward = np.random.default_rng(2).normal(size=mask.shape[:2]).astype(np.float32)
    reward[1] = 0.5
    ones = np.ones_like(reward)
    parts = np.stack([ones, reward - 1, 0 * ones, 0 * ones], axis=-1)
    return ScoredBatch(rollout, region.astype(np.int8), reward, ones, parts, exact=reward > 0)
