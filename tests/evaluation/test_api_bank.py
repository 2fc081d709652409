"""API-Bank: its two scores case by case, its layout, and what is known of its gold calls."""

import json

import pytest

from rest_jax.data.fields import RecordError
from rest_jax.errors import UserError
from rest_jax.evaluation import api_bank
from rest_jax.tool_calls import Call

GOLD = Call("AddAlarm", {"time": "07:00", "day": "Monday"})
CALL = {"name": GOLD.name, "parameters": GOLD.arguments}
TEXT, WRONG = json.dumps(CALL), json.dumps(CALL | {"name": "Now"})


def tagged(*lines: str) -> str:
    return "\n".join(["<think> why </think>", "<tool_call>", *lines, "</tool_call>"])


# completion -> (soft, strict)
CASES = {
    "gold": (tagged(TEXT), True, True),
    "gold on the line of its tags": (f"<tool_call>{TEXT}</tool_call>", True, True),
    "gold with a response": (tagged(TEXT) + "\n<response> done </response>", True, True),
    "gold in other order of keys": (tagged(json.dumps(dict(reversed(CALL.items())))), True, True),
    "gold without tags": (TEXT, True, False),
    "bare parameters": (tagged(json.dumps(GOLD.arguments)), True, False),
    "wrong call, then gold": (tagged(WRONG, TEXT), True, False),
    "gold twice": (tagged(TEXT, TEXT), True, False),
    "unclosed tag": (f"<tool_call>\n{TEXT}", True, False),
    "JSON string of gold": (tagged(json.dumps(TEXT)), True, False),
    "text before gold": (tagged("I call:", TEXT), True, False),
    "gold in the last of two blocks": (tagged(WRONG) + tagged(TEXT), True, False),
    "number before gold": (tagged("7", TEXT), False, False),
    "null before gold": (tagged("null", TEXT), False, False),
    "true before gold": (tagged("true", TEXT), False, False),
    "string of no JSON before gold": (tagged('"alarm"', TEXT), False, False),
    "string of a number before gold": (tagged('"7"', TEXT), False, False),
    "number behind gold": (tagged(TEXT, "7"), True, False),
    "list before gold": (tagged("[7]", TEXT), True, False),
    "arguments for parameters": (tagged(TEXT.replace("parameters", "arguments")), False, False),
    "int for string": (tagged(TEXT.replace('"Monday"', "1")), False, False),
    "other case": (tagged(TEXT.replace("Monday", "monday")), False, False),
    "extra parameter": (
        tagged(json.dumps(CALL | {"parameters": {**GOLD.arguments, "on": "True"}})),
        False,
        False,
    ),
    "extra key": (tagged(json.dumps(CALL | {"id": 1})), False, False),
    "over several lines": (tagged(json.dumps(CALL, indent=1)), False, False),
    "inside a list": (tagged(f"[{TEXT}]"), False, False),
    "gold in the first of two blocks": (tagged(TEXT) + tagged(WRONG), False, False),
    "text behind the closing tag": (tagged() + TEXT, False, False),
    "nested too deeply": (tagged("[" * 100_000), False, False),
    "empty": ("", False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_scores(case):
    text, soft, strict = CASES[case]
    assert (api_bank.soft(GOLD, text), api_bank.strict(GOLD, text)) == (soft, strict)


def test_bare_parameters_may_have_the_name_of_a_key():
    gold = Call("Greet", {"name": "Ann"})
    assert api_bank.soft(gold, tagged('{"name": "Ann"}'))
    assert not api_bank.soft(gold, tagged('{"name": "Ann", "parameters": {}}'))


def test_a_folder_is_read_level_by_level(bank):
    items = api_bank.load(bank)
    assert [item.id for item in items] == ["level 1/0", "level 1/1", "level 1/2", "level 2/0", "level 3/0"]  # fmt: skip
    assert [item.id for item in api_bank.load(bank, 1)] == ["level 1/0", "level 2/0", "level 3/0"]
    assert items[0].gold == Call("AddAlarm", {"time": "07:00"})
    assert [m["role"] for m in items[0].messages] == ["system", "user"]
    assert items[3].gold.name == "DropAlarm"


def test_gold_calls_that_no_prompt_can_tell_are_known(bank):
    found = api_bank.report(api_bank.load(bank))
    assert found["beyond_doubt"] == 1
    assert found["doubts"] == {
        "a value is not in the prompt word for word": ["level 1/1"],
        "the tool list declares another type than text": ["level 1/2"],
        "the tool is not offered": ["level 2/0"],
        "a parameter is not in the tool list": ["level 3/0"],
    }


def test_a_wrong_folder_is_one_line(bank, tmp_path):
    with pytest.raises(UserError, match="is no folder; api_bank needs level-1"):
        api_bank.load(tmp_path / "absent")
    (bank / "level-2-api_processed.json").unlink()
    with pytest.raises(
        UserError, match=r"lacks level-2-api_processed.json; api_bank needs level-1"
    ):
        api_bank.load(bank)


def test_a_wrong_record_is_named(bank):
    path = bank / "level-3-api_processed.json"
    (record,) = json.loads(path.read_text())
    for changed, message in (
        ({"answer": record["answer"] * 2}, "answer: 2 calls, api_bank has one a record"),
        ({"user": None}, "user: text is needed"),
    ):
        path.write_text(json.dumps([record | changed]))
        with pytest.raises(RecordError, match=message):
            api_bank.load(bank)
    path.write_text("[]")
    with pytest.raises(RecordError, match=r"level-3-api_processed.json: no records"):
        api_bank.load(bank)


def test_the_published_records(data_dir):
    """All 597, whose gold calls are those of the files, letter for letter."""
    folder = data_dir / "api_bank"
    items = api_bank.load(folder)
    raw = [r for name in api_bank.FILES.values() for r in json.loads((folder / name).read_text())]
    assert len(items) == 399 + 67 + 131
    for item, record in zip(items, raw, strict=True):
        answer = record["answer"]
        call = answer if isinstance(answer, dict) else answer[0]
        assert call == {"name": item.gold.name, "parameters": item.gold.arguments}
    report = api_bank.report(items)  # as docs/evaluation.md says
    assert report["beyond_doubt"] == 326
    assert {doubt: len(ids) for doubt, ids in report["doubts"].items()} == {
        "the tool is not offered": 6,
        "a parameter is not in the tool list": 8,
        "the tool list declares another type than text": 107,
        "a value is not in the prompt word for word": 212,
    }
