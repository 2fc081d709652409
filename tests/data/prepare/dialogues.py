"""Small dialogues to prepare, the command on them, and what it left."""

import json
import pathlib

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
