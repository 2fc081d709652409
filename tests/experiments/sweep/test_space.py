"""Spaces: every fault of a file in one line, values that no config takes are refused before anything starts."""

import pytest

from rest_jax import builtin
from rest_jax import config as config_lib
from rest_jax.errors import UserError
from rest_jax.experiments.sweep import points, space

ALPHA = {"curriculum.alpha_format": {"low": 0.0, "high": 1.0}}


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
        ({"pruner": "hyperband"}, "pruner: 'hyperband'"),
        ({"pruner": {"successive_halving": {"min_step": 1}}}, "(nearest: min_steps)"),
        ({"parameters": {}}, "parameters: {}"),
        ({"parameters": {"a": {"low": 1}}}, "parameters.a: give choices, or low and high"),
        ({"parameters": {"a": {"low": 2, "high": 1}}}, "a: low 2 is not below high 1"),
        ({"parameters": {"a": {"low": 0, "high": 1, "log": True}}}, "a: log needs low above 0"),
        ({"parameters": {"a": {"low": 1, "high": 2, "stp": 1}}}, "a.stp: unknown key (nearest: step)"),
        ({"parameters": {"a": {"choices": [1], "low": 0}}}, "a: choices stand alone"),
        ({"parameters": {"a": {"choices": [1, 1]}}}, "a: the same choice twice"),
        ({"parameters": {"a": {"choices": [[1]]}}}, "parameters.a.choices.0"),
        ({"parameters": {"a": {"low": 0.5, "high": 2, "int": True}}}, "a: int: low, high and step"),
        ({"parameters": {"name": {"choices": ["x"]}}}, "name: every trial has its own"),
        ({"parameters": ALPHA, "overrides": {"curriculum.alpha_format": 1}}, "and in overrides"),
        ({"sampler": "grid"}, "sampler grid: curriculum.alpha_format: give choices or step"),
        (
            {"sampler": "grid", "parameters": {"seed": {"low": 0, "high": 200_000, "int": True}}},
            "sampler grid: 200,001 points",
        ),
    ],
)  # fmt: skip
def test_what_a_space_file_may_not_say(write_space, values, said):
    path = write_space(**({"sampler": "random", "trials": 3, "parameters": ALPHA} | values))
    line = refused(space.load, path)
    assert said in line and str(path) in line and "\n" not in line


def test_every_fault_at_once(write_space):
    path = write_space(sampler="x", parameters={"a": {"low": 1}, "b": {"lwo": 1}}, trial=3)
    line = refused(space.load, path)
    for said in ("sampler: 'x'", "trial: unknown key", "parameters.a: give", "b.lwo: unknown key"):
        assert said in line


@pytest.mark.parametrize(("text", "said"), [("[", "not YAML"), ("- 1", "a mapping is needed")])
def test_not_a_mapping(tmp_path, text, said):
    (tmp_path / "s.yaml").write_text(text)
    assert said in refused(space.load, tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("key", "parameter", "said"),
    [
        ("curriculum.alpha_fromat", {"low": 0, "high": 1}, "unknown key (nearest: alpha_format)"),
        ("curiculum.alpha_format", {"low": 0, "high": 1}, "unknown key (nearest: curriculum)"),
        ("curriculum.alpha_format", {"low": -1, "high": 1}, "curriculum.alpha_format: -1"),
        ("weights.entropy_floor", {"low": 0, "high": 1}, "weights.entropy_floor: 0"),
        ("curriculum.shape", {"choices": ["linear", "bent"]}, "curriculum.shape: 'bent'"),
        ("curriculum.stages", {"low": 2, "high": 8}, "with a fractional part (set int: true)"),
        ("train.steps.more", {"low": 2, "high": 8}, "steps is a value of the config"),
    ],
)
def test_ends_that_no_config_takes(make, key, parameter, said):
    found, shared = make(sampler="random", trials=3, parameters={key: parameter})
    assert said in refused(points.check, found, shared)


def test_what_fails_only_together_is_left_to_the_sweep(make):
    both = {"weights.w_min": {"choices": [0.1, 5.0]}, "weights.w_max": {"choices": [4.0, 0.05]}}
    points.check(*make(sampler="grid", parameters=both))
    never = {"weights.w_min": {"choices": [5.0, 6.0]}, "weights.w_max": {"choices": [4.0, 2.0]}}
    line = refused(points.check, *make(sampler="grid", parameters=never))
    assert "none of 64 drawn combinations" in line and "is above w_max" in line


def test_a_sweep_needs_evaluations(make):
    halving = {"pruner": {"successive_halving": {"min_steps": 2}}}
    plain = {"sampler": "random", "trials": 2, "parameters": ALPHA}
    line = refused(points.check, *make(**plain, **halving, overrides={"train.eval_every": 0}))
    assert "train.eval_every: 0" in line
    line = refused(points.check, *make(**plain, overrides={"data.eval": None}))
    assert "needs held-out data" in line


def test_the_command_line_does_not_set_what_the_sweep_does(make, recipe):
    found, _ = make(sampler="random", trials=2, parameters=ALPHA)
    for override in ("curriculum.alpha_format=1", "name=x"):
        assert override.partition("=")[0] in refused(points.base, found, recipe, [override])


def test_a_grid_is_every_combination_once(make):
    parameters = {
        "curriculum.alpha_format": {"low": 0.1, "high": 0.5, "step": 0.2},
        "curriculum.stages": {"low": 2, "high": 4, "int": True},
        "curriculum.param_max": {"choices": [None, 1.2]},
    }
    found, shared = make(sampler="grid", parameters=parameters)
    grid = found.grid()
    assert len({tuple(point.values()) for point in grid}) == len(grid) == found.size() == 3 * 3 * 2
    assert {point["curriculum.alpha_format"] for point in grid} == {0.1, 0.3, 0.5}
    config = points.point_config(shared, grid[0], shared_folder := config_folder(shared))
    assert config.curriculum.stages == grid[0]["curriculum.stages"]
    assert (config.name, config.output) == (shared_folder.name, str(shared_folder.parent))
    assert make(sampler="grid", trials=5, parameters=parameters)[0].size() == 5


def config_folder(shared: config_lib.Config):
    import pathlib

    return pathlib.Path(shared.output) / "some" / "trial-0000"


@pytest.mark.parametrize(
    "form", ["curriculum", "curriculum.yaml", "configs/sweeps/curriculum.yaml"]
)
def test_the_shipped_space_is_found_and_fits_the_recipes(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    found = space.load(builtin.find_space(form))
    for recipe in ("quickstart", "qwen3_1p7b_rlla"):
        points.check(found, points.base(found, builtin.find_config(recipe)))
    assert "curriculum" in refused(builtin.find_space, "nothing")
