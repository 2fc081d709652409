"""Credit rules: what weighs the tokens of a step, what its advantages are, what the policy loss of a token is.

    weight/     (view, options) -> [P G T]                 factor of the region weights, before the normaliser; never negative
    advantage/  (view, options) -> [P G] or [P G T]        of completions, or of tokens
    loss/       (stats, inputs, cfg, options) -> PolicyLoss     of a token, by the current policy (`rl/loss.py`)

A rule is a file of its folder, and its name the file's. The file says paper, formula and where each default comes from, has
the options as a config section, and ends with a `RULE`. `docs/methods.md` has a line for each. Nothing registers rules:
`config.rule_names` lists the files, `load_rule` imports one.
"""

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from rest_jax.config import Config, ConfigError, Options, Section, rule_names, validate_as

# What must differ between the completions of a group for it to have a gradient. None: nothing, so all groups are computed.
Signal = Literal["reward", "parts", "exact"] | None


class NoOptions(Section):
    """Of a rule that has none."""


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
    """The rule of a kind (weight, advantage, loss) by its name, which the config has checked."""
    return importlib.import_module(f"{__name__}.{kind}.{name}").RULE


def choose(kind: str, name: str, options: Options, key: str) -> Chosen:
    """A rule with options from the config, where they are at `key`; ConfigError names an option that it does not have."""
    rule = load_rule(kind, name)
    return Chosen(rule, validate_as(rule.options, dict(options), f"{key} of rule {name}"))


def choose_weight_rule(config: Config) -> Chosen | None:
    """That of single tokens; None where regions alone decide. ConfigError for options that it does not have."""
    weights = config.weights
    if weights.rule in rule_names("weight"):
        return choose("weight", weights.rule, weights.options, "weights.options")
    if weights.options:
        raise ConfigError(
            f"weights.options: rule {weights.rule} has none; they belong to one of {', '.join(rule_names('weight'))}"
        )
    return None


def check_rules(config: Config) -> tuple[Chosen, ...]:
    """The rules of a run. ConfigError for options that they do not have."""
    loss, weight = config.loss, choose_weight_rule(config)
    advantage = choose(
        "advantage", loss.advantage, loss.advantage_options, "loss.advantage_options"
    )
    policy = choose("loss", loss.policy, loss.policy_options, "loss.policy_options")
    return (advantage, policy) if weight is None else (weight, advantage, policy)


def find_phrases(config: Config) -> tuple[str, ...]:
    """The texts that the host marks for the rules of a run."""
    found: list[str] = []
    for rule, options in check_rules(config):
        if rule.phrases is not None:
            found += rule.phrases(options)
    return tuple(dict.fromkeys(found))
