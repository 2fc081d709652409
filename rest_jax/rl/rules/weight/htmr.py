"""HTMR: the tokens of the highest entropy, or those that the task is about.

    w = 1 where H is in the top `share` of the batch or the token lies in one of `regions`, else 0

Paper: hybrid token masking, ACL 2026 long 910 (event extraction). Read in York-Gold/HTMR-EAE 7a77561
(`get_global_entropy_top_and_key_mask`): the union of both, its entropies ranked within a micro-batch, here within the
global batch. share 0.2: their scripts. Their task tokens are entities and roles; names and arguments of calls in their
place are ours.
"""

import jax.numpy as jnp

from rest_jax.config import Fraction, RegionName, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.rules.weight.top_entropy import TopEntropyOptions, top_entropy
from rest_jax.rl.view import TokenView
from rest_jax.tool_calls import Region


class HtmrOptions(Section):
    """Options of the rule."""

    share: Fraction = 0.2
    regions: tuple[RegionName, ...] = ("name", "param")


def htmr(view: TokenView, options: HtmrOptions):
    """[P G T]: 1 on the tokens of either kind."""
    regions = jnp.array([Region[name.upper()] for name in options.regions], view.region.dtype)
    key = jnp.isin(view.region, regions) & view.mask
    return jnp.where(key, 1.0, top_entropy(view, TopEntropyOptions(share=options.share)))


RULE = Rule(htmr, HtmrOptions)
