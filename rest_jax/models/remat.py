"""What the forward pass of a block keeps for the backward pass, which computes the rest again (`DecoderConfig.remat`).

    none   everything
    dots   the products before the MLP's nonlinearity, what attention gives, and its sum with the residual
    block  what goes into a block, and nothing else

The policy of `dots` knows arrays by name (`keep`): matrix products lie inside rules for their gradients, where it could not
tell them by their kind. Projections of attention are not among them: kept, they could not be fused with the norms and
rotations behind them, which costs what it saves.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "kept"


def keep(x: jax.Array) -> jax.Array:
    """x, which `dots` does not compute again."""
    return checkpoint_name(x, _NAME)


def checkpoint(remat: str, wrap: Callable[..., Any] = jax.checkpoint) -> Callable[..., Any]:
    """What makes a function, or by `wrap` a module, one that is computed again as `remat` says."""
    if remat == "none":
        return lambda function: function
    policy = jax.checkpoint_policies.save_only_these_names(_NAME) if remat == "dots" else None
    # `prevent_cse` is for code that is not the body of a loop
    return functools.partial(wrap, policy=policy, prevent_cse=False)
