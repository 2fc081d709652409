"""Stands in for the process of tau2: two tasks of different groups, done by one call each, and a tool `done` that ends."""

import json
import sys

GOLD = {"[service_issue]a": {"sim": 1}, "[mms_issue]b": {"sim": 2}}


def answer(worlds: dict, request: dict) -> dict:
    if "tasks" in request:
        tasks = [
            {"id": task, "gold": [{"name": "insert", "arguments": arguments}]}
            for task, arguments in GOLD.items()
        ]
        return {"package": "26.3", "tasks": tasks}
    world = worlds.setdefault(request["world"], {})
    if "reset" in request:
        task = request["reset"]
        world.update(task=task, made=[], why=None)
        names = ("insert", "done")
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"messages": [{"role": "system", "content": f"Ticket: {task}"}], "tools": tools}
    if "score" in request:
        right = world["ended"] == "agent_stop" and world["made"] == [GOLD[world["task"]]]
        return {"score": float(right), "ended": world["ended"]}
    if "say" in request:
        world["ended"] = "agent_error"
    else:
        names = [call["name"] for call in request["call"]]
        world["made"] += [c["arguments"] for c in request["call"] if c["name"] == "insert"]
        world["ended"] = "agent_stop" if "done" in names else None
    done = world["ended"] is not None
    return {"results": [f"{call['name']} ok" for call in request.get("call", ())], "done": done}


if __name__ == "__main__":
    worlds: dict = {}
    for line in sys.stdin:
        print(json.dumps(answer(worlds, json.loads(line))), flush=True)
