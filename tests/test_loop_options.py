"""Options of the loop, with a tiny policy: one step of look ahead, the trace of a step, the names of metrics."""

import gzip
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from rest_jax import cli, config, train
from rest_jax.data.loader import make_loader
from rest_jax.rollout.scheduler import policy_sampler
from rest_jax.run.metric_table import METRICS
from rest_jax.run.metrics import read_lines
from rest_jax.run.policy import load_policy
from rest_jax.types import Sampling
from tests import test_train

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
    "time/rollout_mfu",
    "time/update_mfu",
}


model = test_train.model  # the fixture


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
    """Five steps of two updates, each but the first and the one after the checkpoint sampled one update too early."""
    raw = test_train.recipe(
        source,
        output,
        rollout={
            "staleness": 1,
            "recompute_logprobs": True,
            "tis_cap": 2.0,
            "lanes": 6,
        },
        optimizer={"learning_rate": 2e-4},
        train={
            "steps": STEPS,
            "eval_before": False,
            "eval_every": 0,
            "checkpoint_every": SAVED,
            "max_tokens_per_microbatch": 1,
        },
    )
    raw["data"] |= {"eval": None, "max_prompt_tokens": 128, "synthetic_size": 128}
    raw["reward"] = {"length_weight": 1.0, "length_target_tokens": 24}  # else all are alike
    return raw


def launch(raw: dict, folder: pathlib.Path, *options: str, code: str | None = None) -> str:
    """Output of `rest-jax train` in a process of one device; `code` runs before it, and SIGKILL is its end then."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    program = ["-m", "rest_jax"] if code is None else ["-c", code]
    process = subprocess.Popen(
        [sys.executable, *program, "train", str(path), *options],
        env=test_train.environment() | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # its threads say where they are
        out, _ = process.communicate()
    assert process.returncode == (0 if code is None else -signal.SIGKILL), out
    return out


KILL = f"""
import json, os, signal, sys
from rest_jax.run import machine
machine.configure()  # before jax is there, as in the program itself
from rest_jax import cli, train

def after(self, step, last, plain=train.Loop.after):
    plain(self, step, last)
    print("loader", json.dumps(self.loader_state), flush=True)
    if step == {KILLED}:
        self.opened.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)

train.Loop.after = after
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The folder and the output of a run that nothing interrupted and that traced its second step."""
    folder = tmp_path_factory.mktemp("unbroken")
    out = launch(stale(source, folder), folder, "--profile", "2")
    return folder / "tiny", out


@pytest.fixture(scope="module")
def broken(source, tmp_path_factory) -> "Broken":
    """The same run killed a step after its checkpoint, then started again."""
    folder = tmp_path_factory.mktemp("broken")
    raw = stale(source, folder)
    killed = launch(raw, folder, code=KILL)
    before = test_train.lines(folder / "tiny")
    return Broken(folder / "tiny", killed, before, launch(raw, folder, "--profile", "2"))


class Broken(NamedTuple):
    """A run in two parts."""

    run: pathlib.Path
    killed: str  # output of the first part
    before: list[dict]  # its metrics
    restarted: str  # output of the second part


def test_staleness_is_one_but_at_the_start_and_after_a_checkpoint(unbroken):
    found = read_lines(unbroken[0] / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    staleness = [line["rollout/staleness"] for line in found]
    assert staleness == [0, 1, 1, 0, 1]
    # the recomputed log-probs tell how far the policy that sampled is from the one that is trained
    mismatch = np.array([line["rollout/logp_mismatch"] for line in found])
    old = np.array(staleness, bool)
    assert mismatch[~old].max() < 1e-5 and mismatch[old].min() > 1e-4
    assert all(line["update/grad_norm"] > 0 for line in found)


def test_two_runs_of_a_seed_are_the_same(unbroken, broken):
    """Up to where one of them was killed."""
    lines = test_train.lines(unbroken[0])
    assert SAVED <= len(broken.before) < STEPS
    assert broken.before == lines[: len(broken.before)]


def test_killed_after_a_checkpoint_and_restarted_is_the_unbroken_run(unbroken, broken):
    assert test_train.lines(broken.run) == test_train.lines(unbroken[0])
    one, other = test_train.state(broken.run), test_train.state(unbroken[0])
    assert one[2] == STEPS
    test_train.same(one, other)
    samples = [read_lines(run / "samples.jsonl") for run in (broken.run, unbroken[0])]
    assert samples[0] == samples[1]


def test_what_is_saved_is_the_position_after_the_batch_trained_on(broken):
    """Not after the one that was sampled ahead: a run stopped at any step drops that one and takes it again."""
    said = re.findall(r"^loader (.*)$", broken.killed, re.MULTILINE)
    resolved = config.load([broken.run / "config.yaml"])
    loaded = load_policy(resolved.model, config.MeshConfig(fsdp=-1))
    loader = make_loader(
        train.training_prompts(resolved, loaded), batch_prompts=4, seed=0, pad_id=0,
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
        assert line["time/update_mfu"] > 0 and line["time/rollout_mfu"] > 0
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
    path.write_text(yaml.safe_dump(test_train.recipe(source, tmp_path / "out")))
    assert cli.main(["train", str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["0", "-1", "two"])
def test_a_step_to_trace_is_a_whole_number(tmp_path, capsys, step):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "any.yaml", f"--profile={step}"])
    assert stop.value.code == 2
    assert "whole number of at least 1" in capsys.readouterr().err


def test_lanes_and_slots_reach_the_sampler(source):
    loaded = load_policy(config.ModelConfig(source=str(source)), config.MeshConfig(fsdp=-1))
    rollout = config.RolloutConfig(lanes=3, prompt_slots=2)
    made = policy_sampler(loaded, 4, 10, Sampling(), rollout).settings
    assert (made.lanes, made.prompt_slots, made.sizes(8)) == (3, 2, (2, 3))
    evaluation = policy_sampler(loaded, 1, 10, Sampling(greedy=True), rollout).settings
    assert evaluation.sizes(8) == (3, 3)  # a prompt with one response needs a slot a lane
