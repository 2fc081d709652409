"""Every builtin method takes two steps at a tiny size: its numbers are those of tests/golden/methods.json, and it does what
its file says. tests/programs/golden_steps.py makes the runs, and the golden file anew when a change of numbers is meant.
"""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from rest_jax import config, sft, train
from tests.conftest import REPOSITORY
from tests.programs.golden_steps import FILES, GOLDEN, METHODS, SMALL, SUPERVISED, golden_lines
from tests.runs import environment

REGIONS = ("tag", "scaffold", "name", "param", "think", "response", "other")
# Models and data that are not here, by the scale: the rest of the file is tried all the same.
HERE = ["model.source=configs/quickstart_policy", "data.train=synthetic:train",
        "data.eval=synthetic:eval", "data.brief_prompt=true",
        "rollout.max_response_tokens=128"]  # fmt: skip
ELSEWHERE = {
    "qwen3_1p7b": [*HERE, "rollout.prompts_per_step=64", "data.synthetic_size=64"],
    "qwen3_1p7b_sft": [*HERE, "data.synthetic_size=64"],
    "smollm2_135m": [*HERE, "rollout.prompts_per_step=8", "data.synthetic_size=64"],
    "smollm2_135m_sft": [*HERE, "sft.batch_size=8", "data.synthetic_size=64"],
    "smollm2_135m_sgd": [*HERE, "data.synthetic_size=64"],
    "smollm2_135m_sgd_sft": [*HERE, "data.synthetic_size=64"],
    "tiny_inferred_sft": ["data.synthetic_size=64"],
}
SCALES = sorted(path.stem for path in (REPOSITORY / "configs" / "scale").glob("*.yaml"))
# The recipes for real machines (`make aot`) are of the same kind.
ELSEWHERE |= {s: ELSEWHERE["qwen3_1p7b"] for s in SCALES if re.search(r"_(v\d\w|h100x)\d+$", s)}
ELSEWHERE |= {s: [*ELSEWHERE[s], "mesh.expert=1"] for s in SCALES if re.search(r"_a\d+b_", s)}
# The small model has no room for its prompts.
ELSEWHERE["llama3_2_3b_h100x8"] = [*ELSEWHERE["llama3_2_3b_h100x8"], "data.template=toolrl"]


def begin(resolved: config.Config, supervised: bool, dry_run: bool = False) -> None:
    """Trains, or checks what a run needs."""
    (sft.finetune if supervised else train.train)(resolved, dry_run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """Two steps of every method, in a process of one device."""
    output = tmp_path_factory.mktemp("methods") / "runs"
    program = REPOSITORY / "tests" / "programs" / "golden_steps.py"
    words = [sys.executable, str(program), str(output)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


def steps(runs: pathlib.Path, method: str) -> list[dict]:
    found = golden_lines(runs / method)
    assert all(math.isfinite(value) for line in found for value in line.values())
    return found


def of_regions(line: dict, what: str) -> dict[str, float]:
    """A metric of the regions that occur in the batch."""
    return {r: line[f"region/{r}/{what}"] for r in REGIONS if line[f"region/{r}/count"] > 0}


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_passes_a_dry_run(scale, tmp_path, capsys):
    supervised = scale.endswith("_sft")
    files = [f"scale/{scale}", "method/sft" if supervised else "method/rest"]
    words = [*ELSEWHERE.get(scale, []), f"output={tmp_path}", "data.eval_limit=8"]
    begin(config.load(files, words), supervised, dry_run=True)
    assert "steps of" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [path.stem for path in FILES])
def test_every_method_passes_a_dry_run(method, tmp_path, capsys):
    """Those of one rule too, which have no golden numbers."""
    supervised = method in SUPERVISED
    files = ["scale/tiny_sft" if supervised else "scale/tiny", f"method/{method}"]
    words = ["data.synthetic_size=64", "data.eval=null", f"output={tmp_path}"]
    begin(config.load(files, words), supervised, dry_run=True)
    said = capsys.readouterr().out
    assert "steps of" in said and "\nmethod    " in said


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("rest", [], "advantage grpo, token weights inverse_bound (curriculum linear), loss clip"),
        ("gspo", [], "advantage grpo, token weights uniform, loss gspo"),
        (
            "ablation_no_cot",
            [],
            "advantage grpo, token weights inverse_bound (curriculum linear), none on think, loss clip",
        ),
        ("gdpo", [], "advantage gdpo, token weights uniform, loss clip"),
        (
            "rest",
            ["weights.placebo=shuffle", "loss.policy_plugin=own.py:loss"],
            "advantage grpo, token weights inverse_bound (curriculum linear, placebo shuffle), loss own.py:loss",
        ),
    ],
)
def test_a_run_says_which_rules_it_follows(method, words, said):
    assert train.describe_method(config.load(["scale/tiny", f"method/{method}"], words)) == said


@pytest.mark.parametrize("recipe", ["quickstart_sft", "reasoned_sft"])
def test_the_recipes_of_the_builtin_policies_pass_a_dry_run(recipe, tmp_path, capsys):
    words = [
        "model.source=configs/quickstart_policy",
        "data.synthetic_size=64",
        "data.eval_limit=8",
    ]
    loaded = config.load([REPOSITORY / "tools" / f"{recipe}.yaml"], [*words, f"output={tmp_path}"])
    begin(loaded, supervised=True, dry_run=True)
    assert "steps of" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_the_golden_file_has_every_method_but_those_of_one_rule():
    assert "grpo" in METHODS and "rloo" not in METHODS
    assert sorted(json.loads(GOLDEN.read_text())) == METHODS


@pytest.mark.wide
@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_of_every_method(runs, method):
    """Regenerate: python tests/programs/golden_steps.py OUT --update"""
    golden, found = json.loads(GOLDEN.read_text())[method], steps(runs, method)
    assert [line["step"] for line in found] == [1, 2]
    for expected, line in zip(golden, found, strict=True):
        assert line.keys() >= expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (line["step"], name)


@pytest.mark.parametrize("method", METHODS)
def test_the_record_of_every_method(runs, method):
    files = ["scale/tiny_sft" if method in SUPERVISED else "scale/tiny", f"method/{method}"]
    words = [*SMALL, f"name={method}", f"output={runs}"]
    recorded = config.load([runs / method / "config.yaml"])
    assert config.differences(recorded, config.load(files, words)) == []
    raw = yaml.safe_load((runs / method / "config.yaml").read_text())
    assert raw == recorded.model_dump(mode="json")
    if method not in SUPERVISED:
        found = steps(runs, method)
        assert any(line["update/grad_norm"] > 0 for line in found)
        assert all(of_regions(line, "count").keys() >= {"tag", "name", "think"} for line in found)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo"])
def test_grpo_weighs_every_token_alike(runs, method):
    for line in steps(runs, method):
        for what in ("base", "weight"):
            assert of_regions(line, what) == pytest.approx(dict.fromkeys(of_regions(line, what), 1))


@pytest.mark.parametrize("method", ["dr_grpo", "rest_sequence_mean"])
def test_another_denominator(runs, method):
    """The same rollouts at the first step, another gradient."""
    plain = steps(runs, "grpo" if method == "dr_grpo" else "rest")[0]
    other = steps(runs, method)[0]
    assert plain["reward/mean"] == other["reward/mean"]
    assert plain["rollout/tokens"] == other["rollout/tokens"]
    assert plain["update/grad_norm"] != other["update/grad_norm"]


def by_rule(line: dict, what: str, second_moment) -> dict[str, float]:
    """Oracle of an entropy rule before any curriculum: the mean over the tokens is 1, all within [0.02, 20]."""
    count = of_regions(line, "count")
    weight = {r: 1 / second_moment(value) for r, value in of_regions(line, what).items()}
    followed = [r for r in weight if r not in ("response", "other")]
    mean = sum(weight[r] * count[r] for r in followed) / sum(count[r] for r in followed)
    return {r: min(20, max(0.02, w / mean)) if r in followed else 1 for r, w in weight.items()}


def as_shares(weight: dict[str, float], count: dict[str, float]) -> dict[str, float]:
    """Of the total weight."""
    total = sum(weight[r] * count[r] for r in weight)
    return {r: weight[r] * count[r] / total for r in weight}


def of_shares(share: dict[str, float], *lines: dict) -> dict[str, float]:
    """Region weights by the mean of the token counts of two steps."""
    one, two = (of_regions(line, "count") for line in lines)
    count = {r: (one[r] + two[r]) / 2 for r in one}
    return {r: min(20, max(0.02, share[r] * sum(count.values()) / count[r])) for r in share}


def bound(entropy: float) -> float:
    return -math.expm1(-max(entropy, 1e-3))


def gini(value: float) -> float:
    return max(value, bound(0.0))


@pytest.mark.parametrize(
    ("method", "what", "moment"),
    [
        ("rest", "entropy", bound),
        ("rest_literal", "entropy", bound),
        ("rest_inverse_gini", "gini", gini),
    ],
)
def test_rest_weighs_by_the_second_moment_of_the_score(runs, method, what, moment):
    first, second = found = steps(runs, method)
    expected = by_rule(first, what, moment)
    assert of_regions(first, "base") == pytest.approx(expected, rel=1e-4)
    assert (first["curriculum/nu"], second["curriculum/nu"]) == (0, 0.5)
    for line in found:  # normalised: the mean over all tokens is one
        weight, count = of_regions(line, "weight"), of_regions(line, "count")
        mean = sum(weight[r] * count[r] for r in weight) / sum(count.values())
        assert mean == pytest.approx(1, abs=1e-4)
    assert len(set(of_regions(first, "weight").values())) > 2


@pytest.mark.parametrize(("method", "given"), [("rest", 0.375), ("rest_tuned", 0.5)])
def test_what_format_gives_up_by_the_second_step(runs, method, given):
    """Of its share at the start, to parameters and reasoning."""
    first, second = steps(runs, method)
    share = as_shares(by_rule(first, "entropy", bound), of_regions(first, "count"))
    freed = given * (share["tag"] + share["scaffold"])
    gaining = share["param"] + share["think"]
    moved = {r: share[r] * (1 + freed / gaining) for r in ("param", "think")}
    moved |= {r: share[r] * (1 - given) for r in ("tag", "scaffold")}
    expected = of_shares(share | moved, first, second)
    assert of_regions(second, "base") == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_what_is_said_of_rest_holds_in_the_quickstart(tmp_path):
    """Shares of the total weight: format falls, parameters and reasoning rise, names stay within 5 %."""
    words = [f"output={tmp_path}", "name=rest", "data.eval=null", "train.checkpoint_every=100"]
    train.train(config.load(["scale/tiny", "method/rest"], words))
    lines = golden_lines(tmp_path / "rest")
    share = {r: [line[f"region/{r}/weight_share"] for line in lines] for r in REGIONS}
    first, last = (
        {r: sum(v[part]) / 6 for r, v in share.items()} for part in (slice(6), slice(-6, None))
    )
    assert last["tag"] + last["scaffold"] < 0.6 * (first["tag"] + first["scaffold"])
    assert last["param"] > 1.2 * first["param"] and last["think"] > 1.2 * first["think"]
    sixths = [sum(share["name"][i : i + 5]) / 5 for i in range(0, 30, 5)]
    assert sixths == pytest.approx([sixths[0]] * 6, rel=0.05)


def test_the_formulas_of_the_paper(runs):
    first, second = (of_regions(line, "base") for line in steps(runs, "rest_literal"))
    moved = {"tag": -0.2, "scaffold": -0.2, "param": 0.3, "think": 0.3}  # at nu = 0.5
    expected = {r: min(20, max(0.02, first[r] + moved.get(r, 0))) for r in second}
    assert second == pytest.approx(expected, rel=1e-4)


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
        nu = min(1, max(0, (average - 0.5) / 0.45))
        assert line["curriculum/nu"] == pytest.approx(nu, abs=1e-5)


def test_the_mass_target_sets_shares(runs):
    """Of the regions with a share of their own; RESPONSE and OTHER have w_min on top."""
    first = steps(runs, "rest_mass")[0]
    weight, count = of_regions(first, "base"), of_regions(first, "count")
    mass = {r: weight[r] * count[r] for r in weight}
    shares = {"format": mass["tag"] + mass["scaffold"]} | {
        r: mass[r] for r in ("name", "param", "think")
    }
    unit = shares["name"] / 0.25
    expected = {
        "format": 0.2 * unit,
        "name": 0.25 * unit,
        "param": 0.25 * unit,
        "think": 0.3 * unit,
    }
    assert shares == pytest.approx(expected, rel=1e-3)


def test_the_tuned_curriculum_ends_sooner(runs):
    found = steps(runs, "rest_tuned")
    assert [line["curriculum/nu"] for line in found] == pytest.approx([0, 1])


def test_the_second_step_of_the_asynchronous_method_is_sampled_one_update_ahead(runs):
    found, plain = steps(runs, "rest_async"), steps(runs, "rest")
    assert [line["rollout/staleness"] for line in found] == [0, 1]
    assert found[0]["rollout/logp_mismatch"] < 1e-5 < found[1]["rollout/logp_mismatch"]
    assert found[0]["update/grad_norm"] == pytest.approx(plain[0]["update/grad_norm"], rel=1e-4)


def test_the_reward_is_dynamic_unless_ablated(runs):
    for s, line in enumerate(steps(runs, "rest")):
        high = 2 - line["reward/progress"]
        assert line["reward/progress"] == pytest.approx(s / 2)
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
    assert [line["curriculum/nu"] for line in steps(runs, "ablation_no_curriculum")] == [0, 0]


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
