"""Schema-Guided dialogues: services as tools, calls whose values can be known, and what is wrong with a file in one line."""

import copy
import json

import pytest

from rest_jax.data.convert import sgd
from rest_jax.data.fields import RecordError
from rest_jax.data.prepare import pipeline
from rest_jax.data.prepare.settings import Settings
from rest_jax.data.records import StepRecord
from rest_jax.errors import UserError
from rest_jax.tool_calls import Call

SCHEMA = [
    {
        "service_name": "Tables_1",
        "description": "Books tables.",
        "slots": [
            {"name": "city", "description": "Town", "is_categorical": False, "possible_values": []},
            {"name": "day", "description": "Date", "is_categorical": False, "possible_values": []},
            {"name": "seats", "description": "Guests", "is_categorical": True, "possible_values": ["1", "2"]},
        ],
        "intents": [
            {"name": "Find", "description": "Find a table", "required_slots": ["city"], "optional_slots": {"seats": "2"}},
            {"name": "Book", "description": "Book a table", "required_slots": ["day"], "optional_slots": {}},
        ],
    }
]  # fmt: skip


def call(method, results, **parameters):
    return {
        "service": "Tables_1",
        "service_call": {"method": method, "parameters": parameters},
        "service_results": results,
    }


def said(speaker, utterance, *frames):
    return {"speaker": speaker, "utterance": utterance, "frames": list(frames)}


DIALOGUE = {
    "dialogue_id": "1_0",
    "services": ["Tables_1"],
    "turns": [
        said("USER", "A table in san jose, for two"),
        said("SYSTEM", "Which place? I have Olive.", call("Find", [{"name": "Olive"}], city="San Jose", seats="2")),
        said("USER", "Olive, next Friday."),
        said("SYSTEM", "Done.", call("Book", [], day="2019-03-08")),
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "dialogues_001.json").write_text(json.dumps([DIALOGUE]))
    return tmp_path


def convert(folder, dialogue=DIALOGUE):
    return sgd.open_files([folder / "dialogues_001.json"])(dialogue, "d", "here")


def test_a_dialogue_is_a_record_for_each_call_and_each_response(folder):
    before = copy.deepcopy(DIALOGUE)
    records = convert(folder)
    assert before == DIALOGUE
    assert [(r.target.calls, r.target.response) for r in records] == [
        ((Call("Tables_1.Find", {"city": "San Jose", "seats": "2"}),), None),
        ((), "Which place? I have Olive."),
        ((Call("Tables_1.Book", {"day": "2019-03-08"}),), None),
        ((), "Done."),
    ]
    assert [turn["role"] for turn in records[3].history] == [
        "system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool",
    ]  # fmt: skip
    assert [records[3].history[i]["content"] for i in (3, 7)] == ['[{"name": "Olive"}]', "[]"]
    find, book = records[0].tools
    assert find == {
        "name": "Tables_1.Find",
        "description": "Find a table",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Town"},
                "seats": {"type": "string", "description": "Guests", "enum": ["1", "2"]},
            },
            "required": ["city"],
        },
    }
    assert list(book["parameters"]["properties"]) == ["day"]
    assert "2019-03-01" in records[0].history[0]["content"]


FOLLOWS = [
    # what stands there
    ("Olive Garden", "I like Olive Garden.", True),
    ("Garlic", "Garlics are fine", False),
    ("Drama", "some drama", True),
    ("drama", "some Drama", False),
    ("Lord of", "lord of", False),
    ("Comedy-drama", "a comedy-drama", True),
    ("San Francisco", "San Fran", False),
    # dates
    ("2019-03-01", "later today", True),
    ("2019-03-02", "tomorrow", True),
    ("2019-03-03", "The day after tomorrow", True),
    ("2019-03-02", "the day after tomorrow", False),
    ("2019-03-04", "next Monday", True),
    ("2019-03-10", "Sunday, next week", True),
    ("2019-03-02", "this Saturday", True),
    ("2019-03-03", "Sunday this week", True),
    ("2019-03-11", "on the 11th", True),
    ("2019-03-11", "March 11th", True),
    ("2019-03-11", "11th of this month", True),
    ("2019-03-12", "11th of March", False),
    ("2019-04-01", "the 99th", False),
    # times
    ("16:30", "half past 4 in the evening", True),
    ("16:30", "at 4:30 pm", True),
    ("16:30", "4:30", False),
    ("19:45", "quarter to eight in the evening", True),
    ("11:15", "morning quarter past 11", True),
    ("12:00", "12 o'clock in the afternoon", True),
    ("00:10", "12:10 am", True),
    ("20:00", "night 8", True),
    ("15:00", "three in the afternoon", True),
    # amounts
    ("1280", "it costs $1,280 in all", True),
    ("1280", "it costs 11,280", False),
]


@pytest.mark.parametrize(("value", "text", "known"), FOLLOWS, ids=lambda value: str(value))
def test_a_value_stands_there_or_follows_by_the_rule(folder, value, text, known):
    dialogue = copy.deepcopy(DIALOGUE)
    dialogue["turns"][2]["utterance"] = text
    dialogue["turns"][3]["frames"][0]["service_call"]["parameters"] = {"day": value}
    *first, booked, last = convert(folder, dialogue)
    assert all(isinstance(record, StepRecord) for record in (*first, last))
    if known:
        assert booked.target.calls == (Call("Tables_1.Book", {"day": value}),)
    else:
        assert str(booked) == f"here: the value {value!r} of 'day' is nowhere before the call"


def test_prepare_counts_what_nobody_could_know(folder, capsys):
    dialogue = copy.deepcopy(DIALOGUE)
    dialogue["turns"][0]["utterance"] = "A table"
    (folder / "dialogues_001.json").write_text(json.dumps([DIALOGUE, dialogue]))
    settings = Settings("sgd", [str(folder / "dialogues_001.json")], str(folder / "out.jsonl"))
    result = pipeline.prepare(settings)
    assert (result.converted, result.kept) == (8, 7)
    assert result.dropped == {"the value '...' of '...' is nowhere before the call": 1}
    (line,) = (folder / "out.jsonl.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].startswith("the value 'San Jose' of 'city'")


def changed(*path_and_value):
    *path, last, value = path_and_value
    dialogue = copy.deepcopy(DIALOGUE)
    at = dialogue
    for key in path:
        at = at[key]
    at[last] = value
    return dialogue


FAULTS = [
    (changed("services", ["Bank"]), r"services\[0\]: 'Bank' is not one of"),
    (changed("turns", 1, "speaker", "BOT"), r"turns\[1\]: speaker: 'BOT' is not one of"),
    (changed("turns", 0, "utterance", 7), r"turns\[0\]: utterance: text is needed"),
    (changed("turns", 1, "frames", 0, "service_call", []), r"frames\[0\]: service_call: an? "),
    (changed("turns", 1, "frames", 0, "service", None), r"frames\[0\]: service: text is needed"),
    (changed("turns", [DIALOGUE["turns"][0]]), "turns: no turn of the system"),
    (7, "an object is needed"),
]


@pytest.mark.parametrize(("dialogue", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_what_is_wrong_with_a_dialogue_is_one_line(folder, dialogue, said):
    with pytest.raises(RecordError, match=f"^here: .*{said}"):
        convert(folder, dialogue)


SCHEMAS = {
    "[": "not JSON",
    "{}": "a list is needed",
    '[{"service_name": 1}]': r"\[0\]: service_name: text is needed",
    '[{"service_name": "a", "intents": [{"name": "b", "required_slots": ["c"]}]}]': r"slot: 'c' is not one of",
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_is_wrong_with_a_schema_is_one_line(folder, schema):
    (folder / "schema.json").write_text(schema)
    with pytest.raises(UserError, match=f"^data {folder}/schema.json: .*{SCHEMAS[schema]}"):
        convert(folder)


def test_a_schema_is_needed_and_services_are_one_thing(folder):
    other = folder / "other"
    other.mkdir()
    with pytest.raises(UserError, match=f"{other}/schema.json: no such file"):
        sgd.open_files([other / "dialogues_001.json"])
    (other / "schema.json").write_text(json.dumps(SCHEMA).replace("Find a table", "Search"))
    with pytest.raises(UserError, match="service 'Tables_1' is another one"):
        sgd.open_files([folder / "dialogues_001.json", other / "dialogues_001.json"])


VALUES = [None, "x", "", -1, 7, True, 1.5, [], ["x"], [[]], {}, {"a": 1}]


def test_damaged_dialogues_and_schemas_are_refused_or_read(folder):
    """One value after the other is replaced."""

    def places(at, path=()):
        for key in at if isinstance(at, dict) else range(len(at)):
            yield (*path, key)
            if isinstance(at[key], dict | list):
                yield from places(at[key], (*path, key))

    refused = 0
    for whole in (DIALOGUE, SCHEMA):
        for path in places(whole):
            for value in VALUES:
                damaged = copy.deepcopy(whole)
                at = damaged
                for key in path[:-1]:
                    at = at[key]
                at[path[-1]] = value
                if whole is SCHEMA:
                    (folder / "schema.json").write_text(json.dumps(damaged))
                try:
                    convert(folder, damaged if whole is DIALOGUE else DIALOGUE)
                except RecordError as error:
                    refused += 1
                    assert str(error).startswith(("here: ", f"data {folder}/schema.json: "))
        (folder / "schema.json").write_text(json.dumps(SCHEMA))
    assert refused > 200


def test_what_is_set_aside_of_real_dialogues_are_words(data_dir):
    """Towns and cuisines by other names; every date, time and amount follows by the rule."""
    files = sorted((data_dir / "sgd").glob("*/dialogues_*.json"))[:2]
    if not files:
        pytest.skip("no Schema-Guided dialogues")
    convert, reasons = sgd.open_files(files), []
    for path in files:
        for dialogue in json.loads(path.read_text()):
            made = convert(dialogue, path.stem, "here")
            reasons += [str(record) for record in made if isinstance(record, RecordError)]
    assert 10 < len(reasons) < 100
    assert not any(reason.split("'")[1][0].isdigit() for reason in reasons)
