"""The table at the end of a run: each evaluation once, the best one marked, with intervals."""

import pytest

from rest_jax import config
from rest_jax.analysis.closing import print_closing_table
from rest_jax.run.metrics import MetricsWriter

EVAL = {"eval/format": 1.0, "eval/reward": 1.5, "eval/reward_std": 0.5, "eval/prompts": 100,
        "eval/prompts_without_calls": 0, "eval/spurious": 0.0}  # fmt: skip


def fill(run, steps, supervised=False):
    (run / "config.yaml").write_text(config.dump(config.load(["scale/tiny", "method/rest"])))
    writer = MetricsWriter(run)
    for step, exact in steps.items():
        if step:
            own = {"update/loss": 2.0 / step, "update/tokens": 10}
            own |= {} if supervised else {"reward/mean": float(step), "rollout/tokens": 1200}
            writer.write(step, own | {"time/step": 40.0, "time/update": 10.0})
        if exact is not None:
            writer.write(step, EVAL | {"eval/exact": exact, "time/eval": 5.0})
    writer.close()


@pytest.mark.parametrize(
    ("steps", "header"),
    [
        ({0: 0.25, 2: 0.75, 4: 0.5}, "step 0 step 2 (best) step 4"),
        ({0: 0.25, 4: 0.5}, "step 0 step 4 (best)"),
        ({4: 0.5}, "step 4"),
    ],
    ids=["in the middle", "last", "only one"],
)
def test_it_has_the_first_the_best_and_the_last_evaluation_once(tmp_run, capsys, steps, header):
    fill(tmp_run, steps)
    print_closing_table(tmp_run)
    first, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert first.split() == [
        "held",
        "out,",
        "95",
        "%",
        "interval",
        *header.split(),
        "what",
        "it",
        "is",
    ]
    found = {line.split("  ")[0].strip(): " ".join(line.split()) for line in rows}
    # Wilson's interval of 50 of 100
    assert "50.0% (40.4% to 59.6%)" in found["eval/exact"]
    assert "1.5 (1.402 to 1.598)" in found["eval/reward"]
    assert "eval/prompts" not in found and "(" not in found["eval/spurious"]
    trained = len(steps.keys() - {0})
    seconds = 40 * trained + 5 * len(steps)
    assert f"{seconds // 60}:{seconds % 60:02d} (updates" in found["time"]
    assert found["tokens"] == f"tokens {1200 * trained:,} sampled"
    assert f"rest-jax report {tmp_run}" in found["next"]
    assert f"rest-jax export {tmp_run} {tmp_run}-exported" in found["next"]
    assert (tmp_run / "curves.png").is_file()


def test_a_supervised_run_without_evaluations_has_its_loss(tmp_run, capsys):
    fill(tmp_run, {1: None, 2: None}, supervised=True)
    print_closing_table(tmp_run)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "loss    2 in the first step, 1 in the last, of 2, each on prompts of its own"
    )
    assert lines[1] == "tokens  20 trained on"
