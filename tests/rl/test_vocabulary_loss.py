"""The update's vocabulary pass: value, metrics and hand-made gradient against `jax.grad` of full logits, dtypes, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import LossConfig
from rest_jax.rl import logprobs
from rest_jax.rl.logprobs import LossSpec, chosen_logp, entropy_and_gini, truncate
from rest_jax.rl.loss import TokenInputs, TokenLoss, TokenStats, policy_token_loss
from rest_jax.types import Sampling

ROWS, TIME, WORDS, WIDTH = 3, 13, 29, 8
SAMPLINGS = [
    Sampling(),
    Sampling(0.7),
    Sampling(1.3, 5),
    Sampling(1.0, 0, 0.8),
    Sampling(0.8, 7, 0.6),
]


def vocabulary_loss(hidden, head, tokens, inputs, *spec, used=None):
    """The pass, with the fields of its `LossSpec` one by one; of all positions unless told otherwise."""
    used = jnp.ones(tokens.shape, bool) if used is None else jnp.asarray(used)
    return logprobs.vocabulary_loss(hidden, head, tokens, inputs, used, LossSpec(*spec))


def policy_loss(seen: TokenStats, x) -> TokenLoss:
    """Curved in the log-prob, with factors of its own for every token, as the update's."""
    loss = x["weight"] * -jnp.exp(seen.logp - x["old"]) + 0.3 * x["weight"] * seen.logp
    metrics = {"logp": seen.logp, "entropy": seen.entropy}
    sums = {name: x["bonus"] * value for name, value in metrics.items()}
    maxima = {name: jnp.where(x["inside"], value, -jnp.inf) for name, value in metrics.items()}
    return TokenLoss(loss, sums, maxima)


def with_entropy(seen: TokenStats, x) -> TokenLoss:
    out = policy_loss(seen, x)
    return out._replace(loss=out.loss - 0.7 * x["bonus"] * jnp.square(seen.entropy))


@functools.cache
def inputs(sampling: Sampling = SAMPLINGS[0], dtype: str = "float32"):
    """(hidden, head, tokens, extra); the tokens are among those that can be drawn."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, TIME, WIDTH)), dtype)
    head = jnp.asarray(rng.normal(size=(WORDS, WIDTH)), jnp.float32)
    logits = truncate(full_logits(hidden, head), sampling)
    tokens = jax.random.categorical(jax.random.key(1), logits, axis=-1).astype(jnp.int32)
    logp = chosen_logp(full_logits(hidden, head), tokens, sampling)
    assert float(logp.min()) > -100
    noise = rng.normal(size=(3, ROWS, TIME)).astype(np.float32)
    extra = {"weight": noise[0], "old": np.asarray(logp + 0.3 * noise[1]), "bonus": noise[2]}
    extra["inside"] = np.ones((ROWS, TIME), bool)
    return hidden, head, tokens, jax.tree.map(jnp.asarray, extra)


def full_logits(hidden, head):
    """[P T V] float32, the head rounded to the dtype of the hidden states."""
    head = head.astype(hidden.dtype)
    return jnp.einsum(
        "ptd,vd->ptv", hidden, head,
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


def full_stats(hidden, head, tokens, sampling) -> TokenStats:
    logits = full_logits(hidden, head)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    entropy, _ = entropy_and_gini(logits)
    return TokenStats(
        chosen_logp(logits, tokens, sampling), entropy, chosen == jnp.max(logits, axis=-1)
    )


def reference(hidden, head, tokens, extra, token_loss, sampling):
    """The definition."""
    out = token_loss(full_stats(hidden, head, tokens, sampling), extra)
    sums, maxima = jax.tree.map(jnp.sum, out.sums), jax.tree.map(jnp.max, out.maxima)
    return jnp.sum(out.loss), sums, maxima


def value_and_gradient(function, hidden, head):
    """((value, metrics), (d_hidden, d_head)) of a function with three outputs."""

    def first(*args):
        total, *rest = function(*args)
        return total, rest

    return jax.jit(jax.value_and_grad(first, (0, 1), has_aux=True))(hidden, head)


def close(a, b, relative: float = 2e-6) -> None:
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    assert np.linalg.norm(a - b) <= relative * np.linalg.norm(b), np.abs(a - b).max()


def close_metrics(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize("token_loss", [policy_loss, with_entropy], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "sampling",
    [*(pytest.param(s, marks=pytest.mark.wide) for s in SAMPLINGS[:-1]), SAMPLINGS[-1]],
    ids=str,
)
def test_value_and_gradient_are_those_of_full_logits(sampling, token_loss):
    hidden, head, tokens, extra = inputs(sampling)
    needs_entropy = token_loss is with_entropy
    expected = value_and_gradient(
        lambda h, w: reference(h, w, tokens, extra, token_loss, sampling), hidden, head
    )
    for chunk in (1, 4, 100):  # 4 does not divide 13
        found = value_and_gradient(
            lambda h, w, c=chunk: vocabulary_loss(
                h, w, tokens, extra, token_loss, sampling, c, needs_entropy
            ),
            hidden,
            head,
        )
        assert float(found[0][0]) == pytest.approx(float(expected[0][0]), rel=1e-5, abs=1e-5)
        close_metrics(found[0][1], expected[0][1])
        assert np.linalg.norm(expected[1][0]) > 1 < np.linalg.norm(expected[1][1])
        for a, b in zip(found[1], expected[1], strict=True):
            assert a.dtype == jnp.float32 and a.shape == b.shape
            close(a, b)


@pytest.mark.parametrize("chunk", [4, 13])
def test_the_value_without_a_gradient_is_the_same(chunk):
    hidden, head, tokens, extra = inputs()
    arguments = (hidden, head, tokens, extra, policy_loss, Sampling(), chunk)
    expected = reference(*arguments[:-1])
    close_metrics(vocabulary_loss(*arguments), expected)


def test_finite_differences():
    """An oracle that knows no derivative: the slope along random directions, in float64."""
    hidden, head, tokens, extra = (jax.tree.map(np.asarray, x) for x in inputs())

    def value(hidden, head):
        logits = hidden @ head.T
        peak = logits.max(-1, keepdims=True)
        logp_all = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
        logp = np.take_along_axis(logp_all, tokens[..., None], -1)[..., 0]
        entropy = -(np.exp(logp_all) * logp_all).sum(-1)
        loss = extra["weight"] * (-np.exp(logp - extra["old"]) + 0.3 * logp)
        return float((loss - 0.7 * extra["bonus"] * entropy**2).sum())

    _, gradient = value_and_gradient(
        lambda h, w: vocabulary_loss(h, w, *inputs()[2:], with_entropy, Sampling(), 5, True),
        *map(jnp.asarray, (hidden, head)),
    )
    rng = np.random.default_rng(3)
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    assert value(hidden, head) == pytest.approx(
        float(reference(*inputs(), with_entropy, Sampling())[0]), rel=1e-5
    )
    for _ in range(4):
        dh, dw = rng.normal(size=hidden.shape), rng.normal(size=head.shape)
        step = 1e-6
        up, down = (value(hidden + s * dh, head + s * dw) for s in (step, -step))
        slope = float((gradient[0] * dh).sum() + (gradient[1] * dw).sum())
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("chunk", [4, 13])
def test_bfloat16_hidden_states_leave_the_head_in_float32(chunk):
    """Gradients of the head add up in float32 and come out so; those of the hidden states are bfloat16 as these are."""
    hidden, head, tokens, extra = inputs(dtype="bfloat16")
    arguments = (tokens, extra, with_entropy, Sampling())
    _, (d_hidden, d_head) = value_and_gradient(
        lambda h, w: vocabulary_loss(h, w, *arguments, chunk, True), hidden, head
    )
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)  # what was multiplied with
    _, expected = value_and_gradient(
        lambda h, w: reference(h, w, *arguments), hidden.astype(jnp.float32), rounded
    )
    close(d_hidden, expected[0], 1e-2)
    close(d_head, expected[1], 1e-2)
    written = str(jax.make_jaxpr(jax.grad(lambda w: vocabulary_loss(hidden, w, *arguments, chunk, True)[0]))(head))  # fmt: skip
    assert "preferred_element_type=float32" in written
    assert "preferred_element_type=bfloat16" not in written
    # not rounded to bfloat16 on its way
    assert (np.asarray(d_head.astype(jnp.bfloat16).astype(jnp.float32)) != np.asarray(d_head)).mean() > 0.9  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cotangent_scales_the_gradient(dtype):
    """By a power of two, so that nothing is rounded; what else is made of the outputs gets no gradient."""
    hidden, head, tokens, extra = inputs(dtype=dtype)
    arguments = (tokens, extra, policy_loss, Sampling(), 5)

    def loss(h, w):
        return vocabulary_loss(h, w, *arguments)[0]

    def scaled(h, w):
        total, *metrics = vocabulary_loss(h, w, *arguments)
        return -4 * total + sum(jax.tree.leaves(metrics))

    for one, four in zip(
        jax.grad(loss, (0, 1))(hidden, head), jax.grad(scaled, (0, 1))(hidden, head), strict=True
    ):
        assert one.dtype == four.dtype
        np.testing.assert_array_equal(
            np.asarray(one, np.float32) * -4, np.asarray(four, np.float32)
        )


def test_tokens_with_no_weight_have_no_gradient():
    """Padding at the end of the responses: its hidden states get exactly zero, and change nothing."""
    hidden, head, tokens, extra = inputs()
    mask = np.arange(TIME) < np.array([[5], [13], [1]])
    extra = extra | {"weight": extra["weight"] * mask}

    def gradient(hidden, tokens):
        def loss(h, w):
            return vocabulary_loss(h, w, tokens, extra, policy_loss, Sampling(), 4)[0]

        return jax.grad(loss, (0, 1))(hidden, head)

    d_hidden, d_head = gradient(hidden, tokens)
    assert (np.asarray(d_hidden)[~mask] == 0).all() and (np.asarray(d_hidden)[mask] != 0).any()
    other = gradient(
        jnp.where(mask[..., None], hidden, -hidden), jnp.where(mask, tokens, (tokens + 3) % WORDS)
    )
    np.testing.assert_array_equal(other[0], d_hidden)
    np.testing.assert_array_equal(other[1], d_head)


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[-1]], ids=str)
@pytest.mark.parametrize("chunk", [4, 13])
def test_what_is_known_of_every_token(sampling, chunk):
    """Log-prob, entropy and whether no word is more probable, read token by token (every third of them)."""
    read_tokens = range(1, ROWS * TIME + 1, 3)
    hidden, head, tokens, _ = inputs(sampling)
    number = jnp.arange(1, ROWS * TIME + 1).reshape(ROWS, TIME)
    likely = jnp.argmax(full_logits(hidden, head), axis=-1).astype(jnp.int32)
    tokens = jnp.where(number % 2 == 0, likely, tokens)

    def read(seen: TokenStats, number) -> TokenLoss:
        sums = {
            f"{name}/{i}": jnp.where(number == i, value, 0.0)
            for name, value in seen._asdict().items()
            for i in read_tokens
        }
        return TokenLoss(jnp.zeros_like(seen.logp), sums, {})

    _, sums, maxima = jax.jit(
        lambda: vocabulary_loss(hidden, head, tokens, number, read, sampling, chunk)
    )()
    assert maxima == {}
    expected = full_stats(hidden, head, tokens, sampling)
    for name, value in expected._asdict().items():
        found = [float(sums[f"{name}/{i}"]) for i in read_tokens]
        np.testing.assert_allclose(found, np.ravel(value)[::3], rtol=1e-5, atol=1e-5, err_msg=name)
    assert 0.4 < np.mean(np.ravel(expected.is_argmax)[::3]) < 1


def test_equally_probable_words_are_all_the_argmax():
    """Two words of the same column of the head; a third that is less probable."""
    hidden, head, tokens, _ = inputs()
    likely = np.asarray(jnp.argmax(full_logits(hidden, head), axis=-1))
    twin = (likely[0, 0] + 1) % WORDS
    head = head.at[twin].set(head[likely[0, 0]])
    other = (twin + 1) % WORDS
    row = jnp.broadcast_to(hidden[:1, :1], (1, 3, WIDTH))

    def correct(seen: TokenStats, x) -> TokenLoss:
        return TokenLoss(0.0 * seen.logp, {"accuracy": x * seen.is_argmax}, {})

    for word, expected in ((likely[0, 0], 3), (twin, 3), (other, 0)):
        tokens = jnp.full((1, 3), word, jnp.int32)
        _, sums, _ = vocabulary_loss(row, head, tokens, jnp.ones((1, 3)), correct, Sampling(), 2)
        assert float(sums["accuracy"]) == expected


def policy_inputs(hidden, head, tokens, mask) -> TokenInputs:
    rng = np.random.default_rng(5)
    logp = np.asarray(full_stats(hidden, head, tokens, Sampling()).logp)
    old, advantage, weight, u = rng.normal(size=(4, *mask.shape)).astype(np.float32)
    # All log-probs of the old policy are lower, so that the largest ratio is above that of padding.
    old = np.where(mask, logp - np.abs(old), 0)
    x = TokenInputs(old, advantage, weight * mask, np.abs(u) * mask, mask, old - 0.1 * mask)
    return jax.tree.map(jnp.asarray, x)


@pytest.mark.parametrize("garbage", ["tokens", "hidden", "nan"])
@pytest.mark.parametrize("chunk", [4, pytest.param(13, marks=pytest.mark.wide)])
def test_padding_enters_neither_loss_nor_metrics(chunk, garbage):
    """Neither that of the responses, whatever is there, nor that of the last chunk."""
    hidden, head, tokens, _ = inputs()
    mask = np.arange(TIME) < np.array([[5], [12], [1]])
    cfg = LossConfig(kl_coefficient=0.1, entropy_coefficient=0.1)
    x = policy_inputs(hidden, head, tokens, mask)

    def token_loss(seen, x):
        return policy_token_loss(seen, x, cfg)

    expected = reference(hidden, head, tokens, x, token_loss, Sampling())
    if garbage == "tokens":
        tokens = jnp.where(mask, tokens, (tokens + 3) % WORDS)
    else:
        wrong = jnp.nan if garbage == "nan" else -100 * hidden
        hidden = jnp.where(mask[..., None], hidden, wrong)
    arguments = (x, token_loss, Sampling(), chunk, True)
    for used in (None, mask) if garbage != "nan" else (mask,):
        run = functools.partial(vocabulary_loss, used=used)
        close_metrics(run(hidden, head, tokens, *arguments), expected)
        found, gradient = value_and_gradient(
            lambda h, w, run=run: run(h, w, tokens, *arguments), hidden, head
        )
        close_metrics((found[0], *found[1]), expected)
        assert (np.asarray(gradient[0])[~mask] == 0).all()
        assert all(np.isfinite(np.asarray(part)).all() for part in gradient)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_positions_that_are_not_used_cost_nothing(chunk):
    """Wherever they are: values and gradients are those of the others alone, and only chunks with others are computed."""
    hidden, head, tokens, extra = inputs()
    used = np.random.default_rng(4).random((ROWS, TIME)) < 0.4
    alone = hidden[used][None], tokens[used][None], {k: x[used][None] for k, x in extra.items()}
    expected = value_and_gradient(
        lambda h, w: vocabulary_loss(h, w, *alone[1:], policy_loss, Sampling(), 100),
        alone[0], head,
    )  # fmt: skip
    zeroed = {name: jnp.where(used, x, jnp.zeros_like(x)) for name, x in extra.items()}
    found = value_and_gradient(
        lambda h, w: vocabulary_loss(
            h, w, tokens, zeroed, policy_loss, Sampling(), chunk, used=used
        ),
        hidden, head,
    )  # fmt: skip
    close_metrics(found[0], expected[0])
    close(np.asarray(found[1][0])[used], expected[1][0][0])
    close(found[1][1], expected[1][1])
    assert (np.asarray(found[1][0])[~used] == 0).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5)], ids=str)
@pytest.mark.parametrize("needs_entropy", [False, True])
def test_full_logits_never_exist(needs_entropy, sampling):
    """The buffers of the compiled gradient are far below [P, T, V]."""
    p, t, v, d = 2, 512, 4096, 16
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((p, t, d), (v, d))]
    tokens = jax.ShapeDtypeStruct((p, t), jnp.int32)
    extra = {name: jax.ShapeDtypeStruct((p, t), jnp.float32) for name in ("weight", "old", "bonus")}
    extra["inside"] = jax.ShapeDtypeStruct((p, t), bool)

    def loss(hidden, head, tokens, extra):
        token_loss = with_entropy if needs_entropy else policy_loss
        return vocabulary_loss(
            hidden, head, tokens, extra, token_loss, sampling, 16, needs_entropy
        )[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args, tokens, extra).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < p * t * v * 4 / 4
