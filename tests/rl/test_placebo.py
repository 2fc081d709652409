"""Placebos: which weights they keep, where they put them, and that neither padding nor the mesh changes what they draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.rl import curriculum
from rest_jax.rl.placebo import PLACEBOS
from rest_jax.rl.prepare import weigh_tokens
from rest_jax.rl.view import TokenView
from rest_jax.rl.weights import NORMALIZERS
from tests import tiny

SHAPE = (3, 4, 16)


@pytest.fixture(scope="module")
def view():
    """Of completions with 0 to 16 tokens, in three regions."""
    rng = np.random.default_rng(0)
    length = rng.integers(0, 17, SHAPE[:2])
    length[0, :3] = 0, 1, 16
    mask = np.arange(SHAPE[2]) < length[..., None]
    region = np.where(mask, np.array([1, 3, 5])[np.arange(SHAPE[2]) % 3], 0)
    return make(mask, region)


def make(mask, region, seed: int = 5, step: int = 3):
    zeros = jnp.zeros(mask.shape)
    key = jax.random.fold_in(jax.random.key(seed), step)
    rest = {"reward": zeros[..., 0], "parts": zeros[..., :4], "exact": zeros[..., 0] > 0}
    state = curriculum.init(tiny.step_config().schedule)
    return TokenView(
        logp=zeros, entropy=zeros, gini=zeros, region=jnp.asarray(region, jnp.int8),
        mask=jnp.asarray(mask), responses=zeros.astype(jnp.int32), marked=None, **rest,
        curriculum=state, key=key,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weight(view):
    """By region, with some spread."""
    spread = np.random.default_rng(1).random(SHAPE).astype(np.float32)
    return np.where(view.mask, np.asarray(view.region) + spread, 0)


def of(name: str, weight, view, seed: int = 5) -> np.ndarray:
    placebo = jax.jit(functools.partial(PLACEBOS[name], seed=seed))
    return np.asarray(placebo(jnp.asarray(weight), view))


@pytest.mark.parametrize("name", ["shuffle", "shuffle_regions"])
def test_shuffles_keep_the_weights_of_every_completion(view, weight, name):
    found = of(name, weight, view)
    assert (found[~np.asarray(view.mask)] == 0).all() and not np.array_equal(found, weight)
    np.testing.assert_array_equal(np.sort(found, axis=-1), np.sort(weight, axis=-1))
    for normalizer in ("all_tokens", "positive_tokens"):
        normal = NORMALIZERS[normalizer](jnp.asarray(found), view.mask)
        assert np.asarray(normal)[0, 2].mean() == pytest.approx(1, abs=1e-5)


def test_a_shuffle_puts_every_weight_everywhere():
    """Over many completions of four tokens, each of the 24 orders about as often."""
    mask = np.ones((300, 8, 4), bool)
    weight = np.broadcast_to(np.arange(4, dtype=np.float32), mask.shape)
    found = of("shuffle", weight, make(mask, mask)).reshape(-1, 4) @ [1, 4, 16, 64]
    _, counts = np.unique(found, return_counts=True)
    assert len(counts) == 24 and counts.min() > 60 and counts.max() < 140


def test_regions_get_the_weights_of_others(view, weight):
    """As many tokens each: a region has exactly those of another one, the same one everywhere and in every step."""
    mask = np.ones((2, 2, 9), bool)
    region = np.broadcast_to(np.repeat([1, 3, 5], 3), mask.shape)
    weight = region.astype(np.float32)
    seen = make(mask, region)
    found = of("shuffle_regions", weight, seen)
    for r in (1, 3, 5):
        (got,) = np.unique(found[region == r])
        assert got in {1, 3, 5} - {r}
    np.testing.assert_array_equal(found, of("shuffle_regions", weight, make(mask, region, step=9)))


@pytest.mark.parametrize("seed", range(8))
def test_as_few_tokens_as_possible_keep_a_weight_of_their_region(seed):
    """Also where one region has most of the tokens, or a completion only one."""
    lengths = {1: [6, 13, 3, 13, 68], 2: [5, 4, 4, 0, 0], 3: [0, 0, 7, 0, 0], 4: [0] * 5}
    region = np.zeros((1, len(lengths), 103), int)
    mask = np.zeros(region.shape, bool)
    rng = np.random.default_rng(seed)
    for row, sizes in enumerate(lengths.values()):
        own = rng.permutation(np.repeat(range(5), sizes))
        region[0, row, : len(own)], mask[0, row, : len(own)] = own, True
    weight = np.where(mask, region + 1.0, 0).astype(np.float32)
    kept = (of("shuffle_regions", weight, make(mask, region), seed) == weight) & mask
    least = [max(0, 2 * max(sizes) - sum(sizes)) for sizes in lengths.values()]
    np.testing.assert_array_equal(kept.sum(-1), [least])


def test_random_weights_have_the_range_of_the_batch(view, weight):
    found, mask = of("random", weight, view), np.asarray(view.mask)
    low, high = weight[mask].min(), weight[mask].max()
    assert (found[~mask] == 0).all() and low <= found[mask].min() and found[mask].max() < high
    assert found[mask].std() == pytest.approx((high - low) / np.sqrt(12), rel=0.15)


@pytest.mark.parametrize("name", ["shuffle", "random"])
def test_draws_depend_on_run_step_and_token_alone(view, weight, name):
    found = of(name, weight, view)
    again = view.replace(key=jax.random.fold_in(jax.random.key(5), 4))
    assert not np.array_equal(found, of(name, weight, again))

    def wider(x):
        return np.pad(np.asarray(x), [(0, 0), (0, 0), (0, 8)])

    padded = make(wider(view.mask), wider(view.region))
    np.testing.assert_array_equal(of(name, wider(weight), padded)[..., : SHAPE[2]], found)


def test_the_placebo_comes_before_the_normaliser(view):
    cfg = tiny.step_config(placebo="random", seed=5)
    state = curriculum.init(cfg.schedule)
    found = np.asarray(weigh_tokens(view, state.weight, cfg))
    mask = np.asarray(view.mask)
    means = found.sum(-1)[mask.any(-1)] / mask.sum(-1)[mask.any(-1)]
    np.testing.assert_allclose(means, 1, rtol=1e-5)
