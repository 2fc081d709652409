"""The loop around the steps, with a tiny policy: sampling one step ahead, the trace of a step, rates, the clock."""

import contextlib
import gzip
import json
import pathlib
import re
import shutil
import signal
import time
import types
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from rest_jax import cli, config
from rest_jax.data.loader import Loader
from rest_jax.data.tokenize import load_split, prepare
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.run import loop
from rest_jax.run.load import load_policy
from rest_jax.run.loop import Clock
from rest_jax.run.metrics import METRICS, read_lines
from rest_jax.templates import TEMPLATES
from rest_jax.types import PromptBatch, Sampling
from tests.runs import assert_same, finish, lines, recipe, start, state

STEPS, SAVED, KILLED = 5, 3, 4
NEW = {
    "rollout/decode_slot_utilisation",
    "rollout/staleness",
    "update/skipped_groups",
    "update/micro_batches",
    "update/padding",
    "time/data",
    "time/rollout",
    "time/score",
    "time/score_wait",
    "time/update",
    "time/rollout_tokens_per_second",
    "time/reward_tokens_per_second",
    "time/reward_responses_per_second",
    "time/update_tokens_per_second",
}


@pytest.fixture(scope="module")
def source(model, tmp_path_factory) -> pathlib.Path:
    """The tiny policy with a loud end-of-turn token: its answers end early, each at another length."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    embed = weights["model.embed_tokens.weight"]
    embed[json.loads((folder / "config.json").read_text())["eos_token_id"]] *= 4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def stale(source: pathlib.Path, output: pathlib.Path) -> dict:
    """Five steps of two updates, each but the first sampled two updates too early."""
    raw = recipe(
        source,
        output,
        rollout={
            "staleness": 1,
            "recompute_logprobs": True,
            "tis_cap": 2.0,
            "decode_slots": 6,
        },
        optimizer={"learning_rate": 2e-4},
        train={
            "steps": STEPS,
            "eval_before": False,
            "eval_every": 0,
            "checkpoint_every": SAVED,
            "max_tokens_per_microbatch": 1,
            "measure_change": True,
        },
    )
    raw["data"] |= {"eval": None, "max_prompt_tokens": 128, "synthetic_size": 128}
    raw["reward"] = {"length_weight": 1.0, "length_target_tokens": 24}  # else all are alike
    return raw


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The folder and the output of a run that nothing interrupted and that traced its second step."""
    folder = tmp_path_factory.mktemp("unbroken")
    out = finish(start("train", stale(source, folder), folder, "--profile", "2"))
    return folder / "tiny", out


@pytest.fixture(scope="module")
def broken(source, tmp_path_factory) -> "Broken":
    """The same run killed a step after its checkpoint, then started again."""
    folder = tmp_path_factory.mktemp("broken")
    raw = stale(source, folder)
    process = start("train", raw, folder, program="killed_after_step.py")
    killed = finish(process, -signal.SIGKILL)
    before = lines(folder / "tiny")
    restarted = finish(start("train", raw, folder, "--profile", "2"))
    return Broken(folder / "tiny", killed, before, restarted)


class Broken(NamedTuple):
    """A run in two parts."""

    run: pathlib.Path
    killed: str  # output of the first part
    before: list[dict]  # its metrics
    restarted: str  # output of the second part


def test_staleness_is_one_but_at_the_start(unbroken):
    found = read_lines(unbroken[0] / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    staleness = [line["rollout/staleness"] for line in found]
    assert staleness == [0, 1, 1, 1, 1]
    # the recomputed log-probs tell how far the policy that sampled is from the one that is trained
    mismatch = np.array([line["rollout/logp_mismatch"] for line in found])
    old = np.array(staleness, bool)
    assert mismatch[~old].max() < 1e-5 and mismatch[old].min() > 1e-4
    assert all(line["update/grad_norm"] > 0 for line in found)


def test_a_step_raises_what_was_better(unbroken):
    """Log-probs rise more, or fall less, where the advantage is positive."""
    for line in read_lines(unbroken[0] / "metrics.jsonl"):
        for region in ("tag", "other"):  # what this start samples
            rise, fall = (line[f"region/{region}/change_{s}"] for s in ("positive", "negative"))
            assert rise > fall


@pytest.mark.slow
def test_two_runs_of_a_seed_are_the_same(unbroken, broken):
    """Up to where one of them was killed."""
    unbroken_lines = lines(unbroken[0])
    assert SAVED <= len(broken.before) < STEPS
    assert broken.before == unbroken_lines[: len(broken.before)]


@pytest.mark.slow
def test_killed_after_a_checkpoint_and_restarted_is_the_unbroken_run(unbroken, broken):
    assert lines(broken.run) == lines(unbroken[0])
    one, other = state(broken.run), state(unbroken[0])
    assert one[2] == STEPS
    assert_same(one, other)
    for name in ("samples.jsonl", "tokens.jsonl"):
        assert read_lines(broken.run / name) == read_lines(unbroken[0] / name)


@pytest.mark.slow
def test_stopped_after_every_step_and_restarted_is_the_unbroken_run(source, unbroken, tmp_path):
    """Each stop saves the batch that was sampled ahead, at steps without a checkpoint of their own, too."""
    raw = stale(source, tmp_path)
    finish(start("train", raw, tmp_path, "--profile", "2", program="stopped_after_each_step.py"))
    assert lines(tmp_path / "tiny") == lines(unbroken[0])
    assert_same(state(tmp_path / "tiny"), state(unbroken[0]))


@pytest.mark.slow
def test_what_is_saved_is_the_position_after_the_batch_trained_on(broken):
    """Not after the one that was sampled ahead, which a run stopped at any step reads from the checkpoint."""
    said = re.findall(r"^loader (.*)$", broken.killed, re.MULTILINE)
    resolved = config.load([broken.run / "config.yaml"])
    loaded = load_policy(resolved.model, config.MeshConfig(fsdp=-1))
    template = TEMPLATES[resolved.data.template]
    records = load_split(resolved.data.train, resolved.data, resolved.data.train_limit)
    prompts = prepare(records, loaded.tokenizer, template, resolved.data)
    loader = Loader(
        prompts, PromptBatch, batch=4, seed=0, pad_id=0,
        cfg=resolved.data, num_steps=STEPS,
    )  # fmt: skip
    expected = []
    for _ in range(KILLED):
        next(loader)
        expected.append(loader.get_state())
    assert [json.loads(state) for state in said] == expected


def test_a_trace_opens_in_perfetto(unbroken):
    run, out = unbroken
    (said,) = re.findall(r"trace of step 2: (\S+) opens in ui\.perfetto\.dev, (\S+) in xprof", out)
    path = pathlib.Path(said[0])
    assert path.name == "perfetto_trace.json.gz" and path.is_relative_to(run / "profile")
    assert pathlib.Path(said[1]) == run / "profile"
    assert list((run / "profile").rglob("perfetto_trace.json.gz")) == [path]
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"data", "rollout", "update", "reward"} <= names  # the host's stages
    assert list((run / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_step_that_is_not_run_has_no_trace(broken):
    assert "no trace: step 2 was not among the steps run" in broken.restarted
    assert not (broken.run / "profile").exists()


def test_the_metrics_of_speed_and_packing(unbroken):
    for line in read_lines(unbroken[0] / "metrics.jsonl"):
        assert NEW <= line.keys() <= METRICS.keys() | {"step"}
        for name in NEW:
            assert np.isfinite(line[name]) and line[name] >= 0, name
        assert 0 < line["rollout/decode_slot_utilisation"] <= 1
        assert 0 <= line["update/padding"] < 1
        # without another term in the loss, these are the groups that are not computed
        assert line["update/skipped_groups"] == pytest.approx(line["reward/equal_groups"])
        assert line["update/micro_batches"] >= 1
        # no peak of a CPU is published
        assert not {"time/update_mfu", "time/rollout_mfu"} & line.keys()
        tokens, responses = line["rollout/tokens"], 16
        assert line["rollout/response_tokens"] * responses == pytest.approx(tokens)
        assert line["time/rollout_tokens_per_second"] * line["time/rollout"] == pytest.approx(
            tokens
        )
        assert line["time/reward_tokens_per_second"] * line["time/score"] == pytest.approx(tokens)
        assert line["time/reward_responses_per_second"] * line["time/score"] == pytest.approx(16)
        trajectory = tokens + 4 * 4 * line["rollout/prompt_tokens"]
        assert line["time/update_tokens_per_second"] * line["time/update"] == pytest.approx(
            trajectory, rel=1e-4
        )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.staleness=1"], "rollout.tis_cap"),
        (["rollout.staleness=1", "rollout.recompute_logprobs=true"], "rollout.tis_cap"),
        (["rollout.staleness=1", "rollout.tis_cap=2"], "rollout.recompute_logprobs"),
        (["rollout.staleness=2"], "rollout.staleness"),
        (["rollout.decode_slots=0"], "rollout.decode_slots"),
        (["rollout.prompt_cache_entries=0"], "rollout.prompt_cache_entries"),
        (["train.max_tokens_per_microbatch=0"], "train.max_tokens_per_microbatch"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_one_line(source, tmp_path, capsys, overrides, said):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe(source, tmp_path / "out")))
    assert cli.main(["train", str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["0", "-1", "two"])
def test_a_step_to_trace_is_a_whole_number(capsys, step):
    assert cli.main(["train", "any.yaml", f"--profile={step}"]) == 2
    error = capsys.readouterr().err
    assert "--profile" in error and error.count("\n") == 1


def test_what_the_cache_holds_reaches_the_sampler(source):
    loaded = load_policy(config.ModelConfig(source=str(source)), config.MeshConfig(fsdp=-1))
    rollout = config.RolloutConfig(decode_slots=3, prompt_cache_entries=2, cache_tokens=64_000)
    made = make_sampler(loaded, rollout, 4, Sampling()).settings
    assert (made.decode_slots, made.prompt_cache_entries) == (3, 2)
    assert made.sizes(8, 100)[:3] == (2, 3, 1000)
    evaluation = make_sampler(loaded, rollout, 1, Sampling(greedy=True)).settings
    # a prompt with one response needs an entry a decode slot
    assert evaluation.sizes(8, 100)[:3] == (3, 3, 1000)


def test_times_are_those_of_the_slowest_process_and_cpu_time_is_of_all(monkeypatch):
    stop = types.SimpleNamespace(
        limits=config.DistributedConfig(), waiting=lambda _: contextlib.nullcontext()
    )
    own = {"time/score": 1.0, "time/step": 3.0, "time/cpu": 5.0}
    other = {"time/score": 2.0, "time/step": 2.5, "time/cpu": 4.0}
    monkeypatch.setattr(loop, "exchange", lambda text, timeout: [text, json.dumps(other)])
    run = types.SimpleNamespace(stop=stop, folder=pathlib.Path("run"))
    found = loop.Loop(run, 1, None, {})._of_all(own)  # type: ignore[arg-type]
    assert found == {"time/score": 2.0, "time/step": 3.0, "time/cpu": 9.0}


def test_the_laps_of_a_clock_leave_no_gap(monkeypatch):
    now = iter([1.0, 2.5, 2.5, 7.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    clock = Clock()
    assert [clock.lap()[0] for _ in range(3)] == [1.5, 0.0, 4.5]
    assert clock.elapsed == 6.0
