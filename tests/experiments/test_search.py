"""Spaces: every fault of a file in one line, values that no config takes are refused before anything starts; points."""

import pathlib

import optuna
import pytest

from rest_jax import config as config_lib
from rest_jax.errors import UserError
from rest_jax.experiments.search import Space, draw, shared_job, sweep
from rest_jax.experiments.worker import Job

ALPHA = {"curriculum.alpha_format": {"low": 0.0, "high": 1.0}}
SEEDS = {"low": 0, "high": 4294967295, "int": True}
RANDOM = {"sampler": "random", "trials": 3, "parameters": ALPHA}


def load(path) -> Space:
    return config_lib.validate_as(Space, config_lib.read_mapping(path), f"space {path}")


def refused(function, *args) -> str:
    with pytest.raises(UserError) as stop:
        function(*args)
    return str(stop.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"parameter": ALPHA}, "parameter: unknown key (nearest: parameters)"),
        ({"sampler": "bayes"}, "sampler: 'bayes': Input should be 'grid', 'random' or 'tpe'"),
        ({"metric": "eval/rewards"}, "'eval/rewards': not a held-out metric (nearest: eval/reward)"),
        ({"metric": "reward/mean"}, "not a held-out metric"),
        ({"trials": 0}, "trials: 0"),
        ({"trials": None}, "trials: sampler random needs a number of them"),
        ({"pruner": {"hyperbland": {}}}, "pruner hyperbland: one of median, percentile"),
        ({"pruner": {"median": {"warmup": 1}}}, "pruner median: "),
        ({"pruner": {"successive_halving": {"min_resource": 0}}}, "min_resource"),
        ({"parameters": {}}, "parameters: {}"),
        ({"parameters": {"a": {"low": 1}}}, "parameters.a: give choices, or low and high"),
        ({"parameters": {"a": {"low": 2, "high": 1}}}, "parameters.a: "),
        ({"parameters": {"a": {"low": 0, "high": 1, "log": True}}}, "parameters.a: "),
        ({"parameters": {"a": {"low": 1, "high": 2, "step": -1}}}, "parameters.a: "),
        ({"parameters": {"a": {"low": 1, "high": 2, "stp": 1}}}, "a.stp: unknown key (nearest: step)"),
        ({"parameters": {"a": {"choices": [1], "low": 0}}}, "a: choices stand alone"),
        ({"parameters": {"a": {"choices": []}}}, "parameters.a: "),
        ({"parameters": {"a": {"choices": [[1]]}}}, "parameters.a.choices.0"),
        ({"parameters": {"a": {"low": 0.5, "high": 2, "int": True}}}, "a: int: low, high and step"),
        ({"parameters": {"name": {"choices": ["x"]}}}, "name: every trial has its own"),
        ({"overrides": {"curriculum.alpha_format": 1}}, "and in overrides"),
        ({"sampler": "grid"}, "sampler grid: curriculum.alpha_format: give choices or step"),
        ({"sampler": "grid", "parameters": {"seed": SEEDS}}, "grid: 4,294,967,296 points, at most 100,000"),
        ({"parameters": {"seed": {"low": 0, "high": 1e300, "step": 1e-300}}}, "seed: low 0.0, high 1e+300"),
        ({"trials": 10**12}, "trials: 1000000000000: Input should be less than or equal to 100000"),
    ],
)  # fmt: skip
def test_what_a_space_file_may_not_say(write_space, values, said):
    path = write_space(**(RANDOM | values))
    line = refused(load, path)
    assert said in line and path in line and "\n" not in line


@pytest.mark.parametrize(
    ("key", "parameter", "said"),
    [
        ("curriculum.alpha_fromat", {"low": 0, "high": 1}, "unknown key (nearest: alpha_format)"),
        ("curriculum.alpha_format", {"low": -1, "high": 1}, "curriculum.alpha_format: -1"),
        ("curriculum.shape", {"choices": ["linear", "bent"]}, "curriculum.shape: 'bent'"),
        ("curriculum.stages", {"low": 2.5, "high": 8}, "curriculum.stages: 2.5"),
        ("train.steps.more", {"low": 2, "high": 8}, "train.steps"),
    ],
)
def test_ends_that_no_config_takes(recipe, write_space, engine, tmp_path, key, parameter, said):
    path = write_space(**(RANDOM | {"parameters": {key: parameter}}))
    with pytest.raises(UserError) as stop:
        sweep([recipe], [], path, engine=engine)
    assert said in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "runs").exists()


def test_what_fails_only_together_is_left_to_the_sweep(recipe, write_space):
    both = {"weights.w_min": {"choices": [0.1, 5.0]}, "weights.w_max": {"choices": [4.0, 0.05]}}
    shared_job(load(write_space(parameters=both)), [recipe], [])


def test_a_sweep_needs_evaluations(recipe, write_space):
    halving = {"pruner": {"successive_halving": {"min_resource": 2}}}
    space = load(write_space(**halving, overrides={"train.eval_every": 0}))
    assert "train.eval_every: 0" in refused(shared_job, space, [recipe], [])
    space = load(write_space(overrides={"data.eval": None}))
    assert "needs held-out data" in refused(shared_job, space, [recipe], [])


def test_the_command_line_does_not_set_what_the_sweep_does(recipe, write_space):
    space = load(write_space())
    assert "curriculum.alpha_format=..." in refused(
        shared_job, space, [recipe], ["curriculum.alpha_format=1"]
    )


def test_a_grid_is_every_combination_once(write_space):
    parameters = {
        "curriculum.alpha_format": {"low": 0.1, "high": 0.5, "step": 0.2},
        "curriculum.stages": {"low": 2, "high": 4, "int": True},
        "curriculum.param_max": {"choices": [None, 1.2]},
    }
    points = load(write_space(parameters=parameters)).points()
    assert len(points) == len({tuple(point.values()) for point in points.values()}) == 3 * 3 * 2
    assert {point["curriculum.alpha_format"] for point in points.values()} == {0.1, 0.3, 0.5}
    assert {type(point["curriculum.stages"]) for point in points.values()} == {int}
    assert len(load(write_space(parameters=parameters, trials=5)).points()) == 5


def test_a_range_that_is_drawn_from_may_have_any_number_of_values(write_space):
    for sampler in ("random", "tpe"):
        space = load(write_space(sampler=sampler, trials=2, parameters={"seed": SEEDS}))
        assert len(space.points()) == 2


def test_random_points_are_the_same_for_all_workers(recipe, write_space, tmp_path):
    """Whoever draws them, in whatever order, when the trial begins."""
    space, job = load(write_space(**RANDOM)), Job("train", (recipe,))
    assert space.points() == {f"trial-000{i}": {} for i in range(3)}

    def points(runs) -> dict:
        study = optuna.create_study()
        return {run: draw(space, job, tmp_path, study.ask(), run).overrides[0] for run in runs}

    first = points(list(space.points()))
    assert points(list(reversed(first))) == first and len(set(first.values())) == 3


def test_tpe_draws_and_more_trials_may_follow(recipe, write_space, engine, capsys):
    space = write_space(**(RANDOM | {"sampler": "tpe", "trials": 1}))
    sweep([recipe], [], space, engine=engine, name="s")
    folder = sweep([recipe], [], space, engine=engine, name="s", trials=2)
    shown = capsys.readouterr().out
    assert shown.count("complete at step 8") == 2
    assert len((folder / "results.csv").read_text().splitlines()) == 3
    with pytest.raises(UserError, match=r"begun differently \(config.seed: 0 there, 5 now\)"):
        sweep([recipe], ["seed=5"], space, engine=engine, name="s")


@pytest.mark.parametrize("name", ["../x", "", "a b", "/x"])
def test_a_name_that_is_no_folder_of_the_output_is_refused(
    recipe, write_space, engine, tmp_path, name
):
    before = sorted(tmp_path.rglob("*"))
    space = write_space()
    with pytest.raises(UserError, match=f"--name {name}: name: "):
        sweep([recipe], [], space, engine=engine, name=name)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, pathlib.Path(space)])


def test_the_builtin_space_fits_every_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = load(config_lib.builtin_file("curriculum", "sweeps"))
    for scale in ("scale/tiny", "scale/qwen3_1p7b"):
        shared_job(space, [scale, "method/rest"], [])
