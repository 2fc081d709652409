"""A small world to try dialogues on: customers, their orders, and people who want some of these changed.

A task is a shop of its own and one or two requests, the second said once the first is answered. Ids are in no request, so that
a model has to look up the customer, then the orders, before it changes one: 4 to 10 turns. A task is done when the orders are
those that its gold turns leave. Tasks depend on (seed, index) only.
"""

import copy
import dataclasses
import json
import random
from collections.abc import Sequence
from typing import Any

from rest_jax.tool_calls import Call
from rest_jax.worlds.records import Message, Tool

MAX_TURNS = 32  # of a dialogue; then it is done as it is
DONE = "It is done."
_NAMES = ("anna", "ben", "carl", "dora", "emma", "felix", "gina", "hugo")
_THINGS = ("lamp", "bike", "chair", "phone", "rope", "table", "map", "bag", "cup", "boat")
_CITIES = ("paris", "rome", "oslo", "cairo", "lima", "delhi", "tokyo", "dublin")


@dataclasses.dataclass(frozen=True)
class Task:
    """A shop, what its customers want, and the turns that do it: calls, or what is said once a request is met."""

    id: str
    customers: dict[str, str]  # name -> id
    orders: dict[str, dict[str, str]]  # id -> {"customer", "thing", "city", "status"}
    requests: tuple[str, ...]
    gold: tuple[tuple[Call, ...] | str, ...]


def tasks(seed: int, size: int) -> list[Task]:
    """The first `size` tasks of a seed."""
    return [_task(seed, index) for index in range(size)]


class Shop:
    """The world of one task (`records.World`)."""

    def __init__(self):
        self.done = True

    def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        self._task, self._turns, self._asked, self.done = task, 0, 1, False
        self._orders = copy.deepcopy(task.orders)
        system = {"role": "system", "content": "You look after the orders of a shop."}
        return [system, _user(task.requests[0])], _tools()

    def call(self, calls: Sequence[Call]) -> list[str]:
        self._take_turn()
        return [json.dumps(_made(self._task.customers, self._orders, call)) for call in calls]

    def say(self, text: str) -> list[Message]:
        self._take_turn()
        following = self._task.requests[self._asked : self._asked + 1]
        self._asked += 1
        self.done = self.done or not following
        return [] if self.done else [_user(following[0])]

    def score(self) -> float:
        return float(self._orders == _finished(self._task))

    def snapshot(self) -> Any:
        return copy.deepcopy((self._task, self._turns, self._asked, self.done, self._orders))

    def restore(self, state: Any) -> None:
        self._task, self._turns, self._asked, self.done, self._orders = copy.deepcopy(state)

    def _take_turn(self) -> None:
        if self.done:
            raise ValueError("the dialogue is done")
        self._turns += 1
        self.done = self._turns >= MAX_TURNS


def _made(customers: dict[str, str], orders: dict[str, dict[str, str]], call: Call) -> Any:
    """What a call gives; it may change the orders."""
    action = _ACTIONS.get(call.name)
    if action is None:
        return {"error": f"no tool {call.name!r}"}
    function, parameters = action
    if call.arguments.keys() != parameters.keys():
        return {"error": f"{call.name} takes {', '.join(parameters)}"}
    return function(customers, orders, *(str(call.arguments[key]) for key in parameters))


def _find_customer(customers, orders, name: str) -> Any:
    found = customers.get(name.lower())
    return {"customer": found} if found else {"error": f"no customer {name!r}"}


def _list_orders(customers, orders, customer: str) -> Any:
    if customer not in customers.values():
        return {"error": f"no customer {customer!r}"}
    mine = ((key, order) for key, order in orders.items() if order["customer"] == customer)
    return [{"order": key, **{k: order[k] for k in _SHOWN}} for key, order in mine]


def _change(field: str):
    def change(customers, orders, order: str, value: str) -> Any:
        if order not in orders:
            return {"error": f"no order {order!r}"}
        orders[order][field] = value
        return {"order": order, field: value}

    return change


def _cancel_order(customers, orders, order: str) -> Any:
    return _change("status")(customers, orders, order, "cancelled")


_SHOWN = ("thing", "city", "status")
# name -> (what it does, its parameters with their descriptions)
_ACTIONS = {
    "find_customer": (_find_customer, {"name": "first name"}),
    "list_orders": (_list_orders, {"customer": "id of the customer"}),
    "change_city": (_change("city"), {"order": "id of the order", "city": "where to send it"}),
    "cancel_order": (_cancel_order, {"order": "id of the order"}),
}


def _tools() -> list[Tool]:
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": name.replace("_", " "),
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: {"type": "string", "description": said}
                        for key, said in parameters.items()
                    },
                    "required": list(parameters),
                },
            },
        }
        for name, (_, parameters) in _ACTIONS.items()
    ]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _finished(task: Task) -> dict[str, dict[str, str]]:
    """The orders as the gold turns leave them."""
    orders = copy.deepcopy(task.orders)
    for turn in task.gold:
        for call in turn if isinstance(turn, tuple) else ():
            _made(task.customers, orders, call)
    return orders


def _task(seed: int, index: int) -> Task:
    name = f"shop-{seed}-{index}"
    rng = random.Random(name)
    who: list[str] = rng.sample(_NAMES, 3)
    customers = dict(zip(who, (f"c{n}" for n in rng.sample(range(10, 100), 3)), strict=True))
    things = [rng.sample(_THINGS, 3) for _ in who]  # of one customer all different
    numbers = iter(rng.sample(range(100, 1000), 9))
    orders = {
        f"o{next(numbers)}": {
            "customer": customers[person],
            "thing": thing,
            "city": rng.choice(_CITIES),
            "status": "open",
        }
        for person, mine in zip(who, things, strict=True)
        for thing in mine
    }
    requests, gold = [], []
    for person in who[: rng.randint(1, 2)]:
        text, turns = _request(rng, person, customers[person], orders)
        requests.append(text)
        gold += [*turns, DONE]
    return Task(name, customers, orders, tuple(requests), tuple(gold))


def _request(
    rng: random.Random, person: str, customer: str, orders: dict[str, dict[str, str]]
) -> tuple[str, list[tuple[Call, ...]]]:
    """What a customer asks for, and the turns with calls that do it."""
    changed = rng.sample([key for key, o in orders.items() if o["customer"] == customer], 2)
    clauses, calls = [], []
    for key in changed[: rng.randint(1, 2)]:
        thing, city = orders[key]["thing"], rng.choice(_CITIES)
        if rng.random() < 0.4 or city == orders[key]["city"]:
            clauses.append(f"cancel the {thing}")
            calls.append((Call("cancel_order", {"order": key}),))
        else:
            clauses.append(f"send the {thing} to {city}")
            calls.append((Call("change_city", {"order": key, "city": city}),))
    found = (Call("find_customer", {"name": person}),)
    listed = (Call("list_orders", {"customer": customer}),)
    return f"This is {person}. Please {' and '.join(clauses)}.", [found, listed, *calls]
