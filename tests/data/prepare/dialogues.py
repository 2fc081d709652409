"""Small dialogues to prepare, the command on them, and what it left."""

import json
import pathlib
import random

from rest_jax.data.prepare import pipeline, summary
from rest_jax.data.prepare.settings import Settings

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def dialogue(number: int, tools=("alpha", "beta"), call="alpha") -> dict:
    """An item of source openai: one question, one call, its result, an answer."""
    function = {"name": call, "arguments": json.dumps({"n": number})}
    calls = [{"id": "c", "type": "function", "function": function}]
    properties = {"n": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["n"]}
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c", "content": "fine"},
            {"role": "assistant", "content": f"answer {number}"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": n, "description": n, "parameters": parameters},
            }
            for n in tools
        ],
    }


# name -> what it does, (parameter, what it is), (the same)
TOOLS = {
    "get_weather": ("Weather forecast of a town.", ("town", "name of the town"), ("day", "day of the forecast")),
    "find_flight": ("Searches flights.", ("origin", "where it starts"), ("destination", "where it lands")),
    "book_hotel": ("Books a hotel room.", ("town", "name of the town"), ("nights", "number of nights")),
    "track_order": ("Says where an order is.", ("order_id", "number of the order"), ("country", "where it goes")),
    "play_song": ("Plays a song on a speaker.", ("title", "title of the song"), ("room", "room of the speaker")),
    "set_alarm": ("Sets an alarm.", ("time", "time of day, 24 hours"), ("label", "what it is for")),
    "send_message": ("Sends a text message.", ("recipient", "who gets it"), ("text", "what it says")),
    "convert_money": ("Converts an amount into another currency.", ("amount", "how much"), ("currency", "code of the currency")),
    "reserve_table": ("Reserves a table in a restaurant.", ("place", "name of the restaurant"), ("guests", "number of guests")),
}  # fmt: skip
VALUES = ("Rome", "Lisbon", "tomorrow", "Friday", "4711", "2", "Portugal", "kitchen", "07:30", "Anna", "EUR")  # fmt: skip


def chats(count: int) -> list[dict]:
    """Items of source openai as logs have them: three tools of two parameters on offer, a call with its result and the answer to
    it, or an answer in words, once or twice.
    """
    rng = random.Random(0)
    return [_chat(rng) for _ in range(count)]


def _chat(rng: random.Random) -> dict:
    offered = rng.sample(sorted(TOOLS), 3)
    messages: list[dict] = [{"role": "system", "content": "You are the assistant of a travel shop. Be brief."}]  # fmt: skip
    for turn in range(rng.choice((1, 1, 2))):
        name = rng.choice(offered)
        does, *parameters = TOOLS[name]
        arguments = {key: rng.choice(VALUES) for key, _ in parameters}
        said = " and ".join(f"{meaning} {arguments[key]}" for key, meaning in parameters)
        messages.append({"role": "user", "content": f"Hello, I need this: {does.lower()[:-1]}, with {said}."})  # fmt: skip
        if rng.random() < 0.25:
            messages.append({"role": "assistant", "content": f"Shall I do it for {said}?"})
            continue
        function = {"name": name, "arguments": json.dumps(arguments)}
        call = {"id": f"call_{turn}", "type": "function", "function": function}
        result = json.dumps({"status": "ok", "reference": rng.randrange(1000)})
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": result},
            {"role": "assistant", "content": f"Done, the reference is {json.loads(result)['reference']}."},
        ]  # fmt: skip
    return {"messages": messages, "tools": [_tool(name) for name in offered]}


def _tool(name: str) -> dict:
    does, *parameters = TOOLS[name]
    properties = {key: {"type": "string", "description": meaning} for key, meaning in parameters}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": does, "parameters": schema}}  # fmt: skip


def write(path, items) -> str:
    """JSON lines; the path as text."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def run(source_file, out, **options) -> summary.Summary:
    """`rest-jax data prepare` of one file or several."""
    inputs = (source_file,) if isinstance(source_file, str) else tuple(source_file)
    return pipeline.prepare(
        Settings(source=options.pop("source", "openai"), inputs=inputs, out=str(out), **options)
    )


def names(folder) -> list[str]:
    """The files of a folder."""
    return sorted(path.name for path in folder.iterdir())


def files_under(folder) -> list[str]:
    """The files of a folder and those below it."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())
