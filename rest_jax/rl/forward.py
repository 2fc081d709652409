"""The group forward: log-prob, entropy and Gini of every response token, prompt and G responses in
one packed row.

The trunk sees Tp + G Tr tokens a group instead of G (Tp + Tr); the head sees response positions
only. The hidden state of the last prompt token predicts token 0 of all G responses, so its gradient
is the sum over them, as in G separate rows.
"""

from jaxtyping import Array, Float, Int

from rest_jax.models.decoder import Decoder, head_matrix
from rest_jax.models.layouts import group_layout, pack_group, predicting_hidden
from rest_jax.rl.logprobs import Sampling, vocabulary_pass
from rest_jax.types import Params


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
    tokens, positions = pack_group(prompt, prompt_length, responses)
    layout = group_layout(prompt, prompt_length, responses, response_length)
    hidden, _ = decoder.apply({"params": params}, tokens, positions, layout)
    rows, width = prompt.shape[0], hidden.shape[-1]
    predicting = predicting_hidden(hidden, layout).reshape(rows, -1, width)
    head = head_matrix(params, decoder.cfg)
    out = vocabulary_pass(predicting, head, responses.reshape(rows, -1), sampling, chunk)
    logp, entropy, gini = (x.reshape(responses.shape) for x in out)
    return logp, entropy, gini
