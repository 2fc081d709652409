"""The group forward: from prompts and their G responses to log-probs, entropies, and the loss, in one packed row a group.

The trunk sees Tp + G Tr tokens a group instead of G (Tp + Tr); the head sees response positions only. The hidden state of
the last prompt token predicts token 0 of all G responses, so its gradient is the sum over them, as in G separate rows.
"""

from typing import Any

import jax
from jax import named_scope
from jaxtyping import Array, Float, Int

from rest_jax.models.attention import group_layout, pack_group, predicting_hidden
from rest_jax.models.decoder import Decoder, head_matrix
from rest_jax.rl.logprobs import TokenLoss, vocabulary_loss, vocabulary_pass
from rest_jax.types import Params, Sampling


def response_hidden(
    decoder: Decoder,
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_length: Int[Array, " P"],
    responses: Int[Array, "P G Tr"],
    response_length: Int[Array, "P G"],
) -> Float[Array, "P T D"]:
    """What predicts each response token, T = G * Tr."""
    with named_scope("trunk"):
        tokens, positions = pack_group(prompt, prompt_length, responses)
        layout = group_layout(prompt, prompt_length, responses, response_length)
        hidden, _ = decoder.apply({"params": params}, tokens, positions, layout)
        return predicting_hidden(hidden, layout).reshape(prompt.shape[0], -1, hidden.shape[-1])


def response_logprobs(
    decoder: Decoder,
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_length: Int[Array, " P"],
    responses: Int[Array, "P G Tr"],
    response_length: Int[Array, "P G"],
    sampling: Sampling,
    chunk: int,
) -> tuple[Float[Array, "P G Tr"], Float[Array, "P G Tr"], Float[Array, "P G Tr"]]:
    """(logp, entropy, gini) of the responses, float32. Mask them: past response_length they mean nothing."""
    hidden = response_hidden(decoder, params, prompt, prompt_length, responses, response_length)
    flat = responses.reshape(responses.shape[0], -1)
    with named_scope("vocabulary"):
        out = vocabulary_pass(hidden, head_matrix(params, decoder.cfg), flat, sampling, chunk)
    logp, entropy, gini = (x.reshape(responses.shape) for x in out)
    return logp, entropy, gini


def response_loss(
    decoder: Decoder,
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_length: Int[Array, " P"],
    responses: Int[Array, "P G Tr"],
    response_length: Int[Array, "P G"],
    extra: Any,
    token_loss: TokenLoss,
    sampling: Sampling,
    chunk: int,
    entropy_counts: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "P G Tr"], Float[Array, "P G Tr"]]:
    """(sum of `token_loss(logp, entropy, extra)`, logp, entropy); the sum alone carries gradient. `extra`: tree of
    arrays [P G Tr]. See `logprobs.vocabulary_loss`.
    """
    hidden = response_hidden(decoder, params, prompt, prompt_length, responses, response_length)
    head = head_matrix(params, decoder.cfg)
    rows = responses.shape[0]
    flat, extra = jax.tree.map(lambda x: x.reshape(rows, -1), (responses, extra))
    with named_scope("vocabulary"):
        out: Any = vocabulary_loss(
            hidden, head, flat, extra, token_loss, sampling, chunk, entropy_counts
        )
    total, logp, entropy = out
    return total, logp.reshape(responses.shape), entropy.reshape(responses.shape)
