"""The shop: its gold turns do every task, anything less does not, and a state that was kept is unchanged by what follows."""

import pytest

from rest_jax.tool_calls import Call
from rest_jax.worlds.synthetic import MAX_TURNS, Shop, tasks


def play(shop, turns) -> list:
    """What the world says to the turns."""
    return [shop.say(turn) if isinstance(turn, str) else shop.call(turn) for turn in turns]


@pytest.mark.parametrize("task", tasks(0, 20), ids=lambda task: task.id)
def test_gold_turns_do_the_task_and_each_is_needed(task):
    shop = Shop()
    messages, tools = shop.reset(task)
    assert [m["role"] for m in messages] == ["system", "user"] and len(tools) == 4
    said = play(shop, task.gold)
    assert shop.done and shop.score() == 1.0
    assert "error" not in str(said)
    users = [m["content"] for m in messages if m["role"] == "user"]
    users += [m["content"] for turn in said for m in turn if isinstance(m, dict)]
    assert users == list(task.requests)
    changed = {"cancel_order", "change_city"}
    calls = [turn for turn in task.gold if not isinstance(turn, str)]
    changes = [task.gold.index(turn) for turn in calls if turn[0].name in changed]
    assert changes
    for i in changes:
        shop.reset(task)
        play(shop, task.gold[:i] + task.gold[i + 1 :])
        assert shop.score() == 0.0


def test_ids_have_to_be_looked_up():
    for task in tasks(0, 20):
        said = " ".join(task.requests)
        assert not any(i in said for i in (*task.orders, *task.customers.values()))


def test_tasks_depend_on_seed_and_index():
    assert tasks(1, 5) == tasks(1, 9)[:5] != tasks(2, 5)


def test_a_state_is_restored():
    task = next(task for task in tasks(0, 20) if len(task.requests) == 2)
    shop, other = Shop(), Shop()
    shop.reset(task)
    play(shop, task.gold[:3])
    state = shop.snapshot()
    rest = play(shop, task.gold[3:])
    for _ in range(2):
        other.restore(state)
        assert not other.done and other.score() == 0.0
        assert play(other, task.gold[3:]) == rest
        assert other.done and other.score() == 1.0


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (Call("find_customer", {"name": "nobody"}), "no customer 'nobody'"),
        (Call("list_orders", {"customer": "c0"}), "no customer 'c0'"),
        (Call("cancel_order", {"order": "o1"}), "no order 'o1'"),
        (Call("cancel_order", {}), "cancel_order takes order"),
        (Call("open_door", {}), "no tool 'open_door'"),
    ],
    ids=lambda value: value.name if isinstance(value, Call) else None,
)
def test_a_wrong_call_has_its_error_as_the_result(call, error):
    shop = Shop()
    (task,) = tasks(0, 1)
    shop.reset(task)
    assert error in shop.call([call])[0]
    assert not shop.done


def test_a_dialogue_has_an_end():
    shop = Shop()
    shop.reset(tasks(0, 1)[0])
    for _ in range(MAX_TURNS):
        assert not shop.done
        shop.call([])
    assert shop.done
    for turn in (shop.call, shop.say):
        with pytest.raises(ValueError, match="done"):
            turn("")
