"""Rules of the user's own, tried before a run begins: what they raise, or give back that is no use, is one line and not the
traceback of a step that has been compiled for minutes.

    check_traces(config)      each is traced on a small step, of which nothing is computed
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rest_jax import plugins
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.rewards.score import PARTS
from rest_jax.rl import curriculum
from rest_jax.rl.loss import PolicyLoss, TokenInputs, TokenStats
from rest_jax.rl.rules import (
    PLUGIN_KEYS,
    Chosen,
    advantage_rule,
    choose_weight_rule,
    policy_rule,
)
from rest_jax.rl.view import make_view
from rest_jax.types import RolloutBatch, ScoredBatch


def _shape(config: Config) -> tuple[int, int, int]:
    """[P G T], all different, so that no two of them are taken for each other."""
    group = config.rollout.group_size
    return group + 1, group, group + 2


def check_traces(config: Config) -> None:
    """UserError that names file and line for a rule of the user's own that cannot be traced, or gives something else than
    its kind does.
    """
    named = plugins.named(config)
    shape = _shape(config)
    tokens = [shape]
    of_view = {
        "weight": (choose_weight_rule, tokens),
        "advantage": (lambda config: advantage_rule(config.loss), [shape[:2], shape]),
    }
    for kind, (find, shapes) in of_view.items():
        if PLUGIN_KEYS[kind] in named:
            rule = find(config)
            assert rule is not None
            check_trace(kind, named[PLUGIN_KEYS[kind]], shapes, lambda: _of_view(config, rule))  # noqa: B023
    if PLUGIN_KEYS["loss"] in named:
        check_trace("loss", named[PLUGIN_KEYS["loss"]], tokens, lambda: _of_tokens(config, shape))


def check_trace(
    kind: str, word: str, shapes: list[tuple[int, ...]], trace: Callable[[], Any]
) -> None:
    """UserError unless `trace` gives a floating-point array of one of the shapes, of a loss a `PolicyLoss` of one, whose clips
    are bool of its shape or None.
    """
    key = PLUGIN_KEYS[kind]
    path = plugins.read(word, key).path
    try:
        found = trace()
    except Exception as error:
        raise UserError(f"{key} {word}: {plugins.describe(error, path)}") from error
    cuts = {}
    if kind == "loss":
        if not isinstance(found, PolicyLoss):
            raise UserError(f"{key} {word}: a PolicyLoss is needed, not a {type(found).__name__}")
        cuts = {name: cut for name, cut in found._asdict().items() if name != "loss"}
        found = found.loss
    kind_of, shape = _kind_and_shape(found)
    if shape not in shapes or not jnp.issubdtype(kind_of, jnp.floating):
        names = " or ".join("[P G T]" if len(s) == 3 else "[P G]" for s in shapes)
        raise UserError(
            f"{key} {word}: floating-point numbers {names} are needed, here {' or '.join(map(str, shapes))}, found {kind_of} "
            f"{shape if shape is not None else ''}"
        )
    for name, cut in cuts.items():
        if cut is not None and _kind_and_shape(cut) != (jnp.bool_, shape):
            kind_of, other = _kind_and_shape(cut)
            raise UserError(
                f"{key} {word}: {name} of its PolicyLoss: bool {shape}, where that clip cuts, or None is needed, found {kind_of} "
                f"{other if other is not None else ''}"
            )


def _kind_and_shape(found: Any) -> tuple[Any, tuple[int, ...] | None]:
    """Of an array; of anything else the name of its type and None."""
    return getattr(found, "dtype", type(found).__name__), getattr(found, "shape", None)


def _of_view(config: Config, rule: Chosen) -> Any:
    """What a rule of a view gives for a step of which only the shapes are known."""
    schedule = curriculum.Schedule.of(config, 2)
    shape = _shape(config)

    def array(dims: tuple[int, ...], kind: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(dims, kind)

    def apply(scored: ScoredBatch) -> Any:
        view = make_view(scored, scored.rollout, curriculum.init(schedule), config.seed)
        return rule(dataclasses.replace(view, advantage=scored.reward))

    rollout = RolloutBatch(
        prompt=array((shape[0], 3), jnp.int32),
        prompt_length=array(shape[:1], jnp.int32),
        responses=array(shape, jnp.int32),
        response_length=array(shape[:2], jnp.int32),
        **dict.fromkeys(("logp", "entropy", "gini"), array(shape)),
    )
    scored = ScoredBatch(
        rollout,
        region=array(shape, jnp.int8),
        reward=array(shape[:2]),
        format_score=array(shape[:2]),
        parts=array((*shape[:2], len(PARTS))),
        exact=array(shape[:2], jnp.bool_),
        marked=array(shape, jnp.bool_) if rule.rule.phrases is not None else None,
    )
    return jax.eval_shape(apply, scored)


def _of_tokens(config: Config, shape: tuple[int, ...]) -> Any:
    """What the rule of the policy loss gives for tokens of which only the shape is known."""
    rule = policy_rule(config.loss)
    array: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    yes: Any = jax.ShapeDtypeStruct(shape, jnp.bool_)
    reference = array if config.loss.kl_coefficient > 0 else None
    sequence = array if rule.rule.reads_sequence else None
    inputs = TokenInputs(array, array, array, array, yes, reference, sequence)
    return jax.eval_shape(
        lambda seen, x: rule(seen, x, config.loss), TokenStats(array, array, yes), inputs
    )
