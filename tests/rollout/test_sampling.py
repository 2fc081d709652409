"""Drawing: the two inverse cumulative distributions against a NumPy oracle, at the edges, in frequency and in what they can
reach; the keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.rollout.sampling import _BLOCK, _LIGHT, _inverse_cumulative, draw, row_keys, uniforms
from rest_jax.types import Sampling

WORDS = [5, 96, 128, 300, 1000]  # less than a block, not a multiple, one block, several
SAMPLINGS = [Sampling(), Sampling(0.7), Sampling(1.4, 3), Sampling(1.0, 0, 0.8), Sampling(0.8, 20, 0.6)]  # fmt: skip
ROWS = 64
LARGEST = 1 - 2.0**-24  # the float32 below 1: no uniform number is larger
ROUNDING = 2e-6  # of cumulative sums in float32

drawn = jax.jit(draw, static_argnums=2)
inverse = jax.jit(_inverse_cumulative)


def probabilities(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """What is drawn from, float64: temperature, then top-k, then top-p, renormalised; one row at a time."""
    out = []
    for row in logits.astype(np.float64) / s.temperature:
        keep = np.ones(len(row), bool)
        if 0 < s.top_k < len(row):
            keep = row >= np.sort(row)[-s.top_k]
        p = np.where(keep, np.exp(row - row.max()), 0)
        p /= p.sum()
        if s.top_p < 1:
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            keep[order[before >= s.top_p]] = False
            p = np.where(keep, p, 0)
            p /= p.sum()
        out.append(p)
    return np.array(out)


def sample(words: int, seed: int = 0, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and uniform numbers, the two ends of [0, 1) among them."""
    rng = np.random.default_rng([words, seed])
    logits = rng.normal(0, scale, (ROWS, words)).astype(np.float32)
    uniform = rng.uniform(size=(ROWS, 2)).astype(np.float32)
    uniform[:4], uniform[4:8] = 0.0, LARGEST
    return logits, np.minimum(uniform, np.float32(LARGEST))


def ends(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] each, float64: the interval of the uniform number that each index of a distribution has, small ones first."""
    p = p / p.sum()
    order = np.argsort(p >= _LIGHT, kind="stable")
    high = np.empty_like(p)
    high[order] = np.cumsum(p[order])
    return high - p, high


def check_intervals(token, uniform, p) -> None:
    """The word has a probability above zero; the interval of its block holds the first uniform number, its own in the block the
    second. At the very end, where rounding may lead behind it, the largest will do.
    """
    assert ((token >= 0) & (token < p.shape[1])).all()
    assert (p[np.arange(len(token)), token] > 0).all(), "a word of zero probability"
    for word, numbers, row in zip(token, uniform, p, strict=True):
        size = min(_BLOCK, len(row))
        blocks = np.pad(row, (0, -len(row) % size)).reshape(-1, size)
        block, index = divmod(word, size)
        of_levels = (blocks.sum(axis=1), block), (blocks[block], index)
        for number, (weights, chosen) in zip(numbers, of_levels, strict=True):
            low, high = ends(weights)
            inside = low[chosen] - ROUNDING <= number <= high[chosen] + ROUNDING
            assert inside or (number >= 1 - ROUNDING and weights[chosen] == weights.max())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("words", WORDS)
def test_the_word_drawn_holds_the_uniform_number(words, sampling):
    logits, uniform = sample(words)
    token, logp, _, _ = map(np.asarray, drawn(logits, uniform, sampling))
    p = probabilities(logits, sampling)
    assert token.dtype == np.int32
    check_intervals(token, uniform, p)
    np.testing.assert_allclose(logp, np.log(p[np.arange(ROWS), token]), atol=2e-5)


@pytest.mark.parametrize("count", [5, 128, 1000])
def test_an_index_is_exact_where_nothing_is_rounded(count):
    """Weights and their sums are multiples of 1/16, the total a power of two: at the borders, too."""
    rng = np.random.default_rng(count)
    weight = np.exp2(rng.integers(-4, 1, (ROWS, count + 1)))
    total = np.exp2(np.ceil(np.log2(weight.sum(axis=1))) + 1)
    weight[:, -1] += total - weight.sum(axis=1)
    cumulative = np.cumsum(weight, axis=1)
    border = cumulative[np.arange(ROWS), rng.integers(0, count, ROWS)]
    for shift in (-1 / 32, 0.0, 1 / 32):
        uniform = (border + shift) / total
        index = inverse(weight.astype(np.float32), uniform.astype(np.float32))
        expected = (cumulative <= (border + shift)[:, None]).sum(axis=1)
        np.testing.assert_array_equal(index, expected)


@pytest.mark.parametrize("words", WORDS)
def test_the_ends_of_the_intervals(words):
    """0 draws a word of non-zero probability, the largest uniform number the last one, as far as rounding goes."""
    logits, _ = sample(words, seed=1)
    logits[:, 0] = logits[:, -1] = -1e30
    p = probabilities(logits, Sampling())
    for number in (0.0, LARGEST):
        uniform = np.full((ROWS, 2), number, np.float32)
        token, *_ = map(np.asarray, drawn(logits, uniform, Sampling()))
        check_intervals(token, uniform, p)


@jax.jit
def inverse_of_all(weights: jax.Array, numbers: jax.Array) -> jax.Array:
    """[K N]: what each of N uniform numbers draws from each of K distributions."""
    one = jax.vmap(_inverse_cumulative, (None, 0))
    return jax.lax.map(lambda each: one(*each), (weights, numbers))


def unreached(weights: np.ndarray) -> np.ndarray:
    """bool [K N]: the indices that no middle of an interval draws, as the nearest number that `uniforms` makes."""
    low, high = np.stack([ends(row) for row in weights.astype(np.float64)], axis=1)
    grid = np.round((low + high) / 2 * 2.0**32).astype(np.float32) * np.float32(2.0**-32)
    found = np.asarray(inverse_of_all(weights, grid))
    return np.stack([~np.isin(np.arange(len(row)), row) for row in found])


def large_vocabulary(kind: str) -> np.ndarray:
    """Probabilities of 151,936 words, nearly all of which are rarer than 1e-7."""
    rng = np.random.default_rng(11)
    p = rng.uniform(1e-8, 1e-7, 151_936) if kind == "rare" else rng.lognormal(0, 3, 151_936)
    at = rng.integers(0, len(p), 40)
    p[at] = 0
    rest = {"rare": p.sum(), "one": 1e-5, "two": 3e-6, "usual": 0.02}[kind]
    p *= rest / p.sum()
    heads = {"rare": 40, "one": 1, "two": 2, "usual": 40}[kind]
    p[at[:heads]] = (1 - rest) * rng.dirichlet(np.full(heads, 5.0))
    return p.astype(np.float32)


@pytest.mark.parametrize("kind", ["rare", "usual", "one", "two"])
def test_a_large_vocabulary_can_be_reached(kind):
    """`one` and `two` words have all but a few millionths of the probability."""
    p = large_vocabulary(kind)
    assert np.mean(p < 1e-7) > 0.5
    blocks = p.reshape(-1, _BLOCK)
    totals = blocks.sum(axis=1)
    lost = totals[unreached(totals[None])[0]].sum() + blocks[unreached(blocks)].sum()
    assert lost < 1e-6


@pytest.mark.parametrize("nothing", [-1e30, -np.inf, -200.0], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, 40, 0.9)], ids=str)
@pytest.mark.parametrize("words", [5, 300, 1000])
def test_words_of_zero_probability_are_never_drawn(words, sampling, nothing):
    """exp of their logits is zero: full blocks of them, at either end, between others."""
    logits, uniform = sample(words, seed=2)
    rng = np.random.default_rng(words)
    logits[rng.random(logits.shape) < 0.7] = nothing
    logits[: ROWS // 2, : words // 2] = nothing
    logits[ROWS // 2 :, words // 2 :] = nothing
    alive = rng.integers(words // 2, words, ROWS)
    alive[ROWS // 2 :] -= words // 2
    logits[np.arange(ROWS), alive] = 1.0
    p = probabilities(logits, sampling)
    p[p < 1e-38] = 0
    for u in (uniform, np.zeros_like(uniform), np.full_like(uniform, LARGEST)):
        token, logp, *_ = map(np.asarray, drawn(logits, u, sampling))
        check_intervals(token, u, p)
        assert np.isfinite(logp).all()


@pytest.mark.parametrize("words", WORDS)
def test_all_probability_on_one_word(words):
    rng = np.random.default_rng(words)
    only = rng.integers(0, words, ROWS)
    logits = np.full((ROWS, words), -1e30, np.float32)
    logits[np.arange(ROWS), only] = rng.normal(0, 30, ROWS)
    uniform = np.linspace([0, LARGEST], [LARGEST, 0], ROWS).astype(np.float32)
    for sampling in SAMPLINGS:
        token, logp, entropy, gini = map(np.asarray, drawn(logits, uniform, sampling))
        np.testing.assert_array_equal(token, only)
        for value in (logp, entropy, gini):
            np.testing.assert_allclose(value, 0, atol=1e-6)


@pytest.mark.parametrize("words", WORDS)
def test_greedy_is_the_first_maximum(words):
    logits, uniform = sample(words, seed=3)
    logits[::2] = np.round(logits[::2] * 0.5)  # few values: ties
    tied = (logits == logits.max(axis=1, keepdims=True)).sum(axis=1)
    assert (tied > 1).any()
    token, logp, _, _ = map(np.asarray, drawn(logits, uniform, Sampling(0.3, 2, greedy=True)))
    np.testing.assert_array_equal(token, logits.argmax(axis=1))
    p = probabilities(logits, Sampling())  # the log-prob is that at temperature 1
    np.testing.assert_allclose(logp, np.log(p.max(axis=1)), atol=2e-5)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, Sampling(greedy=True)], ids=str)
@pytest.mark.parametrize("words", WORDS)
def test_entropy_and_gini_are_of_the_full_distribution(words, sampling):
    """At temperature 1 over the full support, whatever is drawn from; bfloat16 logits are reduced in float32."""
    logits, uniform = sample(words, seed=4, scale=3.0)
    logits[:, 1] = -1e30
    p = probabilities(logits, Sampling())
    _, _, entropy, gini = map(np.asarray, drawn(logits, uniform, sampling))
    expected = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
    np.testing.assert_allclose(entropy, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gini, 1 - (p * p).sum(axis=1), rtol=1e-5, atol=2e-6)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    short = drawn(rounded, uniform, sampling)
    long = drawn(rounded.astype(jnp.float32), uniform, sampling)
    jax.tree.map(np.testing.assert_array_equal, short, long)


def test_any_leading_axes():
    logits, uniform = sample(96)
    flat = drawn(logits, uniform, Sampling())
    boxed = drawn(logits.reshape(4, 16, 96), uniform.reshape(4, 16, 2), Sampling())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.reshape(-1)), flat, boxed)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, 40), Sampling(1.0, 0, 0.7)], ids=str
)
def test_frequencies_follow_the_distribution(sampling):
    """Pearson's statistic over many uniform numbers, words rarely expected taken together."""
    count, words = 20_000, 200
    logits = np.random.default_rng(5).normal(0, 1.5, (1, words)).astype(np.float32)
    keys = row_keys(jax.random.key(3), jnp.int32(0), jnp.zeros(count, jnp.int32), jnp.arange(count))
    uniform = uniforms(keys, jnp.zeros(count, jnp.int32))
    token, *_ = drawn(np.broadcast_to(logits, (count, words)), uniform, sampling)
    seen = np.bincount(np.asarray(token), minlength=words)
    p = probabilities(logits, sampling)[0]
    assert (seen[p == 0] == 0).all()
    often = p * count >= 5
    expected = np.append(p[often], p[~often].sum()) * count
    observed = np.append(seen[often], seen[~often].sum())
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_uniforms_depend_on_key_and_position_only():
    rows = jnp.arange(6, dtype=jnp.int32)
    keys = row_keys(jax.random.key(7), jnp.int32(2), rows // 2, rows % 2)
    position = jnp.array([0, 3, 5, 0, 63, 64], jnp.int32)
    numbers = np.asarray(uniforms(keys, position))
    assert numbers.shape == (6, 2) and ((numbers >= 0) & (numbers < 1)).all()
    for row in range(6):
        alone = uniforms(keys[row : row + 1], position[row : row + 1])
        np.testing.assert_array_equal(alone[0], numbers[row])
    grid = uniforms(keys.reshape(2, 3), position.reshape(2, 3))
    np.testing.assert_array_equal(np.asarray(grid).reshape(6, 2), numbers)
    later = np.asarray(uniforms(keys, position + 1))
    assert len(np.unique([numbers, later])) == 24  # keys, positions and the two numbers differ


def test_the_two_uniforms_are_uniform_and_independent():
    """Of 65,536 tokens: on an 8 x 8 grid, and near 0, where they are finer than 2^-24."""
    rows = jnp.zeros(65_536, jnp.int32)
    keys = row_keys(jax.random.key(1), jnp.int32(0), rows, rows)
    numbers = np.asarray(uniforms(keys, jnp.arange(65_536)))
    seen, *_ = np.histogram2d(*numbers.T, bins=8, range=[[0, 1], [0, 1]])
    statistic = ((seen - 1024) ** 2 / 1024).sum()
    assert statistic < 63 + 4 * np.sqrt(2 * 63)
    small = numbers[numbers < 1 / 256].astype(np.float64)
    assert (small * 2**24 % 1 != 0).mean() > 0.9 and (small * 2**32 % 1 == 0).all()


def test_keys_differ_by_run_step_row_and_sample():
    def data(run, step, row, sample):
        one = jnp.full(1, row, jnp.int32), jnp.full(1, sample, jnp.int32)
        return tuple(
            np.asarray(jax.random.key_data(row_keys(jax.random.key(run), jnp.int32(step), *one)))[0]
        )

    identities = [
        (0, 0, 1, 2),
        (1, 0, 1, 2),
        (0, 1, 1, 2),
        (0, 0, 2, 1),
        (0, 0, 1, 3),
        (0, 2, 1, 0),
    ]
    assert len({data(*one) for one in identities}) == len(identities)
    assert data(0, 0, 1, 2) == data(0, 0, 1, 2)
