"""What policies keep, counted in the gradient's own operations: a product that is kept is not computed again."""

import collections
import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from rest_jax.models.attention import prompt_rows
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder, init_params

CFG = DecoderConfig("qwen3", 64, 32, 2, 4, 2, 8, 48, qk_norm=True)
EXPERTS = {"n_experts": 4, "experts_per_token": 2}


def count(jaxpr, found: collections.Counter) -> collections.Counter:
    """The operations of a program by name, those on the MLP's width apart; of loops and functions too, not of kernels."""
    for eqn in jaxpr.eqns:
        shapes = [x.aval.shape for x in (*eqn.invars, *eqn.outvars) if hasattr(x, "aval")]
        wide = any(48 in shape for shape in shapes)
        found[eqn.primitive.name, wide] += 1
        if eqn.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                count(inner, found)
    return found


def operations(remat: str, **changes) -> collections.Counter:
    """Of the gradient of a sum of hidden states."""
    cfg = dataclasses.replace(CFG, remat=remat, **changes)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    tokens, length = jnp.zeros((1, 128), jnp.int32), jnp.full(1, 128)

    def total(params):
        layout, positions = prompt_rows(tokens, length)
        hidden, _ = Decoder(cfg).apply({"params": params}, tokens, positions, layout)
        return jnp.sum(hidden.astype(jnp.float32))

    return count(jax.make_jaxpr(jax.grad(total))(params).jaxpr, collections.Counter())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["blocks", "flash", "triton"])
def test_what_is_kept_is_not_computed_again(dtype, attention):
    """In bfloat16 products have a rule of their own for their gradient; so have all kernels of attention."""
    none, dots, block = (
        operations(remat, dtype=dtype, attention=attention) for remat in ("none", "dots", "block")
    )
    wide = "dot_general", True
    assert none[wide] == dots[wide] == block[wide] - 2
    # q, k and v are computed again, o is not; of attention by XLA's operations there are two products in its loops
    narrow = "dot_general", False
    assert none[narrow] == dots[narrow] - 3
    assert dots[narrow] == block[narrow] - (3 if attention == "blocks" else 1)
    kernel = "pallas_call", False
    assert none[kernel] == dots[kernel]
    assert (dots[kernel] < block[kernel]) == (attention != "blocks")


def test_products_of_experts():
    dots, block = (operations(r, **EXPERTS)["ragged_dot_general", True] for r in ("dots", "block"))
    assert block == dots + 2
