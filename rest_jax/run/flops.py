"""Model FLOPs of a decoder: the matmul work its maths asks for, whatever the hardware does. A multiply-add is 2.

With L layers, D model, N heads, K key/value heads, H head dim, F mlp, V vocabulary:

    trunk, a token            L (4 D N H + 4 D K H + 6 D F)    q and o, k and v, gate, up and down
    head, a position          2 D V
    attention, a query        4 L N H keys                     scores and the weighted sum of values

Norms, rotations, softmax, activations and the embedding look-up are not counted; neither are padding, recomputation in
the backward pass, or keys behind the causal mask. (PaLM, arXiv:2204.02311, appendix B, with attention exact.)
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from rest_jax.models.config import DecoderConfig


def token_flops(cfg: "DecoderConfig") -> int:
    """Forward FLOPs of one token through all layers: projections and MLP, without attention."""
    heads = 4 * cfg.d_model * (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim
    return cfg.n_layers * (heads + 6 * cfg.d_model * cfg.d_ff)


def head_flops(cfg: "DecoderConfig") -> int:
    """Forward FLOPs of one position through the LM head."""
    return 2 * cfg.d_model * cfg.vocab_size


def attention_flops(cfg: "DecoderConfig", keys: int) -> int:
    """Forward FLOPs of scores and values of one query over `keys` keys, all layers; of many queries: the sum of keys."""
    return 4 * cfg.n_layers * cfg.n_heads * cfg.head_dim * keys


def rollout_flops(
    cfg: "DecoderConfig",
    prompt_lengths: Int[np.ndarray, " P"],
    response_lengths: Int[np.ndarray, "P G"],
) -> float:
    """Useful FLOPs of sampling: every prompt once, and for every response token trunk, head and attention over the prompt,
    the earlier tokens and itself.

    ValueError with both shapes unless the lengths are [P] and [P, G].
    """
    prompts, responses = (np.asarray(x, np.int64) for x in (prompt_lengths, response_lengths))
    if prompts.ndim != 1 or responses.ndim != 2 or len(prompts) != len(responses):
        raise ValueError(f"lengths must be [P] and [P, G], not {prompts.shape}, {responses.shape}")
    answered = int(responses.sum())
    keys = int(_causal(prompts).sum() + (prompts[:, None] * responses + _causal(responses)).sum())
    trunk = token_flops(cfg) * (int(prompts.sum()) + answered)
    return float(trunk + head_flops(cfg) * answered + attention_flops(cfg, keys))


def update_flops(
    cfg: "DecoderConfig",
    prompt_lengths: Int[np.ndarray, " P"],
    response_lengths: Int[np.ndarray, "P G"],
) -> float:
    """FLOPs of one forward and backward pass over these groups in the group layout: 3 forward passes.

    The forward pass does the work of the rollout: a prompt once, the head on response positions only, i + 1 keys at
    position i. Groups that skip the pass are for the caller to leave out.
    """
    return 3.0 * rollout_flops(cfg, prompt_lengths, response_lengths)


def _causal(length: np.ndarray) -> np.ndarray:
    """Keys seen by all queries of a causal row: 1 + 2 + .. + length."""
    return length * (length + 1) // 2
