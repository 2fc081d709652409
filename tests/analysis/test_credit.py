"""Exact credit: shares of games that can be worked out by hand, states, what a rule's rank correlation can be, the command."""

import json

import numpy as np
import pytest

from rest_jax import cli
from rest_jax.analysis.credit import (
    Credit,
    States,
    credit,
    find_states,
    rank_rows,
    region_rows,
    totals,
)
from rest_jax.types import RolloutBatch

PROMPTS, GROUP, COUNT = 64, 4, 512
FIRST, SECOND, IDLE, CERTAIN = 3, 4, 5, 1  # regions of the tokens below


def play(rng, shape) -> np.ndarray:
    """Completions of four tokens, a certain one and three coins; [..., 4]."""
    coins = rng.integers(0, 2, (*shape, 3))
    return np.concatenate([np.full((*shape, 1), 7), coins], axis=-1)


def reward(tokens: np.ndarray) -> np.ndarray:
    """1 if the first two coins are heads; the third decides nothing."""
    return (tokens[..., 1] & tokens[..., 2]).astype(np.float64)


@pytest.fixture(scope="module")
def game() -> tuple[RolloutBatch, States, np.ndarray]:
    """Completions, their states, and the rewards of continuations of each."""
    rng = np.random.default_rng(0)
    ids = play(rng, (PROMPTS, GROUP)).astype(np.int32)
    half = np.full(ids.shape, 0.5, np.float32)
    half[..., 0] = 0.0
    zero = np.zeros(ids.shape, np.float32)
    rollout = RolloutBatch(
        np.ones((PROMPTS, 1), np.int32), np.ones(PROMPTS, np.int32), ids,
        np.full(ids.shape[:2], 4, np.int32), zero, zero, half,
    )  # fmt: skip
    states = find_states(rollout)
    rewards = []
    for prefix in states.prefix:
        drawn = play(rng, (COUNT,))
        drawn[:, : len(prefix)] = prefix
        rewards.append(reward(drawn))
    return rollout, states, np.array(rewards)


def region(rollout: RolloutBatch) -> np.ndarray:
    return np.broadcast_to([CERTAIN, FIRST, SECOND, IDLE], rollout.responses.shape)


def test_states_are_shared_and_lie_before_uncertain_tokens(game):
    rollout, states, _ = game
    # of a prompt: before the first coin, behind heads or tails, behind both coins
    assert {len(prefix) for prefix in states.prefix} == {1, 2, 3}
    assert len(states.prefix) <= PROMPTS * (1 + 2 + 4)
    assert (states.before[..., 0] == -1).all() and (states.after[..., 3] == -1).all()
    assert (states.after[..., 1:3] == states.before[..., 2:]).all()
    for p, g, t in ((0, 0, 2), (5, 3, 1)):
        state = states.before[p, g, t]
        assert states.prompt[state] == p
        assert states.prefix[state].tolist() == rollout.responses[p, g, :t].tolist()


def test_shares_are_those_of_the_game(game):
    """Var R = 3/16; knowing the first coin leaves 1/8 of it on average, the second none, the third decides nothing."""
    rollout, states, rewards = game
    found = credit(states, rewards)
    rows = region_rows(found, region(rollout))
    for name, share in (("name", 1 / 3), ("param", 2 / 3), ("think", 0.0)):
        row = rows[name]
        assert abs(row["share"] - share) < 4 * row["share_error"] + 1e-9, name
        assert row["share_error"] < 0.1
        assert row["share_interval"][0] <= row["share"] <= row["share_interval"][1]
    assert rows["tag"]["share"] == 0 and rows["tag"]["tokens"] == PROMPTS * GROUP
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_credits_of_a_completion_add_up_to_the_variance_of_its_prompt(game):
    rollout, states, rewards = game
    found = credit(states, rewards)
    at_start = rewards[states.before[..., 1]].var(axis=-1, ddof=1)
    np.testing.assert_allclose(found.credit.sum(-1), at_start, atol=1e-12)
    sums = totals(found, reward(rollout.responses))
    assert abs(sums["decided"]["mean"] - 3 / 16) < 0.01
    for check in ("difference", "continued"):
        assert abs(sums[check]["mean"]) < 4 * sums[check]["error"]
    # continuations that do not go on as the completions do
    broken = totals(credit(states, rewards * 0.5), reward(rollout.responses))["continued"]
    assert broken["mean"] < -4 * broken["error"]


def test_one_random_token_decides_everything():
    ids = np.array([[[7, 0, 8], [7, 1, 8]]], np.int32)
    gini = np.array([[[0, 0.5, 0], [0, 0.5, 0]]], np.float32)
    zero = np.zeros(ids.shape, np.float32)
    one, length = np.ones(1, np.int32), np.full((1, 2), 3, np.int32)
    states = find_states(RolloutBatch(one[None], one, ids, length, zero, zero, gini))
    assert len(states.prefix) == 1
    found = credit(states, np.random.default_rng(0).integers(0, 2, (1, 64)))
    assert (found.credit[..., [0, 2]] == 0).all() and (found.error[..., [0, 2]] == 0).all()
    assert (found.credit[..., 1] > 0.2).all()


def test_standard_errors_are_those_of_repeated_measurements(game):
    _, states, rewards = game
    parts = [credit(states, part) for part in np.split(rewards, 16, axis=1)]
    spread = np.std([part.credit for part in parts], axis=0, ddof=1)
    said = np.mean([part.error for part in parts], axis=0)
    coins = parts[0].uncertain
    assert said[coins].mean() == pytest.approx(spread[coins].mean(), rel=0.15)


def test_rank_correlation_of_rules(game):
    """What a coin decides also depends on how it falls (heads of the first leave more open than before): that, no rule knows."""
    rollout, states, rewards = game
    found = credit(states, rewards)
    truth = np.broadcast_to([0.0, 1 / 16, 1 / 8, 0.0], rollout.responses.shape)
    rules = {"truth": truth, "reverse": -truth, "uniform": np.ones(truth.shape)}
    rows = rank_rows(found, region(rollout), rules, seed=0)
    assert rows["truth"]["correlation"] > 0.3
    assert rows["truth"]["correlation_interval"][0] > 0.2
    assert rows["reverse"]["correlation"] == pytest.approx(-rows["truth"]["correlation"])
    assert "uniform" not in rows
    assert 0.5 < rows["between halves"]["correlation"] <= 1
    coins = {"all but the third": np.broadcast_to([0.0, 1, 1, 0], truth.shape)}
    of_coins = rank_rows(found, region(rollout), coins, seed=0)["all but the third"]
    assert 0 < of_coins["uncertain"] < of_coins["correlation"]  # without the certain token


def test_what_perfect_weights_would_have(game):
    """Of few continuations: the rank correlation of the true credits of the drawn tokens with the measured ones."""
    rollout, states, rewards = game
    first, second = rollout.responses[..., 1] == 1, np.zeros(rollout.responses.shape[:2])
    truth = np.stack(
        [second, np.where(first, -1 / 16, 3 / 16), np.where(first, 1 / 4, 0), second], -1
    )
    for count in (8, 16):
        parts = np.split(rewards, COUNT // count, axis=1)[:6]
        rows = [
            rank_rows(credit(states, part), region(rollout), {"truth": truth}, 0) for part in parts
        ]
        for over in ("correlation", "uncertain"):
            found, said = (np.mean([x[name][over] for x in rows]) for name in ("truth", "perfect"))
            assert found == pytest.approx(said, abs=0.1) and found > 0.5


@pytest.mark.parametrize(("prompts", "least"), [(8, 0.85), (32, 0.9)])
def test_intervals_of_shares_hold_for_skewed_variances(prompts, least):
    """Many prompts have none, some have much: the bootstrap's held in 0.82 and 0.9 of cases."""
    rng, held = np.random.default_rng(0), []
    regions = np.broadcast_to([[[FIRST, SECOND]]], (prompts, 1, 2))
    for _ in range(400):
        variance = rng.lognormal(0, 1, prompts) * (rng.random(prompts) > 0.3)
        share = rng.beta(1, 1.5, prompts)  # of mean 0.4
        parts = np.stack([variance * share, variance * (1 - share)], -1)[:, None]
        nothing = np.zeros(parts.shape)
        found = Credit(parts, parts > 0, nothing, nothing, np.stack([nothing] * 2))
        low, high = region_rows(found, regions)["name"]["share_interval"]
        held.append(low <= 0.4 <= high)
    assert np.mean(held) > least


@pytest.mark.slow
def test_the_command(tmp_path):
    words = ["rollout.group_size=2", "rollout.max_response_tokens=64", "data.brief_prompt=true"]
    words += ["--prompts", "3", "--limit", "8", "--continuations", "8", "--output", str(tmp_path)]
    assert cli.main(["credit", "configs/quickstart_policy", "synthetic:eval", *words]) == 0
    report = json.loads((tmp_path / "credit.json").read_text())
    assert sum(row["share"] for row in report["regions"].values()) == pytest.approx(1)
    assert len(report["completions"]) == 6 and (tmp_path / "credit.png").exists()


def test_too_few_are_refused(capsys):
    words = ["credit", "configs/quickstart_policy", "synthetic:eval", "--continuations", "2"]
    assert cli.main(words) == 2
    assert "--continuations 2: four are the least" in capsys.readouterr().err


@pytest.mark.wide
def test_rewards_that_are_all_equal_are_refused(tmp_path, capsys):
    plugin = tmp_path / "rewards.py"
    plugin.write_text("def score(completion, record):\n    return {'same': 1.0}\n")
    words = [f"reward.plugin={plugin}:score", "reward.builtin=false", "data.brief_prompt=true"]
    words += ["rollout.group_size=2", "rollout.max_response_tokens=6", "--limit", "8"]
    words += ["--prompts", "2", "--continuations", "4", "--output", str(tmp_path / "out")]
    assert cli.main(["credit", "configs/quickstart_policy", "synthetic:eval", *words]) == 2
    assert "states have the same reward, so no token decides anything" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))
