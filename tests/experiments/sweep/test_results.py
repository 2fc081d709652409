"""Results: one row a trial whatever befell it, best first, the same numbers in table, CSV and pictures."""

import csv

import matplotlib.image
import optuna
import pytest

from rest_jax.experiments.sweep import pictures, queue, results, study

PARAMETERS = {
    "curriculum.alpha_format": {"low": 0.0, "high": 1.0},
    "weights.w_max": {"low": 1.0, "high": 10.0, "log": True},
    "curriculum.shape": {"choices": ["linear", "sqrt"]},
    "curriculum.param_max": {"choices": [None, 1]},
}
STATES = optuna.trial.TrialState


@pytest.fixture
def sweep(make, tmp_path):
    """(space, study): complete, pruned, invalid, lost twice, lost and complete, running; by hand."""
    space, shared = make(sampler="random", trials=9, attempts=2, parameters=PARAMETERS)
    opened = study.open_study(space, shared, str(tmp_path / "journal"))

    def add(slot, state, curve=(), reason=None, attempt=0, losses=0, w_max=2.0):
        attrs = {
            queue.SLOT: slot,
            queue.ATTEMPT: attempt,
            queue.FOLDER: f"runs/{slot}",
            queue.LOSSES: losses,
        }
        attrs[queue.BEAT] = {"time": 0.0, "worker": "a:b:1", "seconds": 10.0}
        if reason:
            attrs[queue.ENDED] = dict(zip(("state", "reason"), reason, strict=True))
        values = dict(zip(PARAMETERS, (slot / 10, w_max, "sqrt", 1), strict=True))
        spread = [
            optuna.distributions.FloatDistribution(0, 1),
            optuna.distributions.FloatDistribution(1, 10, log=True),
            optuna.distributions.CategoricalDistribution(("linear", "sqrt")),
            optuna.distributions.CategoricalDistribution((None, 1)),
        ]
        opened.add_trial(
            optuna.create_trial(
                state=state,
                value=curve[-1] if state in (STATES.COMPLETE, STATES.PRUNED) and curve else None,
                params=values,
                distributions=dict(zip(PARAMETERS, spread, strict=True)),
                user_attrs=attrs,
                intermediate_values={2 * i: x for i, x in enumerate(curve)},
            )
        )

    add(0, STATES.COMPLETE, (0.0, 1.0), ("complete", "complete at step 2"))
    add(1, STATES.FAIL, (0.0, 0.5))
    add(1, STATES.COMPLETE, (0.0, 0.5, 2.5), ("complete", "complete at step 4"), attempt=1)
    add(2, STATES.PRUNED, (0.0, 0.1), ("pruned", "pruned at step 2: eval/reward 0.1"))
    add(3, STATES.PRUNED, (), ("invalid", "not a config: weights: w_min"))
    add(4, STATES.FAIL)
    add(4, STATES.FAIL, attempt=1, losses=1)
    add(5, STATES.FAIL)
    add(6, STATES.RUNNING, (0.25,))
    add(7, STATES.FAIL, (), ("failed", "exit code 1: NaN"))
    # killed after it wrote how it ended and before it ended: lost, whatever is written there
    add(8, STATES.FAIL, (0.0, 9.0), ("complete", "complete at step 2"))
    return space, opened


def test_rows(sweep):
    space, opened = sweep
    found = {row.number: row for row in results.rows(opened.get_trials(), space)}
    assert {number: row.state for number, row in found.items()} == {
        0: "complete", 1: "complete", 2: "pruned", 3: "invalid", 4: "failed", 5: "waiting",
        6: "running", 7: "failed", 8: "waiting",
    }  # fmt: skip
    assert (found[1].value, found[1].step, found[1].attempts, found[1].seconds) == (2.5, 4, 2, 20.0)
    assert found[4].reason == "its worker was lost 2 times"
    order = [row.number for row in results.ranked(list(found.values()), space)]
    assert order[:3] == [1, 0, 2] and order[-1] == 3
    fewest = space.model_copy(update={"direction": "minimize"})
    assert [r.number for r in results.ranked(list(found.values()), fewest)][:2] == [0, 1]


def test_files_and_table(sweep, tmp_path):
    space, opened = sweep
    text = results.write(opened, space, tmp_path / "out")
    assert "best: trial 1, eval/reward 2.5: curriculum.alpha_format=0.1 weights.w_max=2" in text
    assert "9 trials: 2 complete, 1 pruned, 1 running, 2 waiting, 2 failed, 1 invalid" in text
    lines = text.splitlines()
    assert lines[0].split()[:7] == [
        "trial", "state", "eval/reward", "alpha_format", "w_max", "shape", "param_max",
    ]  # fmt: skip
    assert lines[2].split()[:4] == ["1", "complete", "2.5", "0.1"]
    with (tmp_path / "out" / results.CSV_FILE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == [str(i) for i in range(9)]
    assert rows[1]["eval/reward"] == "2.5" and rows[1]["seconds"] == "20.0"
    assert rows[7]["reason"] == "exit code 1: NaN" and rows[7]["folder"] == "runs/7"
    for name in (pictures.PARALLEL, pictures.CURVES):
        image = matplotlib.image.imread(tmp_path / "out" / name)
        assert image.shape[0] > 300 and image.std() > 0.02
    assert not list((tmp_path / "out").glob("*.partial"))


def test_nothing_begun_is_no_picture(make, tmp_path):
    space, shared = make(sampler="random", trials=2, parameters=PARAMETERS)
    opened = study.open_study(space, shared, str(tmp_path / "journal"))
    assert "some, 2 trials: 2 to come" in results.write(opened, space, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [results.CSV_FILE]


def test_importances_need_enough_trials_and_find_what_matters(make, tmp_path):
    space, shared = make(
        sampler="random", trials=40, parameters={k: PARAMETERS[k] for k in list(PARAMETERS)[:2]}
    )
    opened = study.open_study(space, shared, str(tmp_path / "journal"))
    while (found := queue.take(opened, space)) is not None:
        trial, frozen = found
        opened.sampler = study.make_sampler(space, frozen.user_attrs[queue.SLOT])
        values = [parameter.suggest(trial, key) for key, parameter in space.parameters.items()]
        trial.set_user_attr(queue.ENDED, {"state": "complete", "reason": ""})
        opened.tell(trial, values[0])  # the second does nothing
        text = results.write(opened, space, tmp_path) if trial.number in (3, 39) else ""
        assert ("importance (PED" in text) == (trial.number == 39)
    shares = [
        float(part.rpartition(" ")[2])
        for part in text.partition("trials): ")[2].splitlines()[0].split(", ")
    ]
    assert (
        shares[0] > 0.7
        and "curriculum.alpha_format" in text.partition("trials): ")[2].split(",")[0]
    )


def test_names_are_short_where_they_can_be():
    assert results.short_names(["a.steps", "b.steps", "b.c"]) == {
        "a.steps": "a.steps", "b.steps": "b.steps", "b.c": "c",
    }  # fmt: skip
