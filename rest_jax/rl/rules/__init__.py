"""Credit rules: what weighs the tokens of a step, what its advantages are, what the policy loss of a token is.

    weight/     (view, options) -> [P G T]                 factor of the region weights, before the normaliser; never negative
    advantage/  (view, options) -> [P G] or [P G T]        of completions, or of tokens
    loss/       (stats, inputs, cfg, options) -> PolicyLoss     of a token, by the current policy (`rl/loss.py`)

A rule is a file of its folder, and its name the file's. The file says paper, formula and where each default comes from, has
the options as a config section, and ends with a `RULE`. `docs/methods.md` has a line for each. Nothing registers rules:
`config.rule_names` lists the files, `load_rule` imports one. A rule of the user's own is a file elsewhere (docs/plugins.md).
"""

import functools
import importlib
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pydantic

from rest_jax import plugins
from rest_jax.config import (
    Config,
    ConfigError,
    LossConfig,
    Options,
    Section,
    rule_names,
    validate_as,
)
from rest_jax.errors import UserError

# What must differ between the completions of a group for it to have a gradient. None: nothing, so all groups are computed.
SignalName = Literal["reward", "parts", "exact"]
Signal = SignalName | None


class NoOptions(Section):
    """Of a rule that has none."""


class AnyOptions(Section):
    """Of a function of the user's own: whatever the config gives."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True)


class Rule(NamedTuple):
    """A rule as its file declares it."""

    apply: Callable[..., Any]
    options: type[Section] = NoOptions
    # of an advantage rule, see Signal
    signal: Signal = "reward"
    # texts whose tokens the host marks in `TokenView.marked`; None: the rule reads no marks
    phrases: Callable[[Any], tuple[str, ...]] | None = None
    # of a loss rule: whether it reads `TokenInputs.sequence_log_ratio`, which costs a second pass over the head
    reads_sequence: bool = False


class Chosen(NamedTuple):
    """A rule with its options: hashable, so static under jit."""

    rule: Rule
    options: Section

    def __call__(self, *args: Any) -> Any:
        return self.rule.apply(*args, self.options)


def load_rule(kind: str, name: str) -> Rule:
    """The rule of a kind (weight, advantage, loss) by its name, which the config has checked, or of a file of the user's own."""
    if ".py" in name:
        return load_plugin(kind, name)
    return importlib.import_module(f"{__name__}.{kind}.{name}").RULE


# The key of a config that names a file with a rule of a kind.
PLUGIN_KEYS = {
    "weight": "weights.plugin",
    "advantage": "loss.advantage_plugin",
    "loss": "loss.policy_plugin",
}


@functools.cache
def load_plugin(kind: str, word: str) -> Rule:
    """The rule in a file of the user's own, loaded once: a `Rule`, or a function, which may take any options and of which nothing
    is known, so that no group is left out. UserError names the line of the file that fails, or the field that is none of a Rule.
    """
    key = PLUGIN_KEYS[kind]
    source = plugins.read(word, key)
    try:
        found = plugins.load(source)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"{key} {word}: {plugins.describe(error, source.path)}") from error
    if not isinstance(found, Rule):
        if not callable(found):
            raise UserError(
                f"{key} {word}: {source.name} is a {type(found).__name__}; a Rule or a function is needed"
            )
        found = Rule(found, AnyOptions, signal=None)
    return _checked(found, f"{key} {word}", source.path)


def _checked(rule: Rule, named: str, path: str) -> Rule:
    """A rule of the user's own whose phrases are checked, too, once they are asked for; `named` opens the message of the
    UserError.
    """
    signals = typing.get_args(SignalName)
    options = isinstance(rule.options, type) and issubclass(rule.options, Section)
    needed = {
        "apply": (callable(rule.apply), "a function"),
        "options": (options, "a subclass of rest_jax.config.Section"),
        "signal": (rule.signal in (*signals, None), f"{', '.join(signals)} or None"),
        "phrases": (
            rule.phrases is None or callable(rule.phrases),
            "a function of the options, or None",
        ),
        "reads_sequence": (isinstance(rule.reads_sequence, bool), "True or False"),
    }
    for field, (fits, what) in needed.items():
        if not fits:
            raise UserError(f"{named}: {field} {_shown(getattr(rule, field))}: {what} is needed")
    if rule.phrases is None:
        return rule
    return rule._replace(phrases=functools.partial(_texts, rule.phrases, named, path))


def _texts(phrases: Callable[[Any], Any], named: str, path: str, options: Section) -> Any:
    try:
        found = phrases(options)
    except Exception as error:
        raise UserError(f"{named}: phrases: {plugins.describe(error, path)}") from error
    texts = isinstance(found, tuple | list) and all(isinstance(x, str) and x.strip() for x in found)
    if not texts or not found:
        raise UserError(
            f"{named}: phrases {_shown(found)}: texts that are not blank, at least one, are needed"
        )
    return tuple(found)


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


def choose(kind: str, name: str, options: Options, key: str) -> Chosen:
    """A rule with options from the config, where they are at `key`; ConfigError names an option that it does not have."""
    rule = load_rule(kind, name)
    return Chosen(rule, validate_as(rule.options, dict(options), f"{key} of rule {name}"))


def choose_weight_rule(config: Config) -> Chosen | None:
    """That of single tokens; None where regions alone decide. ConfigError for options that it does not have."""
    weights = config.weights
    if weights.plugin is not None:
        return choose("weight", weights.plugin, weights.options, "weights.options")
    if weights.rule in rule_names("weight"):
        return choose("weight", weights.rule, weights.options, "weights.options")
    if weights.options:
        raise ConfigError(
            f"weights.options: rule {weights.rule} has none; they belong to one of {', '.join(rule_names('weight'))}"
        )
    return None


def advantage_rule(loss: LossConfig) -> Chosen:
    """The rule of the advantages."""
    return choose(
        "advantage", loss.advantage_used, loss.advantage_options, "loss.advantage_options"
    )


def policy_rule(loss: LossConfig) -> Chosen:
    """The rule of the policy loss."""
    return choose("loss", loss.policy_used, loss.policy_options, "loss.policy_options")


def check_rules(config: Config) -> tuple[Chosen, ...]:
    """The rules of a run. ConfigError for options that they do not have, and for two whose phrases are marked; UserError for
    phrases that are none.
    """
    rules = _rules(config)
    _phrases(rules)
    return tuple(rules.values())


def find_phrases(config: Config) -> tuple[str, ...]:
    """The texts that the host marks for the rule of a run that reads marks. Errors as of `check_rules`."""
    return _phrases(_rules(config))


def _rules(config: Config) -> dict[str, Chosen]:
    """The rules of a run by their kind."""
    found = {
        "weight": choose_weight_rule(config),
        "advantage": advantage_rule(config.loss),
        "loss": policy_rule(config.loss),
    }
    return {kind: rule for kind, rule in found.items() if rule is not None}


def _phrases(rules: dict[str, Chosen]) -> tuple[str, ...]:
    found = {kind: rule.phrases(options) for kind, (rule, options) in rules.items() if rule.phrases}
    if len(found) > 1:
        raise ConfigError(
            f"the rules of {' and '.join(found)} have phrases, and tokens are marked for those of one alone; leave one rule out"
        )
    return tuple(dict.fromkeys(text for texts in found.values() for text in texts))
