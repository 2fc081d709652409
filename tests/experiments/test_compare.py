"""Comparisons: fair plans, runs carried out once, tables and sentences that follow from the numbers, pages from tables."""

import csv
import pathlib
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml

from rest_jax import config as config_lib
from rest_jax.errors import RunStopped, UserError
from rest_jax.evaluation.statistics import estimate
from rest_jax.experiments import figures, results
from rest_jax.experiments.compare import Plan, compare, gather, write_page
from rest_jax.experiments.worker import Engine
from tests.programs.pretend_train import finish

RATES = {"grpo": (0.50, 0.52, 0.54), "rest": (0.60, 0.63, 0.64), "rest_mass": (0.45, 0.60, 0.53)}
PAGE_ONLY = Engine(workers=0)


@pytest.fixture
def plan_file(tmp_path):
    """Writes a plan file, with changes; its path."""

    def write(name: str = "tiny", **changes) -> str:
        plan = {
            "title": "A tiny comparison",
            "scale": "scale/tiny_single",
            "methods": list(RATES),
            "reference": "grpo",
            "pairs": [["rest_mass", "rest"]],
            "seeds": [0, 1, 2],
            "overrides": {"train.steps": 6, "train.eval_every": 2, "train.checkpoint_every": 3},
            "output": str(tmp_path / "runs"),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(plan | changes))
        return str(path)

    return write


def load(path: str) -> Plan:
    return config_lib.validate_as(Plan, config_lib.read_mapping(path), f"plan {path}")


@pytest.mark.parametrize("name", ["single", "reasoned", "tried"])
def test_builtin_plans_are_fair(name):
    """Within a seed nothing differs but what the method is; seeds differ in nothing but the seed."""
    plan = load(str(config_lib.builtin_file(name, "comparisons")))
    configs = {key: job.config() for key, job in plan.jobs(name).items()}
    assert len({config.folder for config in configs.values()}) == len(configs)
    assert len(configs) == len(plan.methods) * 5
    method_parts, by_method = ("weights", "curriculum", "loss", "reward"), {}
    for (method, seed), config in configs.items():
        same, other = next(iter(configs.values())).model_dump(), config.model_dump()
        for part in ("name", "seed", *method_parts):
            same.pop(part), other.pop(part)
        assert same == other and config.seed == seed
        parts = {part: getattr(config, part) for part in method_parts}
        assert by_method.setdefault(method, parts) == parts
    assert [seed for _, seed in configs] == sorted(seed for _, seed in configs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "sft"}, "'sft' of reference or pairs is not among the methods"),
        ({"pairs": [["rest", "sft"]]}, "'sft' of reference or pairs"),
        ({"pairs": [], "methods": ["grpo", "grpo"]}, "names one twice"),
        ({"seeds": []}, "seeds"),
        ({"speed": 3}, "speed: unknown key (nearest: seeds)"),
        ({"pairs": [], "methods": ["grpo", "grop"]}, "method/grop: no such file"),
        ({"scale": "nowhere"}, "nowhere"),
        ({"overrides": {"train.steps": None}}, "train.steps must be set"),
        ({"overrides": {"train.stps": 1}}, "train.stps: unknown key (nearest: steps)"),
    ],
)
def test_bad_plans_are_refused(plan_file, tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        compare([plan_file(**changes)], output=str(tmp_path / "page"), engine=PAGE_ONLY)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "page").exists()


def test_unknown_plan():
    with pytest.raises(UserError, match="comparisons nothing: no such file"):
        compare(["nothing"], engine=PAGE_ONLY)


@pytest.fixture
def finished(plan_file):
    """A plan whose runs are finished: rest clearly above grpo, rest_mass not clearly anything."""
    path = plan_file()
    for (method, seed), job in load(path).jobs("tiny").items():
        finish(job.config(), RATES[method][seed])
    return path


@pytest.fixture(autouse=True)
def draw_nothing(request, monkeypatch):
    """Figures take seconds: only the tests that ask for them draw them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("rest_jax.experiments.compare.write_figures", lambda *_: None)


@pytest.fixture
def drawn():
    """Figures are drawn."""


@pytest.fixture
def page(finished, tmp_path) -> pathlib.Path:
    return compare([finished], output=str(tmp_path / "page"), engine=PAGE_ONLY)


def test_differences_are_paired(finished, tmp_path):
    folders = {key: job.config().folder for key, job in load(finished).jobs("tiny").items()}
    results.store(folders, "tiny", tmp_path)
    found = results.read("tiny", tmp_path)
    difference, expected = (
        found.difference("rest", "grpo", "eval/exact"),
        estimate([0.10, 0.11, 0.10]),
    )
    assert (difference.mean, difference.t_low) == pytest.approx((expected.mean, expected.t_low))
    assert found.mean("grpo", "eval/exact").mean == pytest.approx(0.52)
    assert found.mean("grpo", "time/cpu").mean == 2.0  # compiling steps left out
    assert found.runs["rest", 0]["start/exact"] == 0.4


def test_the_page_says_what_the_intervals_say(drawn, page):
    written = page.read_text()
    assert (
        "- `rest` against `grpo`: held-out exact answers +10.3 points (95 % CI +8.9 to +11.8).\n"
        in written
    )
    (line,) = (x for x in written.splitlines() if x.startswith("- `rest_mass` against `grpo`"))
    assert line.endswith("The held-out difference is not significant.")
    assert "- `rest_mass` against `rest`: " in written
    assert "of which 40% are reasoning" in written and "an exact rate of 40.0%" in written
    assert "not finished" not in written and "tried.md" not in written
    pictures = [x.split("(")[1].rstrip(")") for x in written.splitlines() if x.startswith("![")]
    assert len(pictures) == 4
    assert all((page.parent / x).read_bytes().startswith(b"\x89PNG") for x in pictures)


def test_tables_hold_every_run_and_render_the_same_page(finished, page, tmp_path):
    folder = page.parent
    with (folder / "tiny_runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {(r["method"], r["seed"], r["eval/exact"]) for r in rows} >= {("rest", "1", "0.63")}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "runs")
    page.write_text("")
    compare([finished], output=str(folder), engine=PAGE_ONLY)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = [path.name for path in before if before[path] != after.get(path)]
    assert changed == [] and after.keys() == before.keys()


def test_the_page_of_the_repository_follows_from_its_tables(tmp_path, configs_dir, monkeypatch):
    """docs/study is what the command makes of the results stored in it."""
    monkeypatch.chdir(tmp_path)  # without run folders
    source = configs_dir.parent / "docs" / "study"
    names = ["single", "reasoned", "tried"]
    plans = {name: load(str(config_lib.builtin_file(name, "comparisons"))) for name in names}
    (tmp_path / "tried.md").touch()
    written = write_page([gather(name, plan, source) for name, plan in plans.items()], tmp_path)
    assert written.read_text() == (source / "README.md").read_text()


def test_notes_are_linked_where_they_are(finished, page):
    (page.parent / "tried.md").write_text("# Tried\n")
    compare([finished], output=str(page.parent), engine=PAGE_ONLY)
    assert "[tried.md](tried.md)" in page.read_text()


def test_an_unfinished_comparison_says_so(plan_file, tmp_path):
    path = plan_file()
    jobs = list(load(path).jobs("tiny").values())
    for job in jobs[:2]:
        finish(job.config(), 0.5)
    half = jobs[1].config().folder / "metrics.jsonl"
    written = compare([path], output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text()
    assert "**7 of 9 runs are not finished.**" in written and "(one seed)" in written
    half.write_text("\n".join(half.read_text().splitlines()[:-1]) + "\n")  # its last evaluation
    written = compare([path], output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text()
    assert "**8 of 9 runs are not finished.**" in written


def test_nothing_to_show(plan_file, tmp_path):
    with pytest.raises(UserError, match="no finished run, and no results in"):
        compare([plan_file()], output=str(tmp_path / "page"), engine=PAGE_ONLY)
    assert not (tmp_path / "page").exists()


def test_another_config_in_a_folder_is_refused(plan_file, finished, tmp_path):
    changed = plan_file(overrides={"train.steps": 6, "optimizer.learning_rate": 0.5})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        compare([changed], output=str(tmp_path / "page"), engine=PAGE_ONLY)


@pytest.fixture
def pretending(engine) -> Engine:
    """Runs without a model, whose metrics are those of a real run."""
    program = pathlib.Path(engine.program[1]).with_name("pretend_train.py")
    return replace(engine, program=(sys.executable, str(program)))


def test_runs_are_trained_once_the_start_before_them(plan_file, pretending, tmp_path, capsys):
    start = ["scale/tiny_sft", "method/sft"]
    changes = {"start": start, "seeds": [0], "methods": ["grpo", "rest"], "pairs": []}
    path, page = plan_file(**changes), str(tmp_path / "page")
    for job in list(load(path).jobs("tiny").values())[:1]:
        finish(job.config(), 0.6)
    compare([path], output=page, engine=pretending)
    shown = capsys.readouterr().out
    trained_runs = (tmp_path / "runs" / "trained.txt").read_text().split()
    assert trained_runs == ["sft:start", "train:rest-seed0"]
    assert shown.index("tiny-start start: complete") < shown.index("tiny grpo-seed0: complete")
    # A second comparison shares the run that both have.
    changes |= {"runs": "tiny", "methods": ["grpo", "dr_grpo"]}
    compare([path, plan_file("more", **changes)], output=page, engine=pretending)
    trained_runs = (tmp_path / "runs" / "trained.txt").read_text().split()
    assert trained_runs == ["sft:start", "train:rest-seed0", "train:dr_grpo-seed0"]


def test_failures_are_named_after_the_page(plan_file, pretending, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "rest-seed0")
    path = plan_file(seeds=[0], methods=["grpo", "rest"], pairs=[])
    with pytest.raises(
        RunStopped, match=r"1 runs failed; the first: rest-seed0: exit code 1: it broke"
    ):
        compare([path], output=str(tmp_path / "page"), engine=pretending)
    assert "**1 of 2 runs are not finished.**" in (tmp_path / "page" / "README.md").read_text()


def test_running_mean():
    steps, values = figures.smooth({2: 1.0, 4: 2.0, 6: 3.0, 8: 10.0}, 3)
    assert steps == [2, 4, 6, 8]
    np.testing.assert_allclose(values, [1.5, 2, 5, 6.5])
