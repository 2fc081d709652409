"""Advantages against numbers worked out by hand, and NumPy oracles of docs/method.md section 7."""

import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.rl.rules import choose, load_rule
from rest_jax.tool_calls import Region

REWARD = np.array([[1.0, 2.0, 4.0, 1.0], [3.3, 3.3, 3.3, 3.3], [-3.0, 4.0, 4.0, 4.0]], np.float32)
T = np.zeros((3, 4, 2))  # tokens
HALF = np.sqrt(0.5)  # of two rewards, standardised


def advantage(name: str, view, **options) -> np.ndarray:
    return np.asarray(choose("advantage", name, tuple(options.items()), name)(view))


def test_grpo_is_unbiased_standardisation(view):
    expected = (REWARD - REWARD.mean(1, keepdims=True)) / (
        REWARD.std(1, ddof=1, keepdims=True) + 1e-6
    )
    expected[1] = 0
    found = advantage("grpo", view(logp=T, reward=REWARD))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_dr_grpo_only_centres(view):
    found = advantage("dr_grpo", view(logp=T, reward=REWARD))
    np.testing.assert_allclose(found, REWARD - REWARD.mean(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "rloo", "gdpo", "entropy", "hicra", "optimal_baseline"]
)
def test_equal_rewards_give_exactly_zero(view, name):
    # 0.1 summed seven times is not 0.7: the mean of equal float32 rewards may differ from each of them.
    reward, values = np.full((2, 7), 0.1), np.full((2, 7, 3), 0.1)
    reward[1] = np.arange(7)
    parts = np.stack([reward, 0 * reward, reward, 0 * reward], -1)
    seen = view(
        entropy=values, logp=-values, gini=values, reward=reward, parts=parts, marked=values
    )
    np.testing.assert_array_equal(advantage(name, seen)[0], 0.0)
    assert advantage(name, seen)[1].any()
    assert load_rule("advantage", name).signal is not None


def test_rloo(view):
    found = advantage("rloo", view(logp=np.zeros((1, 3, 1)), reward=[[1, 2, 3]]))
    np.testing.assert_allclose(found, [[-1.5, 0, 1.5]])


def test_maxrl(view):
    """Of a rate of 1/4: 3 for the success, -1 for a failure."""
    exact = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    found = advantage("maxrl", view(logp=T, exact=exact))
    np.testing.assert_allclose(found, [[3, -1, -1, -1], [0] * 4, [0] * 4], rtol=1e-5)


def test_gdpo_standardises_each_part(view):
    """In the first group the parts cancel, in the third nothing differs; the batch's standard deviation is that of +-1/sqrt 2
    among four zeros.
    """
    parts = [
        [[1, 0, 0, 0], [-1, 2, 0, 0]],
        [[1, 0, 0, 0], [1, 2, 0, 0]],
        [[1, 1, 0, 0], [1, 1, 0, 0]],
    ]
    seen = view(logp=np.zeros((3, 2, 1)), parts=parts, reward=np.sum(parts, -1))
    by = HALF / np.sqrt(1 / 5)
    np.testing.assert_allclose(advantage("gdpo", seen), [[0, 0], [-by, by], [0, 0]], rtol=1e-3)
    one = advantage("gdpo", seen, correctness=0)
    np.testing.assert_allclose(one, [[by, -by], [0, 0], [0, 0]], rtol=1e-3)


def test_reinforce_pp_standardises_over_tokens(view):
    """Rewards 1, 3, 3, 3 of four tokens: mean 2.5, variance 1."""
    seen = view(logp=np.zeros((1, 2, 3)), reward=[[1, 3]], length=[[1, 3]])
    np.testing.assert_allclose(advantage("reinforce_pp", seen), [[-1.5, 0.5]], rtol=1e-6)
    # centred: -1, 1, 1, 1 and four zeros of an equal group: mean 1/4, variance 0.5
    both = view(logp=np.zeros((2, 2, 3)), reward=[[1, 3], [7, 7]], length=[[1, 3], [2, 2]])
    expected = np.array([[-1.25, 0.75], [-0.25, -0.25]]) / np.sqrt(0.5)
    found = advantage("reinforce_pp", both, baseline="group")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("baseline", ["none", "group"])
@pytest.mark.parametrize("reward", [-2.9666667, 0.8, 3.1333333])
def test_reinforce_pp_of_a_batch_of_equal_rewards_is_zero(view, reward, baseline):
    """Whatever their mean is rounded to."""
    length = np.arange(3, 131).reshape(16, 8)
    seen = view(logp=np.zeros((16, 8, 130)), reward=np.full((16, 8), reward), length=length)
    assert not np.any(advantage("reinforce_pp", seen, baseline=baseline))


def test_entropy_bonus_never_turns_the_sign(view):
    entropy = [[[1.0, 0.1], [1.0, 0.1]]]
    region = [[[Region.THINK, Region.NAME]] * 2]
    seen = view(entropy=entropy, region=region, reward=[[0, 2]])
    expected = [[[-HALF / 2, -HALF + 0.04], [1.5 * HALF, HALF + 0.04]]]
    np.testing.assert_allclose(advantage("entropy", seen), expected, rtol=1e-5)
    thought = [[[-HALF / 2, -HALF], [1.5 * HALF, HALF]]]
    found = advantage("entropy", seen, regions=("think",))
    np.testing.assert_allclose(found, thought, rtol=1e-5)


def test_hicra_raises_planning_in_the_thought(view):
    region = [[[Region.THINK, Region.THINK, Region.RESPONSE]] * 2]
    seen = view(region=region, marked=[[[True, False, True]] * 2], reward=[[0, 2]])
    expected = [[[-0.8 * HALF, -HALF, -HALF], [1.2 * HALF, HALF, HALF]]]
    np.testing.assert_allclose(advantage("hicra", seen), expected, rtol=1e-5)


def test_optimal_baseline(view):
    """Squared scores: 2 - 2 x 0.5 - 0.5 = 0.5 a token, and 0.3. The baseline is 7/4 as long as both continue."""
    half = np.log(0.5)
    logp = np.full((1, 2, 3), half)
    gini = [[[0.5] * 3, [0.7] * 3]]
    seen = view(logp=logp, gini=gini, reward=[[1, 3]], length=[[2, 3]])
    expected = [[[-3 / 4, -3 / 4, 0], [5 / 4, 5 / 4, 0]]]
    np.testing.assert_allclose(advantage("optimal_baseline", seen), expected, rtol=1e-4, atol=1e-6)
    # the second completion's first token is certain, and then W is 0.0 and 0.3
    sure = view(
        logp=[[[half] * 3, [0, half, 0]]],
        gini=[[[0.5] * 3, [0, 0.7, 0]]],
        reward=[[1, 3]],
        length=[[2, 2]],
    )
    found = advantage("optimal_baseline", sure)
    np.testing.assert_allclose(found[0, :, 0], [0, 2], atol=1e-6)
    np.testing.assert_allclose(found[0, 1, 1], 3 - (1 * 1 + 3 * 0.3) / 1.3, rtol=1e-4)


def test_optimal_baseline_of_tokens_that_were_certain(view):
    """Their squared scores are far below what rounding leaves in a Gini: never negative, and the mean where all are zero."""
    reward, noise = [[4, 3, 2, 1]], np.array([[[2e-6], [-2e-6], [1e-6], [0]]])
    certain = view(logp=np.zeros((1, 4, 1)), gini=noise, reward=reward)
    expected = [[[1.5], [0.5], [-0.5], [-1.5]]]
    np.testing.assert_allclose(advantage("optimal_baseline", certain), expected, atol=1e-6)
    nearly = np.array([[[1e-5], [2e-5], [1e-5], [1e-6]]])  # 1 - p
    seen = view(logp=np.log1p(-nearly), gini=2 * nearly + noise, reward=reward)
    found = np.asarray(advantage("optimal_baseline", seen))[0, :, 0]
    # somewhere between the rewards, as for any squared scores within a factor of two of (1 - p)^2
    low, high = (np.average(reward[0], weights=w) for w in ([1, 8, 2, 0], [2, 4, 1, 0]))
    assert low < 4 - found[0] < high and np.ptp(found + np.arange(4)) < 1e-5


def test_advantages_are_float32(view):
    seen = view(entropy=T, marked=T, reward=REWARD.astype(np.float16))
    assert all(advantage(name, seen).dtype == jnp.float32 for name in ("grpo", "hicra"))
