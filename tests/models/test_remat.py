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
    found = {r: operations(r, dtype=dtype, attention=attention) for r in ("dots", "none")}
    found |= {r: operations(r, dtype=dtype, attention=attention) for r in ("attention", "block")}
    narrow, wide = (
        {r: n["dot_general", of_mlp] for r, n in found.items()} for of_mlp in (False, True)
    )
    assert wide["dots"] == wide["none"] == wide["attention"] - 2 == wide["block"] - 2
    # q, k, v, o, and of attention by XLA's operations two products in its loops
    again = 6 if attention == "blocks" else 4
    assert narrow["dots"] == narrow["none"] == narrow["attention"] == narrow["block"] - again
    if attention != "blocks":
        kernels = {r: n["pallas_call", False] for r, n in found.items()}
        assert kernels["dots"] == kernels["attention"] < kernels["block"]


def test_products_of_experts():
    found = {r: operations(r, **EXPERTS)["ragged_dot_general", True] for r in ("dots", "attention")}
    assert found["attention"] == found["dots"] + 2
