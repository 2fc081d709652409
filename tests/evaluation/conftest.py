"""A small folder in API-Bank's layout."""

import json

import pytest

from rest_jax.templates import toolrl

_ALARM = {"time": {"type": "str", "description": "The time."}, "on": {"type": "bool", "description": ""}}  # fmt: skip
_TOOLS = [
    {"name": "AddAlarm", "description": "Sets an alarm.", "parameters": _ALARM},
    {"name": "Now", "description": "The time of day.", "parameters": {}},
]


def _record(user: str, name: str, **parameters: str) -> dict:
    system, history = toolrl.render_prompt(_TOOLS, [{"role": "user", "content": user}])
    answer = {"name": name, "parameters": parameters}
    return {"system": system["content"], "user": history["content"], "answer": answer}


@pytest.fixture
def bank(tmp_path):
    """Three records of level 1, one of levels 2 and 3 each. Of levels 1 and 3 the answer is a list."""
    levels = {
        1: [
            _record("An alarm at 07:00.", "AddAlarm", time="07:00"),
            _record("An alarm at seven.", "AddAlarm", time="07:00"),
            _record("No alarm at 08:00, False.", "AddAlarm", time="08:00", on="False"),
        ],
        2: [_record("Drop the alarm at 07:00.", "DropAlarm", time="07:00")],
        3: [_record("Alarm: 09:00.", "AddAlarm", at="09:00")],
    }
    folder = tmp_path / "bank"
    folder.mkdir()
    for level, records in levels.items():
        if level != 2:
            records = [r | {"answer": [r["answer"]]} for r in records]
        (folder / f"level-{level}-api_processed.json").write_text(json.dumps(records))
    return folder
