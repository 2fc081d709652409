"""Rules in files of the user's own: they are those of a step, take options, and fail in one line before a run begins."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import config, plugins
from rest_jax.config import ConfigError
from rest_jax.errors import UserError
from rest_jax.rl.plugins import check_traces
from rest_jax.rl.prepare import has_advantage, step_config
from rest_jax.rl.rules import (
    advantage_rule,
    check_rules,
    choose_weight_rule,
    find_phrases,
    policy_rule,
)

FUNCTION = """
import jax.numpy as jnp

def by_entropy(view, options):
    return jnp.where(view.entropy > options.above, options.factor, 1.0)
"""
RULE = """
from rest_jax.config import PositiveFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import centre

class Options(Section):
    scale: PositiveFloat = 2.0

def scaled(view, options: Options):
    return options.scale * centre(view.reward)

RULE = Rule(scaled, Options)
"""
LOSS = """
from rest_jax.rl.loss import PolicyLoss, ratio

def unclipped(seen, x, cfg, options):
    return PolicyLoss(-ratio(seen.logp, x.logp_old) * x.advantage)
"""


def load(*words: str):
    return config.load(["scale/tiny", "method/rest"], words)


@pytest.fixture
def write(tmp_path):
    def written(text: str) -> str:
        (tmp_path / "mine.py").write_text(text)
        return str(tmp_path / "mine.py")

    return written


def test_a_function_takes_the_place_of_the_weight_rule(write, view):
    word = f"{write(FUNCTION)}:by_entropy"
    loaded = load(f"weights.plugin={word}", "weights.options={above: 0.5, factor: 3}")
    check_rules(loaded)
    check_traces(loaded)
    rule = choose_weight_rule(loaded)
    assert rule is not None and loaded.weights.of_regions.rule == "uniform"
    np.testing.assert_array_equal(rule(view(entropy=[[[0.2, 0.7]]])), [[[1.0, 3.0]]])
    cfg = step_config(loaded, 10)
    assert cfg.weight_rule == rule and hash(cfg) == hash(step_config(loaded, 10))
    assert config.from_overrides(loaded.model_dump(mode="json")) == loaded


def test_a_rule_says_which_groups_have_no_gradient_and_a_function_leaves_none_out(write, view):
    loaded = load(f"loss.advantage_plugin={write(RULE)}", "loss.advantage_options.scale=3")
    check_traces(loaded)
    seen = view(logp=np.zeros((1, 2, 1)), reward=[[0.0, 1.0]])
    np.testing.assert_allclose(advantage_rule(loaded.loss)(seen), [[-1.5, 1.5]])
    scored: Any = types.SimpleNamespace(reward=np.array([[1.0, 1.0], [0.0, 1.0]]))
    assert has_advantage(scored, loaded.loss).tolist() == [False, True]
    function = load(f"loss.advantage_plugin={loaded.loss.advantage_plugin}:scaled", "loss.advantage_options.scale=3")  # fmt: skip
    np.testing.assert_allclose(advantage_rule(function.loss)(seen), [[-1.5, 1.5]])
    assert has_advantage(scored, function.loss).all()
    with pytest.raises(ConfigError, match=r"of rule .*mine\.py: scal: unknown key \(nearest: sc"):
        check_rules(load(f"loss.advantage_plugin={loaded.loss.advantage_plugin}", "loss.advantage_options.scal=3"))  # fmt: skip


def test_a_policy_loss(write):
    from rest_jax.rl.loss import TokenInputs, TokenStats

    loaded = load(f"loss.policy_plugin={write(LOSS)}:unclipped")
    check_traces(loaded)
    two, yes = jnp.full(1, 2.0), jnp.ones(1, bool)
    inputs = TokenInputs(jnp.log(two), two, two, two, yes, None)
    found = policy_rule(loaded.loss)(TokenStats(jnp.log(3 * two), two, yes), inputs, loaded.loss)
    np.testing.assert_allclose(found.loss, [-6.0], rtol=1e-6)


def test_tokens_are_marked_for_the_phrases_of_one_rule(write):
    word = write(A_RULE.format("phrases=lambda o: ['so', 'so']")) + ":f"
    assert find_phrases(load(f"weights.plugin={word}")) == ("so",)
    with pytest.raises(ConfigError, match="rules of weight and advantage have phrases"):
        check_rules(load(f"weights.plugin={word}", "loss.advantage=hicra"))


KEY = "weights.plugin"
CUT = (
    "from rest_jax.rl.loss import PolicyLoss\ndef f(s, x, c, o): return PolicyLoss(x.advantage, {})"
)
A_RULE = "from rest_jax.rl.rules import Rule\nf = Rule(lambda view, options: view.logp, {})"
BAD = {
    "import": (KEY, "import nothing_like_it", "line 1: ModuleNotFoundError: No module named 'no"),
    "exit": (KEY, "raise SystemExit(3)", "line 1: SystemExit: 3"),
    "missing": (KEY, "x = 1", "AttributeError: .* no attribute 'f'"),
    "kind": (KEY, "f = 3", "f is a int; a Rule or a function is needed"),
    "arguments": (KEY, "def f(view): pass", "TypeError: f\\(\\) takes 1 positional argument but 2"),
    "raise": (KEY, "def f(v, o):\n  return v.entropy * o.none", "line 2: AttributeError"),
    "shapes": (KEY, "def f(v, o):\n  return v.entropy + v.reward", "line 2: ValueError: Incompatible shapes"),
    "value": (KEY, "def f(v, o):\n  return float(v.entropy[0, 0, 0])", "line 2: ConcretizationTyp"),
    "none": (KEY, "def f(v, o): pass", "numbers \\[P G T\\] are needed, here .* found NoneType"),
    "shape": (KEY, "def f(v, o): return v.reward", "here \\(9, 8, 10\\), found float32 \\(9, 8\\)"),
    "integers": (KEY, "def f(v, o): return v.responses", "found int32"),
    "groups": ("loss.advantage_plugin", "def f(v, o): return v.reward[0]", "\\[P G\\] or \\[P G T\\]"),
    "loss": ("loss.policy_plugin", "def f(s, x, c, o): return x.advantage", "a PolicyLoss is needed"),
    "cut as numbers": ("loss.policy_plugin", CUT.format("x.advantage"), "low of its PolicyLoss: bool .* found float32"),
    "cut of all": ("loss.policy_plugin", CUT.format("(x.advantage > 0).any()"), "or None is needed, found bool \\(\\)"),
    "signal": ("loss.advantage_plugin", A_RULE.format("signal='rewards'"), "signal 'rewards': reward, parts, exact or None is"),
    "apply": (KEY, "from rest_jax.rl.rules import Rule\nf = Rule(3)", "apply 3: a function is needed"),
    "options": (KEY, A_RULE.format("options={'x': 1}"), "options {'x': 1}: a subclass of rest_jax.config.Section is"),
    "sequence": (KEY, A_RULE.format("reads_sequence=1"), "reads_sequence 1: True or False is needed"),
    "phrases": (KEY, A_RULE.format("phrases=('so',)"), "phrases \\('so',\\): a function of the options, or None is"),
    "phrases raise": (KEY, A_RULE.format("phrases=lambda o: o.words"), "phrases: line 2: AttributeError"),
    "letters": (KEY, A_RULE.format("phrases=lambda o: 'so'"), "phrases 'so': texts that are not blank, at least one, are"),
    "no texts": (KEY, A_RULE.format("phrases=lambda o: (3,)"), "phrases \\(3,\\): texts"),
    "blank": (KEY, A_RULE.format("phrases=lambda o: ['so', ' ']"), "phrases \\['so', ' '\\]: texts"),
    "no phrases": (KEY, A_RULE.format("phrases=lambda o: ()"), "phrases \\(\\): texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line_before_anything_is_compiled(name, write):
    key, text, said = BAD[name]
    word = f"{write(text)}:f"
    with pytest.raises(UserError, match=rf"^{key} .*mine\.py:f: .*{said}") as fault:
        loaded = load(f"{key}={word}")
        check_rules(loaded)
        check_traces(loaded)
    assert "\n" not in str(fault.value)


def test_files_have_digests_by_their_keys(write):
    word = write(RULE)
    loaded = load(f"loss.advantage_plugin={word}")
    digest = plugins.digests(loaded)
    assert list(digest) == ["loss.advantage_plugin"] and len(digest["loss.advantage_plugin"]) == 64
    with pytest.raises(UserError, match=r"weights\.plugin gone\.py: No such file"):
        plugins.digests(load("weights.plugin=gone.py"))
    for word in ("mine", "mine.txt:f", "mine.py:3"):
        with pytest.raises(ConfigError, match=r"write it as FILE\.py:NAME"):
            load(f"weights.plugin={word}")
