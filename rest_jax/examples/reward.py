"""A reward of your own: NAME.py:score.

    rest-jax train FILES... reward.plugin=NAME.py:score

It is called once for every completion, in worker processes, and its value is added to the builtin reward (`reward.builtin=false`
leaves that out). What it returns is one number, or numbers by name: each name becomes a metric, `reward/part/<name>`. A call that
raises, takes longer than `reward.plugin_timeout` seconds or returns no finite number counts as a failure and adds nothing.
Make it depend on its arguments alone: a run that is resumed asks again. print() leads nowhere here; put what you want to see
into a part.
"""


def score(completion: dict, text: str, record: dict, target: dict) -> dict[str, float]:
    """The parts of the reward of one completion.

    completion: {"calls": [{"name", "arguments"}], "response": str or None, "think": str or None, "blocks": ["think", ..],
        "broken_calls": int}, as the template reads the text
    text: what the policy wrote, without the token that ends its turn
    record: the record of the data: {"id", "source", "tools", "history", "messages", "target", "extra"}; columns of your data
        file that no record has are in record["extra"]
    target: the gold answer, record["target"]: {"calls", "response", "think", "text"}
    """
    words = len((completion["think"] or "").split())
    # a number of your own for each record, say {"difficulty": 2} in its line
    limit = 50 * record["extra"].get("difficulty", 1)
    names = {call["name"] for call in completion["calls"]}
    offered = {tool["name"] for tool in record["tools"]}
    return {
        "brief": 0.5 if 0 < words <= limit else 0.0,
        "known_tools": -1.0 if names - offered else 0.0,
    }
