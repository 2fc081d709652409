"""The RL loop on a tiny random policy: resumption bit for bit after SIGKILL, SIGTERM, NaN, refusals, supervised start."""

import dataclasses
import gc
import pathlib
import shutil
import signal
import threading
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from rest_jax import cli, config
from rest_jax.errors import UNFINISHED
from rest_jax.rollout.experience import Collector
from rest_jax.rollout.tokens import read_record
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.metrics import REGION_NAMES, read_lines
from rest_jax.train import copy_reference
from tests.runs import STEPS, assert_same, finish, launch, lines, recipe, start, state


def tiny_run(model: pathlib.Path, output: pathlib.Path, **changes) -> dict:
    """`recipe` with prompts of one padded size, of which fewer programs are made."""
    return recipe(model, output, seed=1, data={"max_prompt_tokens": 128}, **changes)


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start("train", tiny_run(model, folder), folder))
    return folder / "tiny"


def test_the_times_of_a_run_sum_to_its_length(unbroken):
    """One clock: steps, evaluations and checkpoints leave no gap and are counted once."""
    found = read_lines(unbroken / "metrics.jsonl")
    last = [line for line in found if "time/elapsed" in line][-1]
    names = ("time/step", "time/eval", "time/checkpoint")
    until = found[: found.index(last) + 1]
    total = sum(line.get(name, 0.0) for line in until for name in names)
    assert total == pytest.approx(last["time/elapsed"], rel=1e-3)


def test_a_run_leaves_what_it_says(unbroken):
    found = lines(unbroken)
    assert [line["step"] for line in found] == [0, 1, 2, 2, 3, 4, 4]
    steps = [line for line in found if "update/loss" in line]
    assert len(steps) == STEPS and max(line["update/grad_norm"] for line in steps) > 0
    # absent where the first update of the step had no group with advantage
    mismatch = [line["rollout/logp_mismatch"] for line in steps if "rollout/logp_mismatch" in line]
    assert 0 < max(mismatch) < 1e-3
    assert [line["curriculum/nu"] for line in steps] == pytest.approx([0, 0.25, 0.5, 0.75])
    for region in ("tag", "think", "other"):
        assert f"region/{region}/weight_share" in steps[0]
    samples = read_lines(unbroken / "samples.jsonl")
    shown = {"split", "id", "prompt", "gold", "response", "reward"}
    assert all(shown <= sample.keys() for sample in samples)
    # what is asked, and what was expected, can be read
    assert all("<|im_start|>user" in sample["prompt"] for sample in samples)
    assert all(sample["gold"]["calls"] or sample["gold"]["response"] for sample in samples)
    assert {sample["split"] for sample in samples} == {"train", "eval"}
    assert (unbroken / "curves.png").stat().st_size > 10_000


def test_a_run_leaves_the_tokens_of_its_first_groups(unbroken):
    written = read_lines(unbroken / "tokens.jsonl")
    assert [line["step"] for line in written] == list(range(1, STEPS + 1))
    steps = [line for line in lines(unbroken) if "update/loss" in line]
    for line, metrics in zip(written, steps, strict=True):
        prompts = read_record(line)["prompts"]
        # all the prompts of a step of this run
        completions = [one for prompt in prompts for one in prompt["completions"]]
        assert (len(prompts), len(completions)) == (4, 16)
        rewards = [one["score"]["reward"] for one in completions]
        assert np.mean(rewards) == pytest.approx(metrics["reward/mean"], rel=1e-5)
        found = {
            name: np.concatenate([one["tokens"][name] for one in completions])
            for name in ("weight", "region", "logp", "entropy")
        }
        assert len(found["region"]) == metrics["rollout/tokens"]
        assert np.mean(found["logp"]) == pytest.approx(metrics["rollout/logp"], abs=1e-3)
        assert np.mean(found["entropy"]) == pytest.approx(metrics["rollout/entropy"], abs=1e-3)
        # what the device weighed a token with is what is shown of it
        for region in set(found["region"].tolist()):
            own = np.mean(found["weight"][found["region"] == region])
            name = REGION_NAMES[region - 1]
            assert own == pytest.approx(metrics[f"region/{name}/weight"], abs=1e-3)
        # their mean over the batch is one
        assert np.mean(found["weight"]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("moment", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_restarted_is_the_unbroken_run(model, unbroken, tmp_path, moment):
    raw = tiny_run(model, tmp_path)
    process = start("train", raw, tmp_path)
    said: list[str] = []  # read at once: a run waits when the pipe is full
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("update/loss") >= moment):
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reader.join()
    with metrics.open("a") as file:
        file.write('{"step": 3, "half of a li')  # what a kill within a write leaves
    finish(start("train", raw, tmp_path))
    assert lines(tmp_path / "tiny") == lines(unbroken)
    assert_same(state(tmp_path / "tiny"), state(unbroken))


@pytest.mark.slow
def test_nothing_is_on_the_devices_when_a_checkpoint_is_read(
    model, unbroken, tmp_path, monkeypatch
):
    """Neither the starting weights nor a fresh state: resumption needs room for one state."""
    shutil.copytree(unbroken, tmp_path / "tiny")
    path = tmp_path / "longer.yaml"
    path.write_text(yaml.safe_dump(tiny_run(model, tmp_path, train={"steps": STEPS + 1})))

    class Read(Exception):
        """Ends the run where it would read the checkpoint."""

    def live_bytes() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    def restore(self, abstract):
        raise Read(live_bytes(), sum(x.size * 4 for x in jax.tree.leaves(abstract.params)))

    monkeypatch.setattr(Checkpoints, "restore", restore)
    before = live_bytes()
    with pytest.raises(Read) as caught:
        cli.main(["train", str(path), "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"])
    live, params = caught.value.args
    assert live - before < params / 20


def test_the_kl_term_refers_to_the_policy_that_a_run_begins_with():
    trained, frozen = {"a": jnp.ones(2)}, {"w": jnp.zeros(2)}
    policy: Any = types.SimpleNamespace(trained=trained, frozen=frozen)

    def reference(*words: str):
        return copy_reference(config.load(["scale/tiny"], ["lora.rank=2", *words]), policy)

    assert reference("lora.adapter=there") is None
    assert reference("loss.kl_coefficient=0.1") is frozen
    found = reference("loss.kl_coefficient=0.1", "lora.adapter=there")
    trained["a"].delete()  # as an update does
    assert found is not None and found["w"] is frozen["w"]
    np.testing.assert_array_equal(found["lora"]["a"], 1)


LORA = {"rank": 4, "alpha": 8, "targets": ["q", "o", "down"]}
WITH_LORA = {
    "alone": ("train", {}),
    "sampled ahead": ("train", {"rollout": {"staleness": 1, "recompute_logprobs": True, "tis_cap": 2.0}}),
    "reference, moments of the host": ("train", {"loss": {"kl_coefficient": 0.1}, "optimizer": {"moments": "host"}}),
    "supervised": ("sft", {"optimizer": {"learning_rate": 1e-2}}),
}  # fmt: skip


def lora_run(model: pathlib.Path, output: pathlib.Path, **changes) -> dict:
    raw = tiny_run(model, output) | {"lora": LORA}
    for section, values in changes.items():
        raw[section] = raw.get(section, {}) | values
    return raw


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_LORA)
def test_a_run_with_lora_resumes_bit_for_bit_and_is_forked(model, tmp_path, kind, capsys):
    command, changes = WITH_LORA[kind]
    raw = lora_run(model, tmp_path / "whole", **changes)
    assert launch(raw, command=command) == 0
    whole = tmp_path / "whole" / "tiny"
    checkpoint = state(whole)
    adapters = checkpoint[0].params["blocks"]
    assert set(adapters["attention"]) | set(adapters["mlp"]) == set(LORA["targets"])
    assert all(np.any(np.asarray(adapters[part][name]["b"]))
               for part, name in (("attention", "q"), ("attention", "o"), ("mlp", "down")))  # fmt: skip
    parts = shutil.copytree(tmp_path / "whole", tmp_path / "parts") / "tiny"
    for step in (3, 4):
        shutil.rmtree(parts / "checkpoints" / str(step))
    raw["output"] = str(tmp_path / "parts")
    assert launch(raw, "--fork", "fork", command=command) == 0
    assert launch(raw, command=command) == 0
    assert lines(parts) == lines(whole)
    assert_same(state(parts), checkpoint)
    if kind != "sampled ahead":  # a fork samples its first batch anew
        assert_same(state(tmp_path / "parts" / "fork"), checkpoint)
    capsys.readouterr()
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = np.nextafter(weights["model.norm.weight"], np.float32(9))
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    shutil.rmtree(parts / "checkpoints" / "4")
    for words in ([], ["--fork", "again"]):
        assert launch(raw, f"model.source={other}", *words, command=command) == 2
        said = capsys.readouterr().err
        assert "adapters belong to other weights" in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_run_with_lora_on_another_mesh_is_the_same(model, tmp_path):
    """Its step 0 is the base model; learning is slow enough that the order of sums changes no sampled token."""
    slow = {"optimizer": {"learning_rate": 1e-5}, "train": {"steps": 2}}
    runs = {}
    for name, mesh in {"eight": (), "two": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")}.items():
        assert launch(lora_run(model, tmp_path / name, **slow), *mesh) == 0
        runs[name] = tmp_path / name / "tiny"
    first, second = (lines(run) for run in runs.values())
    assert first[0] == pytest.approx(second[0], rel=1e-4)
    for line, other in zip(first, second, strict=True):
        for name in set(line) - {"update/padding", "update/micro_batches"}:
            assert line[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), name
    for name in "ab":
        one, two = (state(run)[0].params["blocks"]["mlp"]["down"][name] for run in runs.values())
        np.testing.assert_allclose(one, two, atol=2e-6)


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(model, unbroken, tmp_path):
    raw = tiny_run(model, tmp_path, train={"checkpoint_every": 100})
    process = start("train", raw, tmp_path)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while not (metrics.is_file() and "update/loss" in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved at step" in finish(process, UNFINISHED)
    finish(start("train", raw, tmp_path))
    assert lines(tmp_path / "tiny") == lines(unbroken)


def test_broken_weights_stop_the_run_and_save_its_batch(model, tmp_path, capsys):
    path = tmp_path / "nan.yaml"
    changes = {"optimizer": {"learning_rate": 1e38, "max_grad_norm": None}, "data": {"eval": None}}
    path.write_text(yaml.safe_dump(recipe(model, tmp_path, **changes)))
    assert cli.main(["train", str(path), "mesh.fsdp=1", "mesh.data=-1", "rollout.prompts_per_step=8",
                     "train.prompts_per_update=8"]) == 1  # fmt: skip
    said = capsys.readouterr().err
    assert "step 1: not finite: update/param_norm" in said and "no checkpoint yet" in said
    (batch,) = (tmp_path / "tiny").glob("nan_step_*.npz")
    assert {"prompt", "responses", "logp", "region", "reward"} <= set(np.load(batch))


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_three_in_a_row_stop_the_run(
    model, tmp_path, capsys, monkeypatch
):
    collect, broken = Collector.collect, (2, 4, 5, 6)

    def broken_rewards(self, params, rng, step):
        experience = collect(self, params, rng, step)
        if step in broken:
            reward = np.full_like(experience.scored.reward, np.nan)
            experience.scored = dataclasses.replace(experience.scored, reward=reward)
        return experience

    monkeypatch.setattr(Collector, "collect", broken_rewards)
    path = tmp_path / "nan.yaml"
    raw = tiny_run(model, tmp_path, train={"steps": 8, "checkpoint_every": 100, "eval_every": 0})
    raw["data"]["eval"] = None
    path.write_text(yaml.safe_dump(raw))
    words = ["train", str(path), "mesh.fsdp=1", "mesh.data=-1", "rollout.prompts_per_step=8",
             "train.prompts_per_update=8"]  # fmt: skip
    assert cli.main(words) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()[-1:]
    assert "step 6: not finite: update/loss nan" in line and "checkpoint 7 is good" in line
    assert "warning: step 2: not finite" in said.out + said.err
    assert [file.name for file in (tmp_path / "tiny").glob("nan_step_*")] == ["nan_step_6.0.npz"]
    found = lines(tmp_path / "tiny")
    assert [step["update/not_finite"] for step in found] == [step in broken for step in range(1, 8)]
    norms = [step["update/param_norm"] for step in found]
    assert norms[0] == norms[1] != norms[2] == norms[5] != norms[6]
    # The same command resumes behind the three, though they would be as before.
    assert cli.main(words) == 0
    assert [line["step"] for line in lines(tmp_path / "tiny")] == list(range(1, 9))


PLUGIN = """
def score(completion, text, record, target):
    if len(text) % 5 == 0:
        raise ValueError("five")
    return {"length": len(text) / 100, "calls": float(len(target["calls"]))}
"""


@pytest.mark.slow
def test_a_run_with_a_plugin_resumes_exactly_and_over_the_same_file_alone(model, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    reward = {"plugin": f"{file}:score", "builtin": False}
    raw = tiny_run(model, tmp_path / "unbroken", reward=reward)
    finish(start("train", raw, tmp_path))
    found = lines(tmp_path / "unbroken" / "tiny")
    steps = [line for line in found if "update/loss" in line]
    for line in steps:
        parts = line["reward/part/length"] + line["reward/part/calls"]
        assert line["reward/mean"] == pytest.approx(parts, rel=1e-4)
        assert line["reward/format_part"] == 0 and "reward/exact" in line
    assert max(line["reward/plugin_failures"] for line in steps) > 0
    assert max(line["update/grad_norm"] for line in steps) > 0
    assert all("eval/part/length" in line for line in found if "eval/exact" in line)
    samples = read_lines(tmp_path / "unbroken" / "tiny" / "samples.jsonl")
    assert {sample["plugin_fault"] for sample in samples} == {None, "line 4: ValueError: five"}
    assert any("length" in sample["plugin_parts"] for sample in samples)
    shown = read_record(read_lines(tmp_path / "unbroken" / "tiny" / "tokens.jsonl")[0])
    assert "plugin_parts" in shown["prompts"][0]["completions"][0]["score"]

    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "broken" / "tiny" / "checkpoints" / str(step))
    raw = tiny_run(model, tmp_path / "broken", reward=reward | {"plugin_workers": 2})
    file.write_text(PLUGIN.replace("100", "99"))
    said = finish(start("train", raw, tmp_path), 2)
    assert "its run was made of other reward.plugin than are here now" in said
    file.write_text(PLUGIN)
    finish(start("train", raw, tmp_path))
    assert lines(tmp_path / "broken" / "tiny") == found


def test_a_folder_of_another_config_is_refused(model, unbroken, capsys):
    path = unbroken.parent / "other.yaml"
    path.write_text(
        yaml.safe_dump(tiny_run(model, unbroken.parent, optimizer={"learning_rate": 2e-3}))
    )
    before = sorted(p.name for p in unbroken.iterdir())
    arguments = [
        "mesh.fsdp=1",
        "mesh.data=-1",
        "rollout.prompts_per_step=8",
        "train.prompts_per_update=8",
    ]
    assert cli.main(["train", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert "optimizer.learning_rate: 0.001 there, 0.002 now" in error and error.count("\n") == 1
    assert sorted(p.name for p in unbroken.iterdir()) == before


@pytest.mark.slow
def test_a_longer_run_resumes_with_smaller_sizes_from_a_moved_model_but_not_from_another(
    model, unbroken, tmp_path
):
    shutil.copytree(unbroken, tmp_path / "moved")
    shutil.copytree(model, tmp_path / "model")
    raw = tiny_run(tmp_path / "model", tmp_path, name="moved")
    raw["train"] |= {"steps": STEPS + 1, "max_tokens_per_microbatch": 256, "eval_every": 0}
    raw["rollout"]["decode_slots"] = 3
    out = finish(start("train", raw, tmp_path))
    assert "resumes under another config" in out and f"train.steps: {STEPS} there" in out
    found = lines(tmp_path / "moved")
    assert found[: len(lines(unbroken))] == lines(unbroken)
    assert [line["step"] for line in found if "update/loss" in line] == list(range(1, STEPS + 2))
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = np.nextafter(weights["model.norm.weight"], np.float32(9))
    save_file(weights, file, {"format": "pt"})
    raw["train"]["steps"] += 1
    out = finish(start("train", raw, tmp_path), 2)
    assert "made of other weights than are here now" in out and "Traceback" not in out
    assert lines(tmp_path / "moved") == found


@pytest.mark.parametrize(
    "override, said",
    [
        ("rollout.prompts_per_step=6", "8"),
        ("data.max_prompt_tokens=5", "data.max_prompt_tokens 5"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("rollout.temprature=1", "nearest: temperature"),
        ("mesh.tensor=3", "3"),
        ("data.synthetic_size=4", "4 records, fewer than"),
        ("train.steps=9999999999", "train.steps 9999999999: more than 2147483647 records"),
        ("data.eval=nowhere.parquet", "nowhere.parquet"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, tmp_path, capsys, override, said):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe(model, tmp_path / "out")))
    assert (
        cli.main(
            [
                "train",
                str(path),
                "train.prompts_per_update=null",
                "rollout.prompts_per_step=8",
                override,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
