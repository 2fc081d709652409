"""Every shipped recipe loads, says how it is run, and passes a dry run; every method trains three steps and does what it says.

The three steps are those of the files as shipped, on the quickstart policy with fewer prompts, in one process with one
device, so that the methods share what is compiled. Two prompts of eight answers are of few shapes, and seldom without any
advantage.
"""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

from rest_jax import builtin, cli, config
from rest_jax.run.metrics import read_lines
from tests.test_train import environment, finish, lines, model, recipe  # noqa: F401

SUPERVISED = ("sft", "tsft", "rsft")
WARM = ("sft_grpo", "sft_rest", "sft_rest_tuned")
METHODS = (
    *SUPERVISED,
    "grpo",
    "dr_grpo",
    "rest",
    "rest_released",
    "rest_inverse_gini",
    "rest_adaptive",
    "rest_mass",
    *WARM,
    "ablation_static_reward",
    "ablation_no_cot",
    "ablation_no_curriculum",
    "ablation_kl",
    "ablation_entropy_bonus",
)
REGIONS = ("tag", "scaffold", "name", "param", "think", "response", "other")
STEPS = 3
SMALL = (
    "rollout.prompts_per_step=2",
    "rollout.group_size=8",
    "rollout.max_response_tokens=96",
    "data.synthetic_size=32",
    "data.eval=null",
    "sft.batch_size=8",
    f"train.steps={STEPS}",
    "train.checkpoint_every=3",
)
# Models and data that are not here, by recipe: the rest of the file is tried all the same.
ELSEWHERE = {
    "qwen3_1p7b_rlla": ["rollout.prompts_per_step=64", "data.synthetic_size=64"],
    "smollm2_rlla_cpu": ["rollout.prompts_per_step=8", "data.synthetic_size=64"],
}
HERE = ("model.source=configs/quickstart_policy", "data.train=synthetic:train",
        "data.eval=synthetic:eval", "data.brief_prompt=true")  # fmt: skip


def header(name: str) -> str:
    text = builtin.find_config(name).read_text()
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))


def test_every_method_has_its_file():
    assert set(METHODS) | set(ELSEWHERE) <= set(builtin.names())


@pytest.mark.parametrize("name", builtin.names())
def test_every_file_says_how_it_is_run(name):
    said = header(name)
    assert "Command:" in said and "Hardware:" in said
    if name in METHODS:
        assert f"rest-jax train {name}\n" in said
        assert f"rest-jax train {name} --base qwen3_1p7b_rlla " in said and "Numbers:" in said


@pytest.mark.parametrize("name", builtin.names())
def test_dry_run_of_every_file(name, tmp_path, monkeypatch, capsys):
    path = str(builtin.find_config(name).absolute())
    monkeypatch.chdir(tmp_path)
    words = [*HERE, *ELSEWHERE[name]] if name in ELSEWHERE else []
    assert cli.main(["train", path, "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "steps of" in said and list(tmp_path.iterdir()) == []
    assert any(line.startswith("sft: ") for line in said.splitlines()) == (name in (*WARM, "sft"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", ["qwen3_1p7b_rlla", "smollm2_rlla_cpu"])
def test_every_method_on_every_scale(name, base):
    loaded, scale = config.load(builtin.find_config(name), base=base), config.load(
        builtin.find_config(base), trainer="sft" if name in SUPERVISED else "rl"
    )  # fmt: skip
    assert loaded.name == f"{name}-{scale.name}"
    same = ("model", "data", "rollout", "optimizer", "mesh", "train", "seed", "output")
    for section in same:
        assert getattr(loaded, section) == getattr(scale, section), section
    if name in WARM:
        assert loaded.warm_start == config.load(builtin.find_config("sft"), base=base)


def test_the_paper_s_supervised_numbers():
    start = config.load(builtin.find_config("sft"), base="qwen3_1p7b_rlla")
    optimizer, train = start.optimizer, start.train
    assert (optimizer.learning_rate, optimizer.warmup_fraction) == (5e-6, 0.05)
    assert (train.epochs, train.steps, start.sft.max_tokens) == (3, None, 8192)


# All methods sample alike: the compiled sampler of the first serves the others, as jax's cache on disk would, without
# tracing it again.
SCRIPT = """
import json, sys
from rest_jax import cli
from rest_jax.run import environment
environment.configure()
from rest_jax.rollout import scheduler
make, made = scheduler.make_engine, {}
def shared(decoder, settings, mesh, shardings):
    key = decoder, settings, mesh
    if key not in made:
        made[key] = shardings, make(decoder, settings, mesh, shardings)
    assert made[key][0] == shardings
    return made[key][1]
scheduler.make_engine = shared
for name, words in json.loads(sys.argv[1]):
    print("RUN", name, flush=True)
    code = cli.main(words)
    if code: sys.exit(code)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """Three steps of every method, then a supervised run that starts from the GRPO run."""
    output = tmp_path_factory.mktemp("methods") / "runs"
    todo = []
    for name in METHODS:
        words = [*SMALL, f"output={output}"]
        words += ["warm_start.name=start", "warm_start.train.steps=2"] if name in WARM else []
        todo.append((name, ["train", name, *words]))
    again = ["name=sft_after_grpo", f"model.source={output / 'grpo'}", "train.steps=1"]
    todo.append(("again", ["train", "sft", *SMALL, f"output={output}", *again]))
    words = [sys.executable, "-c", SCRIPT, json.dumps(todo)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (output / "said.txt").write_text(done.stdout)
    return output


def steps(runs: pathlib.Path, name: str) -> list[dict]:
    found = [line for line in read_lines(runs / name / "metrics.jsonl") if "update/loss" in line]
    assert all(math.isfinite(value) for line in found for value in line.values())
    return found


def of_regions(line: dict, what: str) -> dict[str, float]:
    """A metric of the regions that occur in the batch."""
    return {r: line[f"region/{r}/{what}"] for r in REGIONS if line[f"region/{r}/count"] > 0}


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_and_their_record(runs, name):
    found = steps(runs, name)
    assert [line["step"] for line in found] == [1, 2, 3]
    if name not in SUPERVISED:
        assert any(line["update/grad_norm"] > 0 for line in found)
        assert all(of_regions(line, "count").keys() >= {"tag", "name", "think"} for line in found)
    recorded = yaml.safe_load((runs / name / "config.yaml").read_text())
    assert recorded["name"] == name and recorded["warm_start"] is None
    assert not {"base", "supervised"} & recorded.keys()
    assert recorded["trainer"] == ("sft" if name in SUPERVISED else "rl")


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "sft_grpo"])
def test_grpo_weighs_every_token_alike(runs, name):
    for line in steps(runs, name):
        for what in ("base", "weight"):
            assert of_regions(line, what) == pytest.approx(dict.fromkeys(of_regions(line, what), 1))


def test_dr_grpo_divides_by_a_constant_length(runs):
    """Same rollouts at the first step, another advantage and denominator."""
    plain, dr = steps(runs, "grpo")[0], steps(runs, "dr_grpo")[0]
    assert plain["reward/mean"] == dr["reward/mean"]
    assert plain["rollout/tokens"] == dr["rollout/tokens"]
    assert plain["update/grad_norm"] != dr["update/grad_norm"]


def by_rule(line: dict, what: str, second_moment) -> dict[str, float]:
    """Oracle of an entropy rule before any curriculum: NAME is the anchor, all within [0.1, 4]."""
    moment = {r: second_moment(value) for r, value in of_regions(line, what).items()}
    return {r: min(4.0, max(0.1, 1.2 * moment["name"] / m)) for r, m in moment.items()}


def bound(entropy: float) -> float:
    return -math.expm1(-max(entropy, 1e-3))


def gini(value: float) -> float:
    return max(value, bound(0.0))


@pytest.mark.parametrize(
    ("name", "what", "moment"),
    [
        ("rest", "entropy", bound),
        ("sft_rest", "entropy", bound),
        ("rest_inverse_gini", "gini", gini),
    ],
)
def test_rest_weighs_by_the_second_moment_of_the_score(runs, name, what, moment):
    first, *_ = found = steps(runs, name)
    assert of_regions(first, "base") == pytest.approx(by_rule(first, what, moment), rel=1e-4)
    assert [line["curriculum/nu"] for line in found] == pytest.approx([0, 1 / 3, 2 / 3])
    for line in found:  # normalised: the mean over all tokens is one
        weight, count = of_regions(line, "weight"), of_regions(line, "count")
        mean = sum(weight[r] * count[r] for r in weight) / sum(count.values())
        assert mean == pytest.approx(1, abs=1e-4)
    assert len(set(of_regions(first, "weight").values())) > 2


def test_the_released_numbers(runs):
    for s, line in enumerate(steps(runs, "rest_released")):
        ramp = 0.6 + 0.002 * s
        zero = dict.fromkeys(("scaffold", "response", "other"), 0.0)
        expected = {"tag": 1.0, "name": 1.2, "param": ramp, "think": ramp} | zero
        found = of_regions(line, "base")
        assert found == pytest.approx({r: expected[r] for r in found}, abs=1e-6)
        assert line["reward/progress"] == pytest.approx(s / 150)


def test_the_adaptive_curriculum_follows_the_format_score(runs):
    average = None
    for line in steps(runs, "rest_adaptive"):
        score = line["reward/format_score"]
        average = score if average is None else 0.9 * average + 0.1 * score
        assert line["curriculum/nu"] == pytest.approx(
            min(1, max(0, (average - 0.5) / 0.45)), abs=1e-5
        )


def test_the_mass_target_sets_shares(runs):
    """Of the regions with a share of their own; RESPONSE and OTHER keep w_min on top."""
    first = steps(runs, "rest_mass")[0]
    weight, count = of_regions(first, "base"), of_regions(first, "count")
    mass = {r: weight[r] * count[r] for r in weight}
    shares = {"format": mass["tag"] + mass["scaffold"], "name": mass["name"], "param": mass["param"],
              "think": mass["think"]}  # fmt: skip
    unit = shares["name"] / 0.25
    expected = {
        "format": 0.20 * unit,
        "name": 0.25 * unit,
        "param": 0.25 * unit,
        "think": 0.3 * unit,
    }
    assert shares == pytest.approx(expected, rel=1e-3)


def test_the_tuned_curriculum_starts_higher_and_ends_sooner(runs):
    found = steps(runs, "sft_rest_tuned")
    assert [line["curriculum/nu"] for line in found] == pytest.approx([0, 0.5, 1])
    assert found[0]["region/param/base"] == found[0]["region/think/base"] == 1.0


def test_the_reward_is_dynamic_unless_ablated(runs):
    for s, line in enumerate(steps(runs, "rest")):
        high = 2 - line["reward/progress"]
        assert line["reward/progress"] == pytest.approx(s / STEPS)
        expected = high * (2 * line["reward/format_score"] - 1)
        assert line["reward/format_part"] == pytest.approx(expected, abs=1e-5)
    for line in steps(runs, "ablation_static_reward"):
        assert line["reward/format_part"] == pytest.approx(line["reward/format_score"], abs=1e-6)


def test_no_gradient_from_reasoning(runs):
    for line in steps(runs, "ablation_no_cot"):
        assert line["region/think/count"] > 0
        assert line["region/think/weight_share"] == line["region/think/weight"] == 0
        assert line["region/name/weight"] > 0
    assert all(line["region/think/weight_share"] > 0 for line in steps(runs, "rest"))


def test_no_curriculum(runs):
    assert [line["curriculum/nu"] for line in steps(runs, "ablation_no_curriculum")] == [0, 0, 0]


def test_kl_term(runs):
    for line in steps(runs, "ablation_kl"):
        expected = line["update/policy_loss"] + 0.003 * line["update/kl"]
        assert line["update/loss"] == pytest.approx(expected, abs=1e-6)
    assert steps(runs, "ablation_kl")[-1]["update/kl"] > 0
    assert all(line.get("update/kl", 0) == 0 for line in steps(runs, "rest"))


def test_entropy_bonus(runs):
    for line in steps(runs, "ablation_entropy_bonus"):
        expected = line["update/policy_loss"] - 0.001 * line["update/entropy"]
        assert line["update/loss"] == pytest.approx(expected, abs=1e-6)
        assert line["update/entropy"] > 0


def test_supervised_scales(runs):
    """Same records and weights at the first step: losses on some tokens counted twice."""
    plain, calls, reasoning = (steps(runs, name)[0]["update/loss"] for name in SUPERVISED)
    assert plain < calls < 2 * plain and plain < reasoning < 2 * plain
    assert calls + reasoning < 3 * plain  # tags, response and end of turn are in neither


def test_the_warm_start_is_trained_once_and_shared(runs):
    said = (runs / "said.txt").read_text()
    assert said.count(f"start: finished, in {runs / 'start'}\n") == len(WARM) - 1
    first = {name: steps(runs, name)[0] for name in (*WARM, "grpo")}
    for name in WARM:
        recorded = yaml.safe_load((runs / name / "config.yaml").read_text())
        assert recorded["model"]["source"] == str(runs / "start")
        assert first[name]["region/think/entropy"] == first[WARM[0]]["region/think/entropy"]
    assert first["sft_grpo"]["region/think/entropy"] != first["grpo"]["region/think/entropy"]


def test_supervised_after_reinforcement_without_conversion(runs):
    found = steps(runs, "sft_after_grpo")
    assert found[0]["step"] == 1
    assert found[0]["update/loss"] != steps(runs, "sft")[0]["update/loss"]


def two_stages(model: pathlib.Path, folder: pathlib.Path) -> list[str]:  # noqa: F811
    """The words of a run with a warm start, on a base with a random policy."""
    base = folder / "scale.yaml"
    raw = recipe(model, folder / "runs", train={"steps": 1}, data={"eval": None})
    base.write_text(yaml.safe_dump(raw))
    gold = {"base": "scale", "trainer": "sft", "train": {"steps": 12, "eval_every": 0}}
    (folder / "gold.yaml").write_text(yaml.safe_dump(gold))
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump({"base": "scale", "warm_start": "gold"}))
    return [sys.executable, "-m", "rest_jax", "train", str(path)]


def launch(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_interrupted_warm_start_goes_on(model, tmp_path):  # noqa: F811
    words = two_stages(model, tmp_path)
    process = launch(words)
    metrics = tmp_path / "runs" / "gold" / "metrics.jsonl"
    while not (metrics.is_file() and "update/loss" in metrics.read_text()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved at step" in finish(process)
    left = lines(tmp_path / "runs" / "gold")[-1]["step"]
    assert left < 12 and not (tmp_path / "runs" / "both").exists()
    finish(launch(words))
    done = [line["step"] for line in lines(tmp_path / "runs" / "gold") if "update/loss" in line]
    assert done == list(range(1, 13))
    assert lines(tmp_path / "runs" / "both")[-1]["step"] == 1


def test_a_second_process_waits_for_the_warm_start(model, tmp_path):  # noqa: F811
    words = two_stages(model, tmp_path)
    processes = [launch([*words, f"name=seed{i}", f"seed={i}"]) for i in range(2)]
    said = [finish(process) for process in processes]
    assert sum("gold: another process trains it; waiting" in text for text in said) == 1
    assert sum("gold: finished" in text for text in said) == 1
    for i in range(2):
        assert lines(tmp_path / "runs" / f"seed{i}")[-1]["step"] == 1


def test_refusals_leave_nothing(model, tmp_path, capsys):  # noqa: F811
    *_, path = two_stages(model, tmp_path)
    fits = ("rollout.prompts_per_step=8", "train.prompts_per_update=8", "sft.batch_size=8")
    for word, said in (
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("name=gold", "share the folder"),
        ("trainer=sft", "warm_start: only a run with trainer rl"),
        ("sft.max_tokens=3", "sft.max_tokens 3"),
    ):
        assert cli.main(["train", path, *fits, word]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (tmp_path / "runs").exists(), os.listdir(tmp_path / "runs")
    other = tmp_path / "runs" / "both"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text(config.dump(config.load(path, ["seed=5"])))
    assert cli.main(["train", path, *fits]) == 2
    assert "holds a run of another config" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "gold").exists()
