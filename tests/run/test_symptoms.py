"""Signs that a run learns nothing are said once each, after some steps in a row."""

import pytest

from rest_jax.run.symptoms import STEPS, Watch

SOUND = {
    "reward/mean": 1.0,
    "reward/equal_groups": 0.5,
    "reward/format_score": 0.5,
    "rollout/response_tokens_max": 9.0,
    "rollout/truncated": 0.0,
    "rollout/entropy": 0.5,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout/response_tokens_max": 1.0}, "completions are empty"),
        ({"rollout/truncated": 1.0, "rollout/entropy": 1e-6}, "without an end"),
        ({"reward/equal_groups": 1.0}, "rewards of every group are equal"),
        ({"reward/format_score": 0.0}, "no completion is in the format"),
    ],
)
def test_each_is_said_once_and_only_after_steps_in_a_row(changes, said):
    watch, sick = Watch(), SOUND | changes
    steps = [*[sick] * (STEPS - 1), SOUND, *[sick] * (3 * STEPS)]
    found = [watch.look(metrics) for metrics in steps]
    (line,) = found[2 * STEPS - 1]
    assert said in line and line.startswith(f"warning: for {STEPS} steps")
    assert sum(map(len, found)) == 1


def test_a_supervised_run_has_no_rewards_to_look_at():
    watch = Watch()
    assert not any(watch.look({"update/loss": 1.0}) for _ in range(2 * STEPS))
