"""Drawing one token a row, with its log-prob, entropy and Gini; and the keys that make a draw depend on its row alone.

    key of a token = fold(run key, step, row of the prompt, sample in the group, position in the response)

so that samples of a group differ, steps differ, a resumed run repeats, and a row draws the same whatever batch, order or
number of devices it runs in.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rest_jax.rl.logprobs import Sampling, chosen_logp, entropy_and_gini, truncate


def row_keys(
    rng: Key[Array, ""], step: Int[Array, ""], row: Int[Array, " P"], samples: int
) -> Key[Array, "P G"]:
    """One key for each response of each prompt."""
    base = jax.random.fold_in(rng, step)

    def one(r, sample):
        return jax.random.fold_in(jax.random.fold_in(base, r), sample)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(row, jnp.arange(samples))


def draw(
    logits: Float[Array, "P G V"],
    keys: Key[Array, "P G"],
    position: Int[Array, ""],
    sampling: Sampling,
) -> tuple[Int[Array, "P G"], Float[Array, "P G"], Float[Array, "P G"], Float[Array, "P G"]]:
    """(token int32, logp, entropy, gini), float32 nats. Greedy draws the argmax and reports its log-prob at temperature 1."""
    logits = logits.astype(jnp.float32)
    entropy, gini = entropy_and_gini(logits)
    if sampling.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, chosen_logp(logits, token, Sampling()), entropy, gini
    kept = truncate(logits, sampling)
    one = jax.vmap(
        jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row))
    )
    token = one(keys, kept).astype(jnp.int32)
    return token, chosen_logp(logits, token, sampling), entropy, gini
