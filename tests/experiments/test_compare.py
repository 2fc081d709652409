"""Comparisons: fair plans, learning rates, runs carried out once, claims that follow from the numbers, pages from tables."""

import csv
import functools
import gzip
import itertools
import json
import math
import pathlib
import shutil
import sys
from dataclasses import replace

import pytest
import yaml

from rest_jax import config as config_lib
from rest_jax.errors import RunStopped, UserError
from rest_jax.evaluation.statistics import estimate, holm
from rest_jax.experiments import results
from rest_jax.experiments.compare import Plan, compare, gather, verdict, write_page
from rest_jax.experiments.worker import Engine
from tests.programs.pretend_train import finish

ENDS = {
    "grpo": (0.50, 0.52, 0.54, 0.51),
    "rest": (0.60, 0.63, 0.64, 0.60),
    "rest+shuffle": (0.51, 0.52, 0.53, 0.52),
    "rest_mass": (0.45, 0.60, 0.53, 0.50),
}
PAGE_ONLY = Engine(workers=0)


def write_plan(folder: pathlib.Path, name: str = "tiny", **changes) -> str:
    """Writes a plan file, with changes; its path."""
    plan = {
        "title": "A tiny comparison",
        "scale": "scale/tiny_single",
        "arms": list(ENDS),
        "reference": "grpo",
        "pairs": [["rest_mass", "rest"]],
        "seeds": [0, 1, 2, 3],
        "overrides": {"train.steps": 6, "train.eval_every": 2, "train.checkpoint_every": 3},
        "output": str(folder / "runs"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return str(path)


@pytest.fixture
def plan_file(tmp_path):
    return functools.partial(write_plan, tmp_path)


def load(path: str) -> Plan:
    return config_lib.validate_as(Plan, config_lib.read_mapping(path), f"plan {path}")


def test_the_builtin_plan_is_fair():
    """Within a seed nothing differs but what the arm is and the learning rate; seeds differ in nothing but the seed."""
    plan = load(str(config_lib.builtin_file("credit", "comparisons")))
    plan = plan.model_copy(update={"seeds": plan.seeds[:2]})  # loading configs takes seconds
    rates = {arm: 1e-4 * (1 + i) for i, arm in enumerate(plan.arms)}
    configs = {key: job.config() for key, job in plan.jobs("credit", rates).items()}
    assert len({config.folder for config in configs.values()}) == len(configs)
    assert len(configs) == len(plan.arms) * len(plan.seeds)
    own, by_arm = ("weights", "curriculum", "loss", "reward", "optimizer"), {}
    for (arm, seed), config in configs.items():
        same, other = next(iter(configs.values())).model_dump(), config.model_dump()
        for part in ("name", "seed", *own):
            same.pop(part), other.pop(part)
        assert same == other and config.seed == seed
        assert config.optimizer.learning_rate == rates[arm]
        parts = {part: getattr(config, part) for part in own}
        assert by_arm.setdefault(arm, parts) == parts
        assert config.weights.placebo == (arm.partition("+")[2] or "none")
    assert [seed for _, seed in configs] == sorted(seed for _, seed in configs)
    assert ("rest", "rest+shuffle") in plan.all_pairs and ("less", "grpo") in plan.all_pairs
    for (arm, rate, seed), job in plan.rate_jobs("credit").items():
        config = job.config()
        assert config.optimizer.learning_rate == rate and config.seed == seed not in plan.seeds
        assert config.weights == by_arm[arm]["weights"]


def rates_with(overrides: dict) -> dict:
    return {"rates": {"values": [1e-4, 2e-4], "seeds": [9], "overrides": overrides}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "sft"}, "'sft' of reference or pairs is not among the arms"),
        ({"pairs": [["rest", "sft"]]}, "'sft' of reference or pairs"),
        ({"pairs": [], "arms": ["grpo", "grpo"]}, "names one twice"),
        ({"seeds": []}, "seeds"),
        ({"speed": 3}, "speed: unknown key (nearest: seeds)"),
        ({"pairs": [], "arms": ["grpo", "grop"]}, "method/grop: no such file"),
        ({"pairs": [], "arms": ["grpo", "rest+sugar"]}, "weights.placebo: 'sugar'"),
        ({"rates": {"values": [1e-4, 2e-4], "seeds": [9, 1]}}, "rates.seeds: [1] are among seeds"),
        ({"rates": {"values": [1e-4], "seeds": [9]}}, "rates.values"),
        ({"scale": "nowhere"}, "nowhere"),
        ({"overrides": {"train.steps": None}}, "train.steps must be set"),
        ({"overrides": {"train.steps": 6, "data.eval": None}}, "data.eval must be set"),
        ({"rates": {"values": [1e-4, 1e-4], "seeds": [9]}}, "rates.values: [0.0001, 0.0001] names"),
        ({"pairs": [["rest", "rest"]]}, "pairs: ['rest', 'rest'] names one twice"),
        ({"overrides": {"train.steps": 6, "train.eval_every": 4}}, "train.eval_every 4 of 6 steps"),
        ({"overrides": {"train.steps": 6, "train.eval_every": 0}}, "the first half of the steps"),
        ({"overrides": {"train.stps": 1}}, "train.stps: unknown key (nearest: steps)"),
        (rates_with({"data.eval": None}), "run rate0.0001-grpo-seed9: data.eval must be set"),
        (rates_with({"train.eval_every": 4}), "grpo-seed9: train.eval_every 4 of 6 steps"),
        ({"pairs": [], "arms": ["grpo", "sft"]}, "sft-seed0: sft.reasoning_weight, sft.tool_call"),
        ({"pairs": [], "arms": ["grpo", "rest+"]}, "arms: rest+: name a placebo behind the +"),
        ({"pairs": [], "arms": ["grpo", "rest+none"]}, "arms: rest+none: name a placebo"),
        (
            {"pairs": [], "arms": ["grpo", "grpo+shuffle"]},
            "arm grpo+shuffle: all tokens of",
        ),
    ],
)
def test_bad_plans_are_refused(plan_file, tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        compare(plan_file(**changes), output=str(tmp_path / "page"), engine=PAGE_ONLY)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "page").exists()


def test_unknown_plan():
    with pytest.raises(UserError, match="comparisons nothing: no such file"):
        compare("nothing", engine=PAGE_ONLY)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> pathlib.Path:
    """A folder with runs/ of a plan that are finished, rest clearly above grpo, rest_mass not clearly anything; and page/."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_plan(folder)
    for (arm, seed), job in load(path).jobs("tiny", {}).items():
        finish(job.config(), ENDS[arm][seed])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rest_jax.experiments.compare.write_figures", lambda *_: None)
        compare(path, output=str(folder / "page"), engine=PAGE_ONLY)
    return folder


@pytest.fixture
def finished(made_once, plan_file, tmp_path):
    """The plan with its finished runs."""
    shutil.copytree(made_once / "runs", tmp_path / "runs")
    return plan_file()


@pytest.fixture(autouse=True)
def draw_nothing(request, monkeypatch):
    """Figures take seconds: only the tests that ask for them draw them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("rest_jax.experiments.compare.write_figures", lambda *_: None)


@pytest.fixture
def drawn():
    """Figures are drawn."""


@pytest.fixture
def page(made_once, finished, tmp_path) -> pathlib.Path:
    """Of these runs."""
    return shutil.copytree(made_once / "page", tmp_path / "page") / "README.md"


def test_differences_are_paired(finished, tmp_path):
    folders = {key: job.config().folder for key, job in load(finished).jobs("tiny", {}).items()}
    results.store(folders, {}, {}, "tiny", tmp_path)
    found = results.read("tiny", tmp_path)
    difference, expected = (
        found.difference("rest", "grpo", "eval/exact"),
        estimate([0.10, 0.11, 0.10, 0.09]),
    )
    assert (difference.mean, difference.t_low) == pytest.approx((expected.mean, expected.t_low))
    assert found.mean("grpo", "eval/exact").mean == pytest.approx(0.5175)
    assert found.runs["rest", 0]["start/exact"] == 0.4
    # the held-out curve goes straight from 0.4 to its end
    assert found.runs["rest", 0]["area/exact"] == pytest.approx(0.45)
    assert found.hours == pytest.approx(16 * 6 * 9 / 3600)
    assert found.by_seed("rest", "eval/exact") == {
        seed: {0: 0.4, 6: end} for seed, end in enumerate(ENDS["rest"])
    }


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({0: 0.2, 4: 0.4, 8: 0.9}, 0.3),  # whatever comes after the half
        ({0: 0.2, 2: 0.4, 4: 0.4, 8: 0.0}, 0.35),
        ({0: 0.0, 3: 0.3, 9: 0.9}, 0.225),  # the half lies between two evaluations
        ({0: 0.7}, 0.7),
    ],
)
def test_the_area_is_of_the_first_half(curve, expected):
    assert results.area(curve) == pytest.approx(expected)


def test_all_comparisons_are_corrected_together(finished, tmp_path):
    found = gather("tiny", load(finished), tmp_path)
    assert len(found.pairs) == 5
    differences = found.results.differences(found.pairs, found.plan.comparisons)
    plain = [found.results.difference(*key) for key in differences]
    assert [each.p for each in differences.values()] == holm([each.p for each in plain])
    assert differences["rest", "grpo", "eval/exact"].shown
    assert not differences["rest_mass", "grpo", "eval/exact"].shown
    # those to come count from the beginning
    early = found.results.differences(found.pairs[:1], found.plan.comparisons)
    for key, difference in early.items():
        assert difference.p >= min(1, 9 * found.results.difference(*key).p)
    power, alone = (found.results.power(found.pairs, "eval/exact", n) for n in (10, 1))
    assert power.single == alone.single == alone.first < power.first


def test_the_page_says_what_the_numbers_say(drawn, finished, tmp_path):
    page = compare(finished, output=str(tmp_path / "page"), engine=PAGE_ONLY)
    written = page.read_text()
    lines = written.splitlines()
    assert "- `rest`: Better in both endpoints, than its placebo too." in lines
    assert "- `rest_mass`: No difference is shown." in lines
    assert not any(line.startswith("- `rest+shuffle`") for line in lines)
    (row,) = (x for x in lines if x.startswith("| rest | 4 |"))
    assert "| +10.0 [+8.7, +11.3] | **" in row
    (row,) = (x for x in lines if x.startswith("| rest - rest+shuffle |"))
    assert "+9.7 [+7.4, +12.1]" in row
    assert "an exact rate" not in written and "The start has 40.0% exact completions" in written
    assert "not finished" not in written and "learning rate" not in written.split("## ")[1]
    pictures = [x.split("(")[1].rstrip(")") for x in lines if x.startswith("![")]
    assert len(pictures) == 3
    assert all((page.parent / x).read_bytes().startswith(b"\x89PNG") for x in pictures)
    # tables are whole: every row of one has as many cells as its head
    for head, rule in itertools.pairwise(lines):
        if rule.startswith("| ---"):
            assert head.count("|") == rule.count("|"), head
    tables = [x for x in lines if x.startswith("|")]
    assert all(x.endswith("|") for x in tables)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (
            (0.62, 0.63, 0.64, 0.63),
            "Above grpo in both endpoints, but not shown to be above its placebo there",
        ),
        ((0.50, 0.52, 0.54, 0.515), "Better in both endpoints, than its placebo too."),
    ],
)
def test_a_rule_is_better_only_against_its_placebo(plan_file, tmp_path, ends, said):
    path = plan_file()
    for (arm, seed), job in load(path).jobs("tiny", {}).items():
        finish(job.config(), ends[seed] if arm == "rest+shuffle" else ENDS[arm][seed])
    written = compare(path, output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text()
    (line,) = (x for x in written.splitlines() if x.startswith("- `rest`: "))
    assert said in line


def test_a_rule_without_a_placebo_is_not_said_to_be_better(plan_file, tmp_path):
    """Advantages, which have no token weights and so no placebo, are."""
    ends = {"grpo": ENDS["grpo"], "rest": ENDS["rest"], "gdpo": ENDS["rest"]}
    path = plan_file(arms=list(ends), pairs=[])
    for (arm, seed), job in load(path).jobs("tiny", {}).items():
        finish(job.config(), ends[arm][seed])
    lines = compare(path, output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text().splitlines()
    (said,) = (line for line in lines if line.startswith("- `rest`: "))
    assert said.startswith("- `rest`: Above grpo in both endpoints; whether the choice of tokens")
    assert "- `gdpo`: Better in both endpoints." in lines


def test_better_in_one_endpoint_than_the_reference_and_in_another_than_the_placebo_is_not_better(finished, tmp_path):  # fmt: skip
    found = gather("tiny", load(finished), tmp_path)

    def difference(mean: float, shown: bool) -> results.Difference:
        return results.Difference(estimate([mean, mean]), 0.01 if shown else 0.5)

    area, end = results.ENDPOINTS
    shown = {("grpo", area): True, ("grpo", end): False}
    shown |= {("rest+shuffle", area): False, ("rest+shuffle", end): True}
    differences = {("rest", *key): difference(0.1, is_shown) for key, is_shown in shown.items()}
    assert verdict(found, differences, "rest") == (
        "Above grpo in the mean over the first half, but not shown to be above its placebo there: whether the choice of tokens "
        "does it is open."
    )
    differences["rest", "rest+shuffle", area] = difference(0.1, True)
    better = "Better in the mean over the first half, than its placebo too."
    assert verdict(found, differences, "rest") == better
    differences["rest", "grpo", end] = difference(-0.1, True)
    worse = "Better in the mean over the first half, worse at the end."
    assert verdict(found, differences, "rest") == worse


def test_two_seeds_with_the_same_difference_show_nothing(plan_file, tmp_path):
    path = plan_file(arms=["grpo", "gdpo"], pairs=[], seeds=[0, 1])
    for (arm, seed), job in load(path).jobs("tiny", {}).items():
        finish(job.config(), 0.5 + 0.1 * seed + 0.2 * (arm == "gdpo"))
    lines = compare(path, output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text().splitlines()
    assert "- `gdpo`: No difference is shown." in lines
    (row,) = (line for line in lines if line.startswith("| gdpo | 2 |"))
    assert row.count("| +20.0 | - |") == 1 and "nan" not in row


def test_tables_do_not_shrink(plan_file, finished, page, tmp_path):
    """A machine with fewer run folders leaves the page as it is."""
    before = page.read_text()
    shutil.rmtree(tmp_path / "runs" / "tiny" / "rest-seed1")
    compare(finished, output=str(page.parent), engine=PAGE_ONLY)
    assert page.read_text() == before


def test_what_stands_in_the_tables_is_not_run_again(plan_file, pretending, tmp_path, monkeypatch):
    """Another machine takes over a comparison, or adds an arm to it."""
    start = ["scale/tiny_sft", "method/sft"]
    changes = {"start": start, "pairs": [], "seeds": [0, 1]}
    rates = {"values": [1e-4, 2e-4], "seeds": [8]}
    first = plan_file(**changes, arms=["grpo", "rest"], rates=rates)
    page = tmp_path / "page"
    compare(first, output=str(page), engine=pretending)
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    before = page.joinpath("README.md").read_text()
    compare(first, output=str(page), engine=pretending)
    assert not (tmp_path / "runs" / "trained.txt").exists()  # nor its start
    assert page.joinpath("README.md").read_text() == before

    more = plan_file(**changes, arms=["grpo", "rest", "ar"], rates=rates)
    assert "| ar | 2 |" in compare(more, output=str(page), engine=pretending).read_text()
    runs = ["rate0.0001-ar-seed8", "rate0.0002-ar-seed8", "ar-seed0", "ar-seed1"]
    trained_runs = (tmp_path / "runs" / "trained.txt").read_text().split()
    assert trained_runs == ["sft:start", *(f"train:{run}" for run in runs)]
    with (page / "tiny_runs.csv").open() as file:
        assert {row["weights"] for row in csv.DictReader(file)} == {"a1"}

    # a start with other bits, as of another kind of processor, is found before any run
    shutil.rmtree(tmp_path / "runs" / "tiny")
    monkeypatch.setenv("WEIGHTS", "b2")
    most = plan_file(**changes, arms=["grpo", "rest", "ar", "less"], rates=rates)
    with pytest.raises(UserError, match=r"weights a1, run start with b2: they cannot be compared"):
        compare(most, output=str(page), engine=pretending)
    assert (tmp_path / "runs" / "trained.txt").read_text().split() == [*trained_runs, "sft:start"]


def test_tables_of_another_version_are_added_to(finished, tmp_path):
    """One that measured less, or in another order."""
    folders = {key: job.config().folder for key, job in load(finished).jobs("tiny", {}).items()}
    results.store(folders, {}, {}, "tiny", tmp_path)
    whole, path = results.read("tiny", tmp_path), tmp_path / "tiny_runs.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in reversed(rows[0]) if name != "late/exact"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    again = ("grpo", 0)
    results.store({again: folders[again]}, {}, {}, "tiny", tmp_path)
    found = results.read("tiny", tmp_path)
    assert found.runs[again] == pytest.approx(whole.runs[again], nan_ok=True)
    other = dict(whole.runs["rest", 1])
    assert math.isnan(found.runs["rest", 1]["late/exact"]) and other.pop("late/exact") > 0
    assert {n: found.runs["rest", 1][n] for n in other} == pytest.approx(other, nan_ok=True)


def cut(columns: int):
    return lambda text: "".join(",".join(line.split(",")[:columns]) + "\n" for line in text.split())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "line 1: no row of a comparison: no column arm"),
        (lambda text: "<<<<<<< HEAD\n" + text, "line 1: no row of a comparison: no column arm"),
        (lambda text: text.replace("rest,1,", "=======\nrest,1,"), "line 7: .*: 1 cells of"),
        (lambda text: text[:-30], "line 17: no row of a comparison: .* cells of"),
        (lambda text: text[:-3], "line 17: no row of a comparison: the file ends within it"),
        (lambda text: text.replace("rest,1,", '"' + 2 * 10**5 * "x"), "line 7: .*: field larger"),
        (cut(5), "line 1: no row of a comparison: no column eval/exact"),
        (lambda text: text.replace("rest,1,", "rest,x,"), "line 7: .*'x'"),
        (lambda text: text.replace("rest,1,", "rest,0,"), "line 7: .*: a second one of rest/0"),
        (lambda text: text.replace(",0.63,", ",,"), "line 7: .*: no value of eval/exact"),
    ],
)
def test_a_table_that_is_damaged_is_refused(finished, page, damage, said):
    """A run whose row is cut does not count as carried out, and no line is taken for another's."""
    table = page.parent / "tiny_runs.csv"
    table.write_text(damaged := damage(table.read_text()))
    with pytest.raises(UserError, match=rf"tiny_runs\.csv, {said}.*; restore the file"):
        compare(finished, output=str(page.parent), engine=PAGE_ONLY)
    assert table.read_text() == damaged


@pytest.mark.parametrize("damage", [lambda content: content[:500], lambda content: b"version 1"])
def test_curves_that_are_cut_are_refused(finished, page, damage):
    """A pointer of Git LFS in the place of the file, too."""
    curves = page.parent / "tiny_curves.csv.gz"
    curves.write_bytes(damage(curves.read_bytes()))
    with pytest.raises(UserError, match=r"tiny_curves\.csv\.gz: no table of a comparison: "):
        compare(finished, output=str(page.parent), engine=PAGE_ONLY)


def test_runs_without_curves_are_in_the_tables(drawn, finished, page, tmp_path):
    """Where the folder is gone with them; figures leave such runs out."""
    curves, written = page.parent / "tiny_curves.csv.gz", page.read_text()
    shutil.rmtree(tmp_path / "runs")
    for arms in (["grpo", "rest"], []):
        with gzip.open(curves, "rt", newline="") as file:
            head, *lines = file
        with gzip.open(curves, "wt", newline="") as file:
            file.writelines([head, *(line for line in lines if line.split(",")[0] in arms)])
        compare(finished, output=str(page.parent), engine=PAGE_ONLY)
    assert page.read_text() == written.replace(", [curves by seed](tiny_curves.csv.gz)", "")
    curves.unlink()
    compare(finished, output=str(page.parent), engine=PAGE_ONLY)


def test_a_column_that_an_earlier_version_did_not_write_is_unknown(finished, page, tmp_path):
    shutil.rmtree(tmp_path / "runs")
    table = page.parent / "tiny_runs.csv"
    table.write_text(cut(6)(table.read_text()))
    assert (
        "| rest | 4 |" in compare(finished, output=str(page.parent), engine=PAGE_ONLY).read_text()
    )


def test_a_stored_run_of_another_config_is_refused(plan_file, finished, page, tmp_path):
    shutil.rmtree(tmp_path / "runs")
    before = {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}
    changed = plan_file(
        overrides={"train.steps": 6, "train.eval_every": 2, "optimizer.learning_rate": 0.5}
    )
    with pytest.raises(UserError, match="have run grpo-seed0 of another config than the plan's"):
        compare(changed, output=str(page.parent), engine=PAGE_ONLY)
    assert {path: path.read_bytes() for path in before} == before
    # where it lies and how often it saves is not what it measures
    overrides = {"train.steps": 6, "train.eval_every": 2, "train.checkpoint_every": 2}
    elsewhere = plan_file(overrides=overrides, output=str(tmp_path / "other"))
    compare(elsewhere, output=str(page.parent), engine=PAGE_ONLY)


def test_runs_from_different_weights_are_not_paired(plan_file, tmp_path, monkeypatch):
    path = plan_file()
    for i, job in enumerate(load(path).jobs("tiny", {}).values()):
        monkeypatch.setenv("WEIGHTS", "b2" if i == 3 else "a1")
        finish(job.config(), 0.5)
    with pytest.raises(UserError, match=r"run grpo/0 began with the weights a1, run rest_mass/0"):
        compare(path, output=str(tmp_path / "page"), engine=PAGE_ONLY)
    assert not (tmp_path / "page").exists()


GAIN = {
    "cosine": 0.9,
    **{"gain_relative": 0.47, "gain_relative_interval": [0.36, 0.57]},
    **{"adam_relative": -0.05, "adam_relative_interval": [-0.1, 0.01]},
}


def test_what_one_step_gains_is_shown(drawn, plan_file, finished, tmp_path):
    path = tmp_path / "gain.json"
    nothing = {"cosine": None, "gain_relative": None, "gain_relative_interval": [None, None]}
    lead = {"gain_lead": 0.2, "gain_lead_interval": [0.1, 0.3]}
    lead |= {"adam_lead": None, "adam_lead_interval": [None, None]}
    placebo = GAIN | lead | {"placebo_of": "rest, nu 0"}
    arms = {"grpo": GAIN | nothing, "rest, nu 0": GAIN, "rest+shuffle, nu 0": placebo}
    path.write_text(json.dumps({"arms": arms}))
    plan = plan_file(gain={"the start": str(path), "later": str(tmp_path / "none.json")})
    page = compare(plan, output=str(tmp_path / "page"), engine=PAGE_ONLY)
    lines = page.read_text().splitlines()
    gain, adam, cosine = (line for line in lines if line.startswith("| rest, nu 0 |"))
    assert gain == "| rest, nu 0 | +47 [+36, +57] |"
    assert (adam, cosine) == ("| rest, nu 0 | -5 [-10, +1] |", "| rest, nu 0 | 0.90 |")
    assert lines.count("| grpo | - |") == 2 and "| grpo | -5 [-10, +1] |" in lines
    (picture,) = (line for line in lines if line.startswith("![Gains of one step]"))
    drawn_to = page.parent / picture.split("(")[1].rstrip(")")
    assert drawn_to.read_bytes().startswith(b"\x89PNG")
    leads = [line for line in lines if line.startswith("| rest+shuffle, nu 0 |")]
    assert leads == ["| rest+shuffle, nu 0 | +20 [+10, +30] |", "| rest+shuffle, nu 0 | - |"]


def test_gains_stay_where_their_files_do_not(plan_file, finished, tmp_path):
    start, later = tmp_path / "start.json", tmp_path / "later.json"

    def shown(*policies: pathlib.Path) -> dict[tuple[str, str], float]:
        plan = load(plan_file(gain={path.stem: str(path) for path in policies}))
        gain = gather("tiny", plan, tmp_path).results.gain
        return {key: row["gain"] for key, row in gain.items()}

    later.write_text(json.dumps({"arms": {"grpo": GAIN}}))
    assert shown(start, later) == {("grpo", "later"): 0.47}
    later.unlink()
    start.write_text(json.dumps({"arms": {"rest, nu 0": GAIN}}))
    # in the order of the plan
    assert list(shown(start, later)) == [("rest, nu 0", "start"), ("grpo", "later")]
    # one that is measured again is written again
    start.write_text(json.dumps({"arms": {"rest, nu 0": GAIN | {"gain_relative": 0.5}}}))
    assert shown(start, later)["rest, nu 0", "start"] == 0.5
    start.unlink()
    # and one that the plan has no more is not shown
    assert shown(later) == {("grpo", "later"): 0.47}


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"regions": {}}', '{"arms": {}}', '{"arms": {"grpo": {"gain": 1}}}']
)
def test_a_file_that_is_no_measurement_of_gain_is_refused(plan_file, pretending, tmp_path, text):
    (tmp_path / "gain.json").write_text(text)
    path = plan_file(gain={"the start": str(tmp_path / "gain.json")})
    with pytest.raises(UserError, match=r"gain the start: .*gain\.json: not what `rest-jax gain`"):
        compare(path, output=str(tmp_path / "page"), engine=pretending)
    assert not (tmp_path / "runs" / "trained.txt").exists() and not (tmp_path / "page").exists()


def test_tables_hold_every_run_and_render_the_same_page(finished, page, tmp_path):
    folder = page.parent
    with (folder / "tiny_runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {(r["arm"], r["seed"], r["eval/exact"]) for r in rows} >= {("rest", "1", "0.63")}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "runs")
    page.write_text("")
    compare(finished, output=str(folder), engine=PAGE_ONLY)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = [path.name for path in before if before[path] != after.get(path)]
    assert changed == [] and after.keys() == before.keys()


def test_the_page_of_the_repository_follows_from_its_tables(tmp_path, configs_dir, monkeypatch):
    """docs/comparison is what the command makes of the results stored in it."""
    monkeypatch.chdir(tmp_path)  # without run folders
    source = configs_dir.parent / "docs" / "comparison"
    plan = load(str(config_lib.builtin_file("credit", "comparisons")))
    written = write_page(gather("credit", plan, source), tmp_path)
    assert written.read_text() == (source / "README.md").read_text()


def test_an_unfinished_comparison_says_so(plan_file, tmp_path):
    path = plan_file()
    jobs = list(load(path).jobs("tiny", {}).values())
    for job in jobs[:2]:
        finish(job.config(), 0.5)
    half = jobs[1].config().folder / "metrics.jsonl"
    written = compare(path, output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text()
    assert "**14 of 16 runs are not finished; claims wait for all of them.**" in written
    half.write_text("\n".join(half.read_text().splitlines()[:-1]) + "\n")  # its last evaluation
    written = compare(path, output=str(tmp_path / "other"), engine=PAGE_ONLY).read_text()
    assert "**15 of 16 runs are not finished" in written


def test_runs_of_a_seed_without_the_reference_are_finished_and_left_out(plan_file, tmp_path):
    path = plan_file()
    for key, job in load(path).jobs("tiny", {}).items():
        if key in (("rest", 0), ("grpo", 1), ("rest", 1)):
            finish(job.config(), 0.5)
    written = compare(path, output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text()
    assert "**13 of 16 runs are not finished; claims wait for all of them.** 1 that are" in written
    assert "| rest | 1 |" in written


def test_nothing_to_show(plan_file, tmp_path):
    with pytest.raises(UserError, match="no finished run, and no results in"):
        compare(plan_file(), output=str(tmp_path / "page"), engine=PAGE_ONLY)
    assert not (tmp_path / "page").exists()


def test_a_page_of_something_else_is_not_replaced(finished, tmp_path):
    """What a folder of documents has, and the page of another comparison; its own is."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for text in ("# Ours\n", "`rest-jax compare tiny2` writes this page; do not edit it.\n"):
        (folder / "README.md").write_text(text)
        with pytest.raises(UserError, match=r"README\.md: is no page of tiny; name another folder"):
            compare(finished, output=str(folder), engine=PAGE_ONLY)
        assert [path.name for path in folder.iterdir()] == ["README.md"]
        assert (folder / "README.md").read_text() == text
    (folder / "README.md").unlink()
    for _ in range(2):
        assert "# Ours" not in compare(finished, output=str(folder), engine=PAGE_ONLY).read_text()


def test_another_config_in_a_folder_is_refused(plan_file, finished, tmp_path):
    changed = plan_file(
        overrides={"train.steps": 6, "train.eval_every": 2, "optimizer.learning_rate": 0.5}
    )
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        compare(changed, output=str(tmp_path / "page"), engine=PAGE_ONLY)


@pytest.fixture
def pretending(engine) -> Engine:
    """Runs without a model, whose metrics are those of a real run."""
    program = pathlib.Path(engine.program[1]).with_name("pretend_train.py")
    return replace(engine, program=(sys.executable, str(program)))


def test_runs_are_trained_once_the_start_before_them(plan_file, pretending, tmp_path, capsys):
    start = ["scale/tiny_sft", "method/sft"]
    changes = {"start": start, "seeds": [0], "arms": ["grpo", "rest"], "pairs": []}
    path, page = plan_file(**changes), str(tmp_path / "page")
    for job in list(load(path).jobs("tiny", {}).values())[:1]:
        finish(job.config(), 0.6)
    compare(path, output=page, engine=pretending)
    shown = capsys.readouterr().out
    trained_runs = (tmp_path / "runs" / "trained.txt").read_text().split()
    assert trained_runs == ["sft:start", "train:rest-seed0"]
    assert shown.index("tiny-start start: complete") < shown.index("tiny rest-seed0: complete")
    compare(path, output=page, engine=pretending)
    assert (tmp_path / "runs" / "trained.txt").read_text().split() == trained_runs


def test_every_arm_chooses_its_learning_rate_first(plan_file, pretending, tmp_path):
    """On seeds of its own; then the runs have it, and a second start trains nothing."""
    rates = {"values": [1e-4, 2e-4, 4e-4], "seeds": [8, 9], "overrides": {"data.eval_limit": 7}}
    path = plan_file(seeds=[0, 1], arms=["grpo", "rest"], pairs=[], rates=rates)
    plan, page = load(path), tmp_path / "page"
    best = {"grpo": 2e-4, "rest": 4e-4}
    for (arm, rate, seed), job in plan.rate_jobs("tiny").items():
        config = job.config()
        assert config.data.eval_limit == 7
        # one seed alone would mislead
        finish(config, 0.6 if rate == best[arm] else 0.45 + 0.2 * (rate == 1e-4 and seed == 8))
    written = compare(path, output=str(page), engine=PAGE_ONLY).read_text()
    assert "| rest | *0.0004* |" in written and "| grpo | 0.0002 |" in written
    assert "**4 of 4 runs are not finished" in written
    compare(path, output=str(page), engine=pretending)
    folder = tmp_path / "runs" / "tiny"
    trained_runs = (folder.parent / "trained.txt").read_text().split()
    assert trained_runs == [f"train:{arm}-seed{seed}" for seed in (0, 1) for arm in ("grpo", "rest")]  # fmt: skip
    for arm, rate in best.items():
        config = config_lib.load([folder / f"{arm}-seed1" / "config.yaml"])
        assert config.optimizer.learning_rate == rate and config.data.eval_limit != 7
    before = {file.name: file.read_bytes() for file in page.iterdir() if file.is_file()}
    shutil.rmtree(folder)
    compare(path, output=str(page), engine=PAGE_ONLY)
    assert {f.name: f.read_bytes() for f in page.iterdir() if f.is_file()} == before


def test_rates_that_differ_behind_the_sixth_digit_are_two(plan_file, tmp_path):
    """In the tables and as folders; names and tables of rates that six digits tell apart are as short as they were."""
    values = [3.1622776601683795e-05, 3.1622779e-05, 1e-4]
    path = plan_file(arms=["grpo", "rest"], pairs=[], rates={"values": values, "seeds": [8]})
    jobs = load(path).rate_jobs("tiny")
    for job in jobs.values():
        finish(job.config(), 0.5)
    folders = {key: job.config().folder for key, job in jobs.items()}
    results.store({}, folders, {}, "tiny", tmp_path)
    assert results.read("tiny", tmp_path).rates.keys() == jobs.keys()
    assert folders["rest", 1e-4, 8].name == "rate0.0001-rest-seed8"
    assert "\ngrpo,0.0001,8," in (tmp_path / "tiny_rates.csv").read_text()


def test_a_rate_is_chosen_by_both_endpoints():
    """A rate that rises fast and ends low is not the best one; of equal ones the lowest is."""
    of = {1e-4: (0.50, 0.56), 2e-4: (0.54, 0.63), 4e-4: (0.56, 0.57), 8e-4: (0.57, 0.60)}
    rates = {("grpo", rate, 3): dict(zip(results.ENDPOINTS, of[rate], strict=True)) for rate in of}
    assert results.chosen_rates(rates) == {"grpo": 2e-4}


def test_without_all_runs_for_the_rates_no_rate_is_taken(plan_file, tmp_path):
    rates = {"values": [1e-4, 2e-4], "seeds": [8]}
    path = plan_file(seeds=[0], arms=["grpo", "rest"], pairs=[], rates=rates)
    for job in list(load(path).rate_jobs("tiny").values())[:3]:
        finish(job.config(), 0.5)
    written = compare(path, output=str(tmp_path / "page"), engine=PAGE_ONLY).read_text()
    assert "**1 of 4 runs for the learning rates are not finished.**" in written
    assert "## Endpoints" not in written


def test_runs_for_the_rates_that_are_elsewhere_are_missed(plan_file, pretending, tmp_path):
    """The database says that they are done, and neither a folder nor the tables have them."""
    rates = {"values": [1e-4, 2e-4], "seeds": [8]}
    path = plan_file(seeds=[0], arms=["grpo", "rest"], pairs=[], rates=rates)
    compare(path, output=str(tmp_path / "page"), engine=pretending)
    shutil.rmtree(tmp_path / "runs" / "tiny" / "rate0.0002-rest-seed8")
    shutil.rmtree(tmp_path / "page")
    with pytest.raises(
        UserError, match=r"1 finished runs for the learning rates are not in .*tiny"
    ):
        compare(path, output=str(tmp_path / "page"), engine=pretending)


def test_a_failure_before_any_result_is_said(plan_file, pretending, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "start")
    start = ["scale/tiny_sft", "method/sft"]
    path = plan_file(seeds=[0], arms=["grpo", "rest"], pairs=[], start=start)
    with pytest.raises(RunStopped, match="1 runs failed; the first: start: exit code 1: it broke"):
        compare(path, output=str(tmp_path / "page"), engine=pretending)


def test_failures_are_named_after_the_page(plan_file, pretending, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "rest-seed0")
    path = plan_file(seeds=[0], arms=["grpo", "rest"], pairs=[])
    with pytest.raises(
        RunStopped, match=r"1 runs failed; the first: rest-seed0: exit code 1: it broke"
    ):
        compare(path, output=str(tmp_path / "page"), engine=pretending)
    assert "**1 of 2 runs are not finished" in (tmp_path / "page" / "README.md").read_text()


def test_the_page_is_beside_the_runs_unless_told(plan_file, finished, tmp_path):
    assert compare(finished, engine=PAGE_ONLY) == tmp_path / "runs/tiny/page/README.md"
