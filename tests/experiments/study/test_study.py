"""Studies: fair plans, runs carried out once and resumed, tables and claims that follow from the numbers."""

import csv
import json
import pathlib
import threading

import numpy as np
import pytest
import yaml

from rest_jax import config as config_lib
from rest_jax import stages
from rest_jax.errors import RunStopped, UserError
from rest_jax.evaluation.statistics import estimate
from rest_jax.experiments.study import command, page, runner
from rest_jax.experiments.study.plan import load_study, planned_runs
from rest_jax.experiments.study.results import collect, smooth
from rest_jax.run.metrics import REGION_NAMES

METHODS = ("grpo", "rest", "rest_mass")


@pytest.fixture
def study_file(tmp_path):
    """Writes a study file, with changes."""

    def write(**changes) -> str:
        raw = {
            "name": "tiny",
            "title": "A tiny study",
            "base": "study_single",
            "methods": list(METHODS),
            "reference": "grpo",
            "pairs": [["rest_mass", "rest"]],
            "seeds": [0, 1, 2],
            "overrides": ["train.steps=6"],
            "output": str(tmp_path / "runs"),
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(raw | changes))
        return str(path)

    return write


def finish(run, exact: float, start: float = 0.4) -> None:
    """The folder of a run whose final exact rate is `exact`."""
    config = runner.settled(run.config)
    run.config.folder.mkdir(parents=True)
    (run.config.folder / "config.yaml").write_text(config_lib.dump(config))
    lines = [{"step": 0, **held(start)}]
    for step in range(1, config.train.steps + 1):
        lines.append({"step": step, **trained(step)})
    lines.append({"step": config.train.steps, **held(exact)})
    (run.config.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def held(exact: float) -> dict[str, float]:
    names = ("accuracy", "format", "spurious", "reward", "response_tokens")
    return {"eval/exact": exact, **{f"eval/{name}": 0.5 for name in names}}


def trained(step: int) -> dict[str, float]:
    regions = {
        f"region/{region}/{kind}": value
        for region in REGION_NAMES
        for kind, value in (
            ("weight", 1.0),
            ("weight_share", 1 / 7),
            ("entropy", 0.1),
            ("count", 10),
        )
    }
    regions["region/think/count"] = 40
    return regions | {
        "reward/mean": 0.1 * step, "reward/exact": 0.05 * step, "rollout/tokens": 100,
        "rollout/response_tokens": 25, "rollout/entropy": 0.2,
        "update/grad_noise": 0.9, "time/step": 9.0,
        "time/cpu": 100.0 if step <= 3 else 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["single", "reasoned"])
def test_shipped_studies_are_fair(name):
    """Within a seed nothing differs but what the method is; seeds differ in nothing but the seed."""
    runs = planned_runs(load_study(name))
    assert len(runs) == 35 and len({run.config.folder for run in runs}) == 35
    method_parts = ("name", "weights", "curriculum", "loss", "reward")
    for run in runs:
        same, other = runs[0].config.model_dump(), run.config.model_dump()
        for part in (*method_parts, "seed"):
            same.pop(part), other.pop(part)
        assert same == other
        assert run.config.seed == run.seed
    by_method = {}
    for run in runs:
        parts = {part: getattr(run.config, part) for part in method_parts[1:]}
        assert by_method.setdefault(run.method, parts) == parts
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_the_reasoned_study_warms_up_once():
    starts = {run.config.warm_start.folder for run in planned_runs(load_study("reasoned"))}
    assert len(starts) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "sft"}, "reference 'sft' is not among"),
        ({"pairs": [["rest", "sft"]]}, "pairs: 'sft' is not among"),
        ({"pairs": [], "methods": ["grpo", "grpo"]}, "names one twice"),
        ({"seeds": []}, "seeds"),
        ({"speed": 3}, "speed"),
        ({"pairs": [], "methods": ["grpo", "grop"]}, "config grop: no such file"),
        ({"base": "nowhere"}, "nowhere"),
        ({"overrides": ["train.steps=null"]}, "train.steps must be set"),
    ],
)
def test_bad_files_are_refused(study_file, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        planned_runs(load_study(study_file(**changes)))
    assert "\n" not in str(caught.value)


def test_unknown_study():
    with pytest.raises(
        UserError, match=r"study nothing: no such file, nor a shipped one \(.*single"
    ):
        load_study("nothing")


@pytest.fixture
def pretended(monkeypatch):
    """Training replaced by writing what it would: records the runs, can fail or be slow at one."""
    seen: list[str] = []
    lock = threading.Lock()

    def prepare(runs, fail: str = ""):
        by_folder = {str(run.config.folder): run for run in runs}

        def train(config, cores, stop):
            with lock:
                seen.append(config.name)
            if config.name == fail:
                log = runner.log_file(config)
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text("rest-jax: error: it broke\n")
                return 1
            run = by_folder.get(str(config.folder))
            if run is None:  # the supervised start
                folder = config.folder
                for part in ("checkpoints", "model"):
                    (folder / part).mkdir(parents=True)
                (folder / "config.yaml").write_text(config_lib.dump(config))
                (folder / stages.FINISHED).touch()
            else:
                finish(run, 0.5)
            return 0

        monkeypatch.setattr(runner, "train", train)
        return seen

    return prepare


def test_every_run_is_trained_once_and_not_again(study_file, pretended):
    runs = planned_runs(load_study(study_file()))
    finish(runs[4], 0.6)
    seen = pretended(runs)
    runner.carry_out(runs, 1)
    assert sorted(seen) == sorted(r.config.name for i, r in enumerate(runs) if i != 4)
    seen.clear()
    runner.carry_out(runs, 1)
    assert seen == []


def test_the_start_comes_first_and_others_wait_for_it(study_file, pretended, monkeypatch):
    monkeypatch.setattr(runner, "available_cores", lambda: [0, 1])
    runs = planned_runs(load_study(study_file(warm_start="sft")))
    seen = pretended(runs)
    runner.carry_out(runs, 2)
    assert seen[0] == runs[0].config.warm_start.name
    assert len(seen) == 1 + len(runs)


def test_a_failure_stops_the_study_and_names_the_log(study_file, pretended):
    runs = planned_runs(load_study(study_file()))
    seen = pretended(runs, fail="rest-seed0")
    with pytest.raises(
        RunStopped, match=r"rest-seed0: exit code 1: it broke \(log: .*rest-seed0\.log\)"
    ):
        runner.carry_out(runs, 1)
    assert seen[-1] == "rest-seed0" and len(seen) == 2


def test_another_config_in_a_folder_is_refused(study_file, pretended):
    runs = planned_runs(load_study(study_file()))
    finish(runs[0], 0.5)
    changed = planned_runs(load_study(study_file()), ["optimizer.learning_rate=0.5"])
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        runner.carry_out(changed, 1)


def test_a_follow_up_shares_the_runs_it_has_in_common(study_file, pretended):
    first = planned_runs(load_study(study_file()))
    for run in first:
        finish(run, 0.5)
    follow_up = load_study(
        study_file(name="more", runs="tiny", methods=["grpo", "dr_grpo"], pairs=[])
    )
    runs = planned_runs(follow_up)
    seen = pretended(runs)
    runner.carry_out(runs, 1)
    assert sorted(seen) == ["dr_grpo-seed0", "dr_grpo-seed1", "dr_grpo-seed2"]
    assert collect(follow_up, runs).methods == ["grpo", "dr_grpo"]


def test_another_start_is_refused(study_file, pretended, monkeypatch):
    """A start that was trained otherwise is no start of this study, finished or not."""
    monkeypatch.setattr(runner, "available_cores", lambda: [0])
    runs = planned_runs(load_study(study_file(warm_start="sft")))
    pretended(runs)
    runner.carry_out(runs, 1)
    changed = planned_runs(load_study(study_file(warm_start="sft")), ["sft.batch_size=3"])
    with pytest.raises(UserError, match=r"sft\.batch_size"):
        runner.jobs_left(changed)


def test_half_a_run_is_not_finished(study_file):
    (run, *_) = planned_runs(load_study(study_file()))
    finish(run, 0.5)
    assert runner.is_finished(run)
    lines = (run.config.folder / "metrics.jsonl").read_text().splitlines()[:-1]
    (run.config.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert not runner.is_finished(run)


def test_more_workers_than_cores():
    with pytest.raises(UserError, match="--workers 3: this machine has 2 cores"):
        runner.shares([0, 1], 3)
    assert runner.shares([0, 1, 2], 2) == [{0, 2}, {1}]


@pytest.fixture
def reported(study_file, tmp_path):
    """A finished study: rest clearly above grpo, rest_mass not clearly anything."""
    study = load_study(study_file())
    runs = planned_runs(study)
    rates = {
        "grpo": (0.50, 0.52, 0.54),
        "rest": (0.60, 0.63, 0.64),
        "rest_mass": (0.45, 0.60, 0.53),
    }
    for run in runs:
        finish(run, rates[run.method][run.seed])
    result = collect(study, runs)
    text = command.report([result], tmp_path / "page", "make study")
    return result, tmp_path / "page", text


def test_differences_are_paired(reported):
    result, _, _ = reported
    found = result.difference("rest", "eval/exact")
    expected = estimate([0.10, 0.11, 0.10])
    assert found.mean == pytest.approx(expected.mean) and found.t_low == pytest.approx(
        expected.t_low
    )
    assert result.level("grpo", "eval/exact").mean == pytest.approx(0.52)
    assert result.level("grpo", "time/cpu").mean == 2.0  # compiling steps left out


def test_the_page_claims_what_is_shown(reported):
    _, folder, text = reported
    written = (folder / page.FILE).read_text()
    assert "- `rest` against `grpo`: more exact answers on held-out tools, +10.3 points." in written
    assert (
        "- `rest_mass` against `grpo`: no difference on held-out tools is shown (a loss of"
        in written
    )
    assert "- `rest_mass` against `rest`: " in written and "9 in all" in written
    assert "40% of them reasoning" in written and "Exact rate of the start: 40.0%" in written
    assert "not finished" not in written
    assert "rest" in text and "yes" in text
    for line in written.splitlines():
        if line.startswith("!["):
            picture = folder / line.split("(")[1].rstrip(")")
            assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_hold_every_run(reported):
    _, folder, _ = reported
    with (folder / "tiny_runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {(r["method"], r["seed"], r["eval/exact"]) for r in rows} >= {("rest", "1", "0.63")}
    with (folder / "tiny_methods.csv").open() as file:
        differences = [r for r in csv.DictReader(file) if r["less"] == "grpo"]
    (row,) = [r for r in differences if (r["method"], r["metric"]) == ("rest", "eval/exact")]
    assert float(row["mean"]) == pytest.approx(0.10333, abs=1e-4)


def test_a_report_of_another_config_is_refused(study_file):
    study = load_study(study_file())
    for run in planned_runs(study):
        finish(run, 0.5)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        collect(study, planned_runs(study, ["optimizer.learning_rate=0.5"]))


def test_notes_are_linked_only_where_they_are(reported):
    result, folder, _ = reported
    assert "tried.md" not in (folder / page.FILE).read_text()
    (folder / "tried.md").write_text("# Tried\n")
    page.write_page([result], folder, "make study")
    assert "[tried.md](tried.md)" in (folder / page.FILE).read_text()


def test_an_unfinished_study_says_so(study_file, tmp_path):
    study = load_study(study_file())
    runs = planned_runs(study)
    for run in runs[:2]:
        finish(run, 0.5)
    result = collect(study, runs)
    command.report([result], tmp_path / "page", "make study")
    written = (tmp_path / "page" / page.FILE).read_text()
    assert "**7 of 9 runs are not finished.**" in written
    assert "one seed: nothing can be said" in written
    assert result.methods == ["grpo", "rest"]


def test_nothing_to_report(study_file, tmp_path):
    with pytest.raises(UserError, match="no finished runs"):
        command.run(
            [study_file()], workers=1, output=str(tmp_path / "page"),
            overrides=[], report_only=True, dry_run=False,
        )  # fmt: skip
    assert not (tmp_path / "page").exists()


def test_running_mean():
    np.testing.assert_allclose(smooth(np.array([1.0, 2, 3, 10]), 3), [1.5, 2, 5, 6.5])


@pytest.mark.slow
def test_a_real_study_is_stopped_and_goes_on(study_file, tmp_path, monkeypatch):
    """Two real runs of two steps; the first try is stopped before it begins its second run."""
    monkeypatch.chdir(pathlib.Path(__file__).resolve().parents[3])
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the runs have one device, not the tests' eight
    small = [
        "train.steps=2", "data.eval_limit=8", "rollout.prompts_per_step=2", "train.eval_every=0",
        "train.checkpoint_every=1",
    ]  # fmt: skip
    file = study_file(methods=["grpo", "rest"], pairs=[], seeds=[0], overrides=small)
    runs = planned_runs(load_study(file))
    with monkeypatch.context() as patch:
        original = runner.train
        patch.setattr(
            runner,
            "train",
            lambda config, cores, stop: original(config, cores, stop) or stop.set() or 0,
        )
        with pytest.raises(RunStopped, match="goes on"):
            runner.carry_out(runs, 1)
    assert [runner.is_finished(run) for run in runs] == [True, False]
    code = command.run(
        [file],
        workers=1,
        output=str(tmp_path / "page"),
        overrides=[],
        report_only=False,
        dry_run=False,
    )
    assert code == 0 and all(map(runner.is_finished, runs))
    assert "rest" in (tmp_path / "page" / page.FILE).read_text()
