"""What the forward pass of a block keeps for the backward pass, which computes the rest again (`DecoderConfig.remat`).

    none       everything
    dots       matrix products, and what attention needs
    attention  the same without the products of the MLP or the experts, which are the largest
    block      what goes into a block, and nothing else

A policy knows arrays by name (`keep`): matrix products lie inside rules for their gradients, where it could not tell them by
their kind. In bytes a token and layer, with two bytes a number: `attention` 4 D + 2 (N + 2 K) H + 2 N H, `dots` 4 F more.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Name = Literal["attention", "mlp"]

_KEPT: dict[str, tuple[Name, ...]] = {
    "block": (),
    "attention": ("attention",),
    "dots": ("attention", "mlp"),
}


def keep(x: jax.Array, name: Name) -> jax.Array:
    """x, which policies that keep `name` do not compute again."""
    return checkpoint_name(x, name)


def checkpoint(remat: str, wrap: Callable[..., Any] = jax.checkpoint) -> Callable[..., Any]:
    """What makes a function, or by `wrap` a module, one that is computed again as `remat` says."""
    if remat == "none":
        return lambda function: function
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    # `prevent_cse` is for code that is not the body of a loop
    return functools.partial(wrap, policy=policy, prevent_cse=False)
