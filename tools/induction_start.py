"""Initial weights that can already copy: the start of the quickstart's tiny policy.

Copying a name never seen before takes an induction circuit: a head that tells each token which tokens came before it, and a
later head that finds a position where the same tokens came before, and says what followed there. A model of a million parameters
finds it by gradient descent only after hours on a CPU, so this writes it into the first two layers, noise elsewhere:

    residual  dim 0: a constant | 52 dims: the token itself | 3 x 25 dims: the tokens 1, 2 and 3 positions back
    layer 0   heads 0-2 attend 1, 2, 3 positions back (a constant query and key, set apart by rotary phase) and fill those dims
    layer 1   heads 0-1 match one token of context, heads 2-3 three; their values add the token that followed

Everything is trained afterwards; nothing is held fixed. On random sequences that repeat, such a model predicts 63 % of the
second halves before its first update (a usual start: 0.3 %, and 12 % after 1,200 updates of 1,024 tokens).
"""

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import init_params
from rest_jax.types import Params

WIDTH, HEAD_DIM, HEADS = 128, 32, 4
IDENTITY = np.arange(1, 53)
DIMS = tuple(np.arange(53 + 25 * i, 78 + 25 * i) for i in range(3))
SPREAD = 0.1  # of the embeddings
FAST = (0, 1)  # rotary pairs that turn fast enough to tell neighbours apart
# pairs that hardly turn within a prompt (at rope_theta 1e6): content is matched in these
SLOW = np.array([*range(6, 16), *range(22, 32)])
SHARPNESS = 2.0  # scale of query and key norms
CONFIDENCE = 3.0  # scale of the final norm


def induction_start(cfg: DecoderConfig, seed: int) -> Params:
    """Parameters (float32) of a decoder with d_model 128 and 4 heads of 32; ValueError for any other shape."""
    if (cfg.d_model, cfg.head_dim, cfg.n_heads, cfg.n_kv_heads) != (WIDTH, HEAD_DIM, HEADS, HEADS):
        raise ValueError(
            f"induction_start: written for d_model {WIDTH} and {HEADS} heads of {HEAD_DIM}"
        )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.array(x), init_params(cfg, jax.random.key(seed)))
    blocks, attention = params["blocks"], params["blocks"]["attention"]
    projection = rng.normal(0, len(IDENTITY) ** -0.5, (len(IDENTITY), len(DIMS[0])))
    _noise(blocks, rng)
    params["embed"] = _embedding(cfg.vocab_size, rng)
    _look_back(attention, cfg, projection)
    _match(attention, projection)
    for name in ("q_norm", "k_norm"):
        attention[name]["scale"][:] = SHARPNESS
    params["final_norm"]["scale"][:] = CONFIDENCE
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def _noise(blocks: Params, rng: np.random.Generator) -> None:
    """Usual random weights; quieter in the two layers that get a circuit."""
    attention, mlp = blocks["attention"], blocks["mlp"]
    for group, name, spread in (
        (attention, "q", 0.06), (attention, "k", 0.06), (attention, "v", 0.06), (attention, "o", 0.02),
        (mlp, "gate", 0.08), (mlp, "up", 0.08), (mlp, "down", 0.02),
    ):  # fmt: skip
        group[name] = rng.normal(0, spread, group[name].shape)
    for name in ("q", "k", "v", "o"):
        attention[name][:2] *= 0.25
    mlp["down"][:1] *= 0.1


def _embedding(words: int, rng: np.random.Generator) -> np.ndarray:
    embedding = rng.normal(0, SPREAD / 20, (words, WIDTH))
    embedding[:, IDENTITY] = rng.normal(0, SPREAD, (words, len(IDENTITY)))
    embedding[:, 0] = 3 * SPREAD
    return embedding


def _look_back(attention: Params, cfg: DecoderConfig, projection: np.ndarray) -> None:
    """Layer 0, head h: all weight on the token h + 1 positions back; its projection goes into the dims of head h."""
    turn = 1 / cfg.rope_theta ** (
        np.arange(0, HEAD_DIM, 2) / HEAD_DIM
    )  # radians a position, by pair
    normed = 1.45  # spread of the identity dims after the first norm
    for head, dims in enumerate(DIMS):
        for pair in FAST:
            phase = -(head + 1) * turn[pair]
            attention["k"][0, 0, head, pair] = 3.0
            attention["q"][0, 0, head, pair] = 3.0 * np.cos(phase)
            attention["q"][0, 0, head, HEAD_DIM // 2 + pair] = 3.0 * np.sin(phase)
        attention["v"][0, IDENTITY, head, : len(dims)] = projection
        attention["o"][0, head, np.arange(len(dims)), dims] = SPREAD / normed


def _match(attention: Params, projection: np.ndarray) -> None:
    """Layer 1: queries hold the last tokens, keys those before a position; the value is the token at that position."""
    q, k, v, o = (attention[name] for name in ("q", "k", "v", "o"))
    for head in (0, 1):
        q[1][np.ix_(IDENTITY, np.array([head]), SLOW)] = projection[:, None, :20]
        k[1, DIMS[0][:20], head, SLOW] = 1
    for head in (2, 3):
        q[1][np.ix_(IDENTITY, np.array([head]), SLOW[:7])] = projection[:, None, :7]
        q[1, DIMS[0][:7], head, SLOW[7:14]] = 1
        q[1, DIMS[1][:6], head, SLOW[14:]] = 1
        k[1, DIMS[0][:7], head, SLOW[:7]] = 1
        k[1, DIMS[1][:7], head, SLOW[7:14]] = 1
        k[1, DIMS[2][:6], head, SLOW[14:]] = 1
    for head in range(HEADS):
        part = IDENTITY[:26] if head % 2 == 0 else IDENTITY[26:]
        v[1, part, head, np.arange(26)] = 1
        o[1, head, np.arange(26), part] = 1.5 * SPREAD
