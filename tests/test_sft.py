"""The supervised loop on a tiny random policy: it learns, its clock is right, and its folder is a start for the RL loop."""

import shutil
import types

import numpy as np
import pytest

from rest_jax import cli
from rest_jax.data.loader import TargetBatch
from rest_jax.experiments import results
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.metrics import read_lines
from rest_jax.sft import label_regions
from rest_jax.tool_calls import Region
from tests.runs import STEPS, finish, lines, recipe, start


@pytest.fixture(scope="module")
def supervised(model, tmp_path_factory):
    """The folder of a run on demonstrations, tool calls weighted up."""
    folder = tmp_path_factory.mktemp("supervised")
    raw = recipe(model, folder, name="gold", sft={"batch_size": 8, "tool_call_weight": 2.0})
    raw["data"] |= {"train": "synthetic:demonstrations", "max_prompt_tokens": 128}
    finish(start("sft", raw, folder))
    return folder / "gold"


def test_the_loss_falls_and_is_weighted(supervised):
    steps = [line for line in lines(supervised) if "update/loss" in line]
    assert len(steps) == STEPS and steps[-1]["update/loss"] < steps[0]["update/loss"]
    for line in steps:
        assert line["update/loss"] > line["update/nll"] > 0
        assert 0 <= line["update/accuracy"] <= 1 and line["update/learning_rate"] > 0


def test_the_times_of_the_steps_sum_to_the_length_of_the_run(supervised):
    """Each step ends where the next begins, so that none is counted twice and rates are not halved."""
    found = read_lines(supervised / "metrics.jsonl")
    steps = [line for line in found if "time/elapsed" in line]
    until = found[: found.index(steps[-1]) + 1]
    names = ("time/step", "time/eval", "time/checkpoint")
    total = sum(line.get(name, 0.0) for line in until for name in names)
    assert total == pytest.approx(steps[-1]["time/elapsed"], rel=1e-3)
    for line in steps:
        tokens = line["time/tokens_per_second"] * line["time/step"]
        assert tokens == pytest.approx(line["update/tokens"])
        assert line["time/processed_tokens_per_second"] > line["time/tokens_per_second"]


@pytest.mark.slow
def test_its_folder_is_a_start_for_reinforcement(supervised, tmp_path):
    finish(start("train", recipe(supervised, tmp_path, train={"steps": 1}), tmp_path))
    assert lines(tmp_path / "tiny")[-1]["step"] == 1
    ended, begun = results.trained_weights(supervised), results.read_made_of(tmp_path / "tiny")
    assert ended and ended == begun.weights


def test_noise_is_not_measured(model, tmp_path, capsys):
    words = ["scale/tiny_sft", "method/sft", f"model.source={model}", f"output={tmp_path}"]
    assert cli.main(["sft", *words, "train.measure_noise=true"]) == 2
    error = capsys.readouterr().err
    assert "train.measure_noise" in error and error.count("\n") == 1


def test_regions_of_targets_behind_an_opened_thought(model, tmp_path):
    """What is before the closing tag is thought, though the opening one is in the prompt."""
    folder = shutil.copytree(model, tmp_path / "opened")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant\n<think>\n"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.thought_open
    text = tokenizer.encode("why\n</think>\n\nHello")
    ids = np.append(text, tokenizer.end_id)[None].astype(np.int32)
    length = np.array([ids.size], np.int32)
    rows = TargetBatch(ids, length, ids, length, np.zeros(1, np.int32))
    gold = label_regions(rows, types.SimpleNamespace(tokenizer=tokenizer), "hermes")  # type: ignore[arg-type]
    close = text.tolist().index(tokenizer.encode("</think>").item())
    found = gold.region[0, 0].tolist()
    assert set(found[:close]) == {Region.THINK}
    assert found[close] == found[-1] == Region.TAG and found[-2] == Region.RESPONSE
