"""HICRA: planning counts more than carrying out.

    A_t = A + alpha |A| on the tokens of planning phrases in the thought, else A; A that of GRPO

Paper: Wang et al., ICLR 2026, arXiv:2509.03646. Formula and alpha 0.2 read in teilomillet/retrain 19db12f
(`apply_hicra`); of the authors' code only its readme is public. Their phrases ("strategic grams", 3 to 5 words) are
mined from right solutions; these are ours, after examples in summaries of the paper. Phrases are looked for in the
text of a completion, whose tokens the host then marks (`rl/regions.py`), so that it does not matter how the tokenizer
cuts them.
"""

from typing import Annotated

import jax.numpy as jnp
import pydantic

from rest_jax.config import NonNegativeFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, standardise
from rest_jax.tool_calls import Region

Phrase = Annotated[str, pydantic.StringConstraints(pattern=r"\S")]


class HicraOptions(Section):
    """Options of the rule."""

    alpha: NonNegativeFloat = 0.2
    phrases: Annotated[tuple[Phrase, ...], pydantic.Field(min_length=1)] = (
        "let me think",
        "let me check",
        "let me see",
        "need to",
        "i should first",
        "the user wants",
        "the best tool",
        "which tool",
        "we can use",
        "let's try",
        "another way",
        "on second thought",
        "but the request",
        "to do this",
    )


def raise_planning(view: TokenView, options: HicraOptions):
    """[P G T]; zero in groups whose rewards are all equal."""
    advantage = standardise(view.reward)[..., None]
    assert view.marked is not None
    planning = (view.region == Region.THINK) & view.marked
    return advantage + jnp.where(planning, options.alpha * jnp.abs(advantage), 0.0)


RULE = Rule(raise_planning, HicraOptions, phrases=lambda options: options.phrases)
