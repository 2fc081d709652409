"""Held-out evaluation: its metrics from known completions, what a run writes and prints of it."""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pydantic
import pytest

from rest_jax import config as builtin
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.evaluation import api_bank, heldout
from rest_jax.evaluation.heldout import (
    Evaluator,
    evaluate,
    held_out,
    intervals,
)
from rest_jax.evaluation.statistics import estimate, rate_interval
from rest_jax.models.decoder import Decoder
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.experience import Collector
from rest_jax.run.load import load_policy
from rest_jax.run.metrics import METRICS
from rest_jax.types import RolloutBatch


def quickstart_config() -> Config:
    """Six records, in completions of at most 48 tokens."""
    source = builtin.locate("configs/quickstart_policy")
    return Config.model_validate(
        {
            "name": "test",
            "model": {"source": str(source)},
            "data": {"eval": "synthetic:eval", "eval_limit": 6, "brief_prompt": True},
            "rollout": {"max_response_tokens": 48},
        }
    )


@pytest.fixture(scope="module")
def evaluated():
    """(metrics, samples) of the quickstart policy."""
    config = quickstart_config()
    policy = load_policy(config.model, config.mesh)
    data = held_out(config, policy, keep=False)
    assert data is not None
    evaluator = Evaluator(config, policy, data)
    return evaluator(policy.params), evaluator


def test_metrics_are_the_means_of_the_samples(evaluated):
    (metrics, samples), evaluator = evaluated
    assert [s["id"] for s in samples] == [
        record.id for record in evaluator.examples.records.records
    ]
    assert metrics["eval/prompts"] == len(samples) == 6
    for name, field in (("exact", "exact"), ("format", "format_score"), ("reward", "reward")):
        assert metrics[f"eval/{name}"] == pytest.approx(np.mean([s[field] for s in samples]))
    without_calls = [
        s["spurious"]
        for s, record in zip(samples, evaluator.examples.records.records, strict=True)
        if not record.target.calls
    ]
    assert metrics["eval/spurious"] == pytest.approx(np.mean(without_calls or [0.0]))
    assert metrics["eval/prompts_without_calls"] == len(without_calls)
    for name in ("reward", "accuracy"):
        assert metrics[f"eval/{name}_std"] == pytest.approx(np.std([s[name] for s in samples]))
    assert 0 < metrics["eval/response_tokens"] <= 48 and 0 <= metrics["eval/truncated"] <= 1


def test_each_metric_has_its_interval(evaluated):
    (metrics, samples), evaluator = evaluated
    found = intervals(samples, evaluator.examples.records.records)
    counts = {"eval/prompts", "eval/prompts_without_calls"}
    assert found.keys() == metrics.keys() - counts - {"eval/reward_std", "eval/accuracy_std"}
    for name, (low, high) in found.items():
        if name != "eval/spurious":
            assert low <= metrics[name] <= high, name
    exact = sum(s["exact"] for s in samples)
    assert found["eval/exact"] == rate_interval(exact, 6)
    mean = estimate([s["accuracy"] for s in samples])
    assert found["eval/accuracy"] == (mean.low, mean.high)
    callless = [r.target.calls == () for r in evaluator.examples.records.records]
    spurious = [s["spurious"] for s, counts in zip(samples, callless, strict=True) if counts]
    expected = rate_interval(sum(spurious), len(spurious)) if spurious else (None, None)
    assert found["eval/spurious"] == expected
    alone = intervals(samples[:1], evaluator.examples.records.records[:1])
    assert alone["eval/reward"] == (None, None)
    assert alone["eval/exact"] == rate_interval(int(samples[0]["exact"]), 1)


def test_each_part_of_a_plugin_has_its_column_whichever_data_set_has_it(evaluated, monkeypatch):
    """Completions of one token each, so that nothing is sampled."""

    def sample(self, params):
        shape = (self.size, 1, 1)
        ids = np.full(shape, self.policy.tokenizer.stop_ids[0], np.int32)
        nothing = np.zeros((self.size, 1), np.int32)
        numbers = np.zeros(shape, np.float32)
        return RolloutBatch(nothing, nothing[:, 0], ids, nothing + 1, numbers, numbers, numbers)

    parts = iter([{"part/calls": 0.25, "plugin_part": 0.25}, {"part/a": 0.5, "plugin_part": 0.5}])
    monkeypatch.setattr(Evaluator, "_sample", sample)
    monkeypatch.setattr(heldout, "plugin_metrics", lambda outcomes: next(parts))
    monkeypatch.setattr(heldout, "load_policy", lambda *_: evaluated[1].policy)
    said = evaluate(quickstart_config(), ["synthetic:eval", "synthetic:train"], limit=2)
    rows = [line.split()[-4:] for line in said.splitlines()]
    assert rows[0] == ["prompts", "plugin_part", "part/a", "part/calls"]
    assert (rows[2], rows[5]) == (["2", "0.25", "0", "0.25"], ["2", "0.5", "0.5", "0"])
    assert rows[3] == rows[4] == rows[6] == ["-"] * 4


def test_a_run_may_have_no_held_out_records():
    config = Config.model_validate(
        {"name": "test", "model": {"source": "none"}, "data": {"eval": None}}
    )
    assert held_out(config, None, keep=False) is None  # type: ignore[arg-type]


def benchmark_config(bank, records) -> Config:
    return Config.model_validate(
        {
            "name": "test",
            "model": {"source": "none"},
            "data": {"eval": records, "eval_limit": 2, "brief_prompt": True},
            "rollout": {"max_response_tokens": 512},
            "evaluation": {"benchmarks": ["api_bank"], "data": str(bank)},
        }
    )


@pytest.mark.parametrize("records", ["synthetic:eval", None], ids=["with records", "alone"])
def test_a_run_answers_benchmarks_in_the_same_rollout(evaluated, bank, monkeypatch, records):
    """The gold calls but for one, as token ids behind those of the held-out records."""
    small = evaluated[1].policy
    config = benchmark_config(bank, records)
    with pytest.raises(UserError, match=r"1,024 positions .* or leave api_bank out of"):
        held_out(config, small, keep=False)
    policy = dataclasses.replace(
        small, decoder=Decoder(dataclasses.replace(small.config, max_positions=4096))
    )
    examples = held_out(config, policy, keep=False)
    assert examples is not None and "api_bank: 5 items" in examples.summary(config)
    evaluator = Evaluator(config, policy, examples)
    said = [
        json.dumps({"name": item.gold.name, "parameters": item.gold.arguments})
        for item in api_bank.load(bank)
    ]
    said[0] = "nothing"
    said = [f"<tool_call>\n{call}\n</tool_call>" for call in said]
    said[1] = said[1].removesuffix("</tool_call>")
    first = examples.records.size if examples.records else 0
    assert (first, evaluator.size) == ((2, 7) if records else (0, 5))
    ids = [*[policy.tokenizer.encode("no")] * first, *map(policy.tokenizer.encode, said)]
    length = np.array([[len(x) + 1] for x in ids], np.int32)
    responses = np.full((len(ids), 1, length.max()), policy.tokenizer.stop_ids[0], np.int32)
    for row, x in zip(responses, ids, strict=True):
        row[0, : len(x)] = x
    numbers = np.zeros(responses.shape, np.float32)
    nothing = np.zeros((len(ids), 1), np.int32)
    rollout = RolloutBatch(nothing, nothing[:, 0], responses, length, numbers, numbers, numbers)
    monkeypatch.setattr(evaluator, "_sample", lambda params: rollout)
    metrics, samples = evaluator(policy.params)
    assert (metrics["eval/api_bank/soft"], metrics["eval/api_bank/strict"]) == (0.8, 0.6)
    assert metrics["eval/api_bank/items"] == 5
    assert len(samples) == first and ("eval/exact" in metrics) == bool(records)
    assert metrics.keys() <= METRICS.keys()


def test_benchmarks_of_a_run_need_their_files(tmp_path):
    raw = {"name": "test", "model": {"source": "none"}, "data": {"eval": None}}
    with pytest.raises(pydantic.ValidationError, match=r"name the folder .* evaluation\.data"):
        Config.model_validate(raw | {"evaluation": {"benchmarks": ["api_bank"]}})
    missing = {"benchmarks": ["api_bank"], "data": str(tmp_path)}
    config = Config.model_validate(raw | {"evaluation": missing})
    with pytest.raises(UserError, match=r"lacks level-1-api_processed\.json"):
        held_out(config, None, keep=False)  # type: ignore[arg-type]


def test_completions_go_on_behind_a_thought_that_the_prompt_opened(evaluated, tmp_path):
    _, evaluator = evaluated
    policy = evaluator.policy
    folder = shutil.copytree(policy.files, tmp_path / "opened")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant\n<think>\n"))
    opened = dataclasses.replace(policy, tokenizer=Tokenizer.load(folder))
    raw = {"name": "test", "model": {"source": "none"}, "rollout": {"prompts_per_step": 6}}
    config = Config.model_validate(raw)
    for used, expected in ((policy, False), (opened, True)):
        assert Evaluator(config, used, evaluator.examples).template.thought_open == expected
        with contextlib.closing(
            Collector(config, used, evaluator.examples.records, 1)
        ) as collector:
            assert collector.template.thought_open == expected
