"""What a credit rule reads of a step, and the few things that rules share.

The view is of the global batch, whatever the mesh: a mean over it is a mean over all devices. Values outside the mask are zero.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from rest_jax.rl import masked
from rest_jax.types import AnyArray, CurriculumState, RolloutBatch, ScoredBatch


@struct.dataclass
class TokenView:
    """A scored step. `right` and `advantage` are there for weight rules, which come after the advantages."""

    logp: Float[
        Array, "P G T"
    ]  # nats, of the policy that sampled (by the trainer where recomputed)
    entropy: Float[Array, "P G T"]  # nats, temperature 1
    gini: Float[Array, "P G T"]  # 1 - sum_v p^2, temperature 1
    region: Int[Array, "P G T"]  # int8, tool_calls.Region
    mask: Bool[Array, "P G T"]  # tokens of the policy
    responses: Int[Array, "P G T"]  # ids
    marked: Bool[Array, "P G T"] | None  # tokens of the rule's phrases; None: it has none
    reward: Float[Array, "P G"]
    parts: Float[Array, "P G K"]  # what the reward is the sum of, see rewards.score.PARTS
    exact: Bool[Array, "P G"]  # in the format, with exactly the gold calls
    curriculum: CurriculumState
    key: Key[Array, ""]  # of the run and the step
    advantage: Float[Array, "P G *T"] | None = None

    @property
    def token_advantage(self) -> Float[Array, "P G T"]:
        """The advantage of every token, or with T = 1 that of all tokens of a completion."""
        assert self.advantage is not None
        return per_token(self.advantage)

    @property
    def right(self) -> Bool[Array, "P G"]:
        """Completions better than their group. Of binary rewards these are the right ones, wherever there is a gradient."""
        assert self.advantage is not None
        advantage = self.advantage
        if advantage.ndim == 3:
            advantage = masked.mean_over_mask(advantage, self.mask, axis=-1)
        return advantage > 0


def make_view(
    scored: ScoredBatch, old: RolloutBatch | AnyArray, state: CurriculumState, seed: int
) -> TokenView:
    """The view of a step. `old`: logp, entropy and gini of its tokens; `state`: the curriculum's, which counts the steps."""
    mask = scored.rollout.mask

    def inside(x):
        return jnp.where(mask, x, 0)

    return TokenView(
        logp=inside(old.logp),
        entropy=inside(old.entropy),
        gini=inside(old.gini),
        region=inside(scored.region),
        mask=mask,
        responses=inside(scored.rollout.responses),
        marked=scored.marked,
        reward=scored.reward.astype(jnp.float32),
        parts=scored.parts,
        exact=scored.exact,
        curriculum=state,
        key=jax.random.fold_in(jax.random.key(seed), state.step),
    )


def per_token(x: Shaped[AnyArray, "P G *T"]) -> Shaped[AnyArray, "P G _"]:
    """An array over completions as one over tokens, that broadcasts; one over tokens as it is."""
    return x if x.ndim == 3 else x[..., None]


def nonzero_advantage(signal: Shaped[AnyArray, "P G *K"]) -> Bool[AnyArray, " P"]:
    """False for groups whose completions do not differ in `signal` (see rules.Signal): they carry no gradient."""
    equal = signal.max(axis=1) == signal.min(axis=1)
    return ~equal.reshape(equal.shape[0], -1).all(axis=1)


def centre(x: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Minus the mean of the group. The comparison of values, not of rounded differences, decides what is zero."""
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    return jnp.where(nonzero_advantage(x)[:, None], centred, 0.0)


def standardise(x: Float[Array, "P G"], eps: float = 1e-6) -> Float[Array, "P G"]:
    """Centred and divided by the group's unbiased (G - 1) standard deviation, in float32."""
    centred = centre(x)
    std = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / max(x.shape[1] - 1, 1))
    return centred / (std + eps)


def draw_uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "P G T"]:
    """A number in [0, 1) for each token that depends on the key, its completion and its position alone, neither on how far
    responses are padded nor on the mesh.
    """
    completions = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, completions)
    at = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    drawn = jax.vmap(jax.vmap(jax.random.uniform))(at(keys, jnp.arange(shape[2], dtype=jnp.uint32)))
    return drawn.reshape(shape)
