"""Packed rows, dense attention over them, and how it is compared with a kernel's: shared by the tests of attention."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from rest_jax.models.attention import attend_rows
from rest_jax.models.cache import RowLayout

HIGHEST = jax.lax.Precision.HIGHEST


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def make_inputs(batch, time, heads, kv_heads, width=32):
    """q, k, v, and a weight of every output, padding included."""
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(normal(i, batch, time, n, width) for i, n in enumerate(counts))


def packed_row(width: int, groups: Sequence[tuple[int, int, Sequence[int], int]]) -> np.ndarray:
    """`until` of a row of groups, each (prompt, its width, [responses], their width): padding may lie anywhere."""
    until = np.zeros(width, np.int32)
    start = 0
    for prompt, prompt_width, responses, response_width in groups:
        end = start + prompt_width + len(responses) * response_width
        until[start : start + prompt] = end
        for i, length in enumerate(responses):
            first = start + prompt_width + i * response_width
            until[first : first + length] = first + length
        start = end
    assert start <= width
    return until


# two groups with an empty response, then padding; a single short prompt; nothing; one that fills the row
PACKED = np.stack(
    [
        packed_row(300, [(70, 75, [40, 0, 17], 40), (5, 5, [31, 9], 31)]),
        packed_row(300, [(11, 11, [], 0)]),
        packed_row(300, []),
        packed_row(300, [(130, 130, [85, 85], 85)]),
    ]
)


@st.composite
def any_row(draw, width: int = 512):
    """A row with any groups, padding between and behind them."""
    groups, used = [], 0
    while used < width and draw(st.integers(0, 5)):
        prompt = draw(st.integers(1, width - used))
        prompt_width = draw(st.integers(prompt, width - used))
        count, own = draw(st.integers(0, 4)), draw(st.integers(1, 200))
        count = min(count, (width - used - prompt_width) // own)
        lengths = draw(st.lists(st.integers(0, own), min_size=count, max_size=count))
        groups.append((prompt, prompt_width, lengths, own))
        used += prompt_width + count * own
    return packed_row(width, groups)


def visible_pairs(until: np.ndarray) -> np.ndarray:
    """bool `[B T T]`, by the definition."""
    query, key = np.arange(until.shape[1])[:, None], np.arange(until.shape[1])
    valid = until > key
    return (key <= query) & (query < until[:, None]) & valid[:, :, None]


def dense(q, k, v, until: np.ndarray):
    """With all scores, in float32."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    seen = visible_pairs(until)[:, None]
    score = jnp.einsum("bqnh,bknh->bnqk", q, k, precision=HIGHEST) * q.shape[-1] ** -0.5
    weight = jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, -1e30), axis=-1), 0)
    return jnp.einsum("bnqk,bknh->bqnh", weight, v, precision=HIGHEST)


def by_kernel(kernel: Callable[..., jax.Array], until: np.ndarray) -> Callable[..., jax.Array]:
    """(q, k, v) -> attention of rows."""
    layout = RowLayout(jnp.asarray(until), 1)
    return lambda q, k, v: attend_rows(q, k, v, layout, kernel)


def value_and_gradients(attend: Callable[..., jax.Array], *inputs):
    """Outputs, and the gradients of their weighted sum, of what `make_inputs` makes."""
    *q_k_v, weight = inputs

    def total(q, k, v):
        out = attend(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*q_k_v)
    return out, *gradients


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        scale = max(np.max(np.abs(b)), 1)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)


def assert_dense(found, inputs, until: np.ndarray, tolerance=1e-5):
    """Value and gradients are those of dense attention; padding, of which every output has a gradient here, has zeros."""
    expected = value_and_gradients(lambda *x: dense(*x, until=until), *inputs)
    assert_close(found, expected, tolerance)
    padding = np.arange(until.shape[1]) >= until
    assert all(np.all(np.asarray(x)[padding] == 0) for x in found)
