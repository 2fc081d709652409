"""The look-up of rules, their options, and what holds for all of them."""

import dataclasses

import jax
import numpy as np
import pytest

from rest_jax import config
from rest_jax.config import ConfigError, CurriculumConfig, LossConfig, WeightsConfig, rule_names
from rest_jax.data.synthetic.world import world
from rest_jax.rl import curriculum
from rest_jax.rl.loss import policy_rule
from rest_jax.rl.prepare import active_groups, compute_advantage, weigh_tokens
from rest_jax.rl.regions import mark_phrases
from rest_jax.rl.rules import check_rules, choose, choose_weight_rule, find_phrases, load_rule
from rest_jax.rl.view import make_view
from tests import tiny
from tests.conftest import REPOSITORY

WEIGHTS, ADVANTAGES, LOSSES = map(rule_names, ("weight", "advantage", "loss"))
SCHEDULE = curriculum.Schedule(WeightsConfig(rule="uniform"), CurriculumConfig(), 10)
STATE = curriculum.init(SCHEDULE)


def step_config(weight: str | None = None, **changes):
    rule = weight and choose("weight", weight, (), "weights.options")
    return tiny.step_config(schedule=SCHEDULE, weight_rule=rule, **changes)


@jax.jit
def evaluate(scored):
    """(advantages, weights), by name, of all rules."""
    view = make_view(scored, scored.rollout, STATE, seed=1)
    advantages = {
        name: compute_advantage(view, step_config(loss=LossConfig(advantage=name)))
        for name in ADVANTAGES
    }
    view = view.replace(advantage=advantages["grpo"])
    weights = {name: weigh_tokens(view, STATE.weight, step_config(name)) for name in WEIGHTS}
    return advantages, weights


@pytest.fixture(scope="module")
def results(scored):
    return jax.tree.map(np.asarray, evaluate(scored))


def test_all_rules_give_finite_numbers_and_only_tokens_of_the_policy_count(scored, results):
    advantages, weights = results
    mask = np.asarray(scored.rollout.mask)
    assert (tuple(sorted(weights)), tuple(sorted(advantages))) == (WEIGHTS, ADVANTAGES)
    for name, found in weights.items():
        assert found.shape == mask.shape and found.dtype == np.float32, name
        assert np.isfinite(found).all() and (found >= 0).all() and found[mask].any(), name
        assert (found[~mask] == 0).all(), name
    for name, found in advantages.items():
        assert found.shape in (mask.shape, mask.shape[:2]) and found.dtype == np.float32, name
        assert np.isfinite(found).all() and found.any(), name
        assert found.ndim == 2 or (found[~mask] == 0).all(), name


def test_no_rule_reads_what_is_behind_a_completion(scored, results):
    mask, rollout = np.asarray(scored.rollout.mask), scored.rollout

    def spoiled(x):
        return np.where(mask, x, np.nan).astype(np.float32)

    changed = rollout.replace(
        responses=np.where(mask, rollout.responses, 3).astype(np.int32),
        logp=spoiled(rollout.logp),
        entropy=spoiled(rollout.entropy),
        gini=spoiled(rollout.gini),
    )
    found = evaluate(scored.replace(rollout=changed))
    jax.tree.map(np.testing.assert_array_equal, found, results)


def test_the_rule_says_which_groups_have_no_gradient(scored, results):
    """The host leaves them out, so on the device their advantage is exactly zero."""
    for name, found in results[0].items():
        cfg = step_config(loss=LossConfig(advantage=name))
        active = active_groups(scored, cfg)
        assert not found[~active].any(), name
        assert active[[1, 4]].all() == (load_rule("advantage", name).signal is None), name
        assert active.sum() >= 4, name


def test_the_order_of_groups_does_not_matter(scored, results):
    order = np.array([3, 1, 0, 7, 5, 6, 2, 4])
    found = evaluate(jax.tree.map(lambda x: x[order], scored))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(results), strict=True):
        np.testing.assert_allclose(one, other[order], rtol=1e-4, atol=1e-5)


METHODS = sorted((REPOSITORY / "configs" / "method").glob("*.yaml"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_rules_of_every_method(path):
    loaded = config.load(["scale/tiny", f"method/{path.stem}"])
    check_rules(loaded)
    recorded = config.from_overrides(loaded.model_dump(mode="json"))
    assert recorded == loaded and hash(recorded.weights) == hash(loaded.weights)
    assert (choose_weight_rule(loaded) is None) == (loaded.weights.of_regions == loaded.weights)


def test_every_rule_has_a_method():
    loaded = [config.load(["scale/tiny", f"method/{path.stem}"]) for path in METHODS]
    used = {(c.weights.rule, c.loss.advantage, c.loss.policy) for c in loaded}
    assert set().union(*used) >= {*WEIGHTS, *ADVANTAGES, *LOSSES}


def test_options_come_from_files_and_words(tmp_path):
    file = tmp_path / "half.yaml"
    file.write_text("weights: {rule: top_entropy, options: {share: 0.5}}\n")
    loaded = config.load(["scale/tiny", "method/egpo", file], ["loss.advantage_options.alpha=0.1"])
    weight, advantage, policy = check_rules(loaded)
    assert weight.options.share == 0.5
    assert advantage.options.model_dump() == {"alpha": 0.1, "kappa": 2, "regions": ("think",)}
    assert policy == policy_rule(loaded.loss) == policy_rule(LossConfig())
    (difference,) = config.differences(
        loaded, config.from_overrides(loaded.model_dump(), ["weights.options.share=0.4"])
    )
    assert difference == ("weights.options.share", 0.5, 0.4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["weights.rule=top_entrop"], "no such rule (nearest: top_entropy)"),
        (["loss.advantage=rlo"], "loss.advantage: 'rlo': no such rule (nearest: rloo)"),
        (["loss.policy=gpso"], "loss.policy: 'gpso': no such rule (nearest: gspo)"),
        (["weights.options=3"], "weights.options: 3: a mapping of options is needed"),
        (["weights.options.share=0.2"], "weights.options: rule inverse_bound has none"),
        (
            ["weights.rule=ar", "weights.options.alfa=1"],
            "weights.options of rule ar: alfa: unknown key (nearest: alpha)",
        ),
        (["weights.rule=ar", "weights.options.alpha=2"], "alpha: 2: Input should be less than"),
        (["weights.rule=ar", "weights.options.alpha=true"], "alpha: True: "),
        (["loss.advantage_options.eps=1"], "loss.advantage_options of rule grpo: eps: unknown"),
        (["loss.policy=sapo", "loss.policy_options.tau=1"], "(nearest: tau_"),
        (["loss.advantage=hicra", "loss.advantage_options={phrases: []}"], "at least 1 item"),
        (["loss.advantage=hicra", "loss.advantage_options={phrases: ['so', ' ']}"], "phrases"),
    ],
    ids=str,
)
def test_rules_and_options_that_cannot_be(words, said):
    with pytest.raises(ConfigError) as fault:
        check_rules(config.load(["scale/tiny"], words))
    assert said in str(fault.value) and "\n" not in str(fault.value)


def test_phrases_are_those_of_the_rules_in_use():
    assert find_phrases(config.load(["scale/tiny", "method/rest"])) == ()
    words = ["loss.advantage_options.phrases=[so then, let us see]"]
    loaded = config.load(["scale/tiny", "method/hicra"], words)
    assert find_phrases(loaded) == ("so then", "let us see")


@pytest.mark.parametrize("level", ["single", "mixed", "reasoned", "inferred"])
def test_phrases_of_planning_occur_in_the_synthetic_world(level):
    """Else HICRA would be GRPO there."""
    phrases = find_phrases(config.load(["scale/tiny", "method/hicra"]))
    thoughts = [record.target.think for record in world("train", 0, 50, level)]
    texts = [thought.encode() for thought in thoughts if thought]
    token_bytes = np.ones((len(texts), max(map(len, texts))), np.int32)
    assert mark_phrases(texts, token_bytes, phrases).any(axis=1).mean() > 0.5


def test_a_chosen_rule_is_static():
    one, other = (step_config("ar", seed=2) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != dataclasses.replace(
        one, weight_rule=choose("weight", "ar", (("alpha", 0.5),), "")
    )
