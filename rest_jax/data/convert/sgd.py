"""Schema-Guided Dialogue (Rastogi et al. 2020, arXiv:1909.05855): the intents of services as tools, their calls as gold calls.

In: a dialogue of a file `dialogues_*.json`; `open_files` reads the `schema.json` beside it. Out: a record for each call, whose
observation are the results of the service, and for each thing that the system says.

Calls have canonical values ("2019-03-08") where people say others ("next Friday"). `RULE` opens every dialogue and says how
values are written; a call with a value that is nowhere before it and that the rule does not give is no record.
"""

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rest_jax.data import fields
from rest_jax.data.fields import RecordError
from rest_jax.data.records import StepRecord, decompose
from rest_jax.errors import UserError
from rest_jax.files import Location, as_path, store_errors

# Every date of the data set is relative to this day, a Friday.
TODAY = datetime.date(2019, 3, 1)
RULE = (
    "Today is Friday, 2019-03-01; next Monday is 2019-03-04. Arguments of tools are written so: dates as YYYY-MM-DD, times as "
    "HH:MM of 24 hours, amounts in digits alone; anything else as the tool's description or a result has it, and where none "
    "has it, as it was said, each word with a capital."
)
_SPEAKERS = {"USER": "user", "SYSTEM": "assistant"}
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_HOURS += ("eleven", "twelve")
_WEEKDAY = "|".join(_WEEKDAYS)
_DAY = r"(\d{1,2})(?:st|nd|rd|th)"
_dates = re.compile(
    rf"\b(?:(day after tomorrow)|(tomorrow)|(today)|(?:next ({_WEEKDAY})|({_WEEKDAY}),? next week)"
    rf"|(?:this ({_WEEKDAY})|({_WEEKDAY}),? this week)|march {_DAY}|{_DAY} of (?:march|this month)|the {_DAY})\b"
).finditer
_times = re.compile(
    r"\b(?:(morning|afternoon|evening|night) )?(?:(half past|quarter past|quarter to) )?"
    rf"(\d{{1,2}}|{'|'.join(_HOURS)})(?::(\d\d))?(?: o.?clock)?"
    r"(?: ?(am|pm|a\.m|p\.m)\b| (?:in the|at) (morning|afternoon|evening|night)\b)?"
).finditer
_thousands = re.compile(r"(?<=\d),(?=\d{3}\b)")


def open_files(paths: Sequence[Location]) -> "_Converter":
    """The converter of these files of dialogues. UserError for a schema that is missing, cannot be read, or has a service that
    another one describes otherwise.
    """
    services: dict[str, list[dict[str, Any]]] = {}
    for folder in dict.fromkeys(as_path(path).parent for path in paths):
        path = folder / "schema.json"
        with store_errors(path):
            if not path.is_file():
                raise UserError(
                    f"data {path}: no such file; it comes with the dialogues of its folder"
                )
            text = path.read_bytes().decode("utf-8", "replace")
        listed = fields.json_text(text, f"data {path}")
        for i, raw in enumerate(fields.sequence(listed, f"data {path}")):
            name, tools = _service(raw, f"data {path}: [{i}]")
            if services.setdefault(name, tools) != tools:
                raise UserError(
                    f"data {path}: service {name!r} is another one than in the folder before; "
                    "prepare the folders one by one"
                )
    return _Converter(services)


class _Converter:
    """Makes records of dialogues with these services."""

    def __init__(self, services: Mapping[str, list[dict[str, Any]]]):
        self.services = services

    def __call__(self, raw: Any, name: str, where: str) -> list[StepRecord | RecordError]:
        """A record for each call and each response; RecordErrors are calls that nobody could know."""
        item = fields.item(raw, where)
        tools: list[dict[str, Any]] = []
        for i, service in enumerate(fields.listed(item.get("services"), f"{where}: services")):
            place = f"{where}: services[{i}]"
            tools += self.services[fields.one_of(service, self.services, place)]
        turns: list[dict[str, Any]] = [{"role": "system", "content": RULE}]
        for i, turn in enumerate(fields.listed(item.get("turns"), f"{where}: turns")):
            turns += _turns(fields.mapping(turn, f"{where}: turns[{i}]"), f"{where}: turns[{i}]")
        records = decompose(name, "sgd", tuple(tools), turns)
        if not records:
            raise RecordError(f"{where}: turns: no turn of the system to learn from")
        return [_unknown(record, where) or record for record in records]


def _service(raw: Any, where: str) -> tuple[str, list[dict[str, Any]]]:
    """(name, tools) of a service: one an intent, called SERVICE.INTENT so that they are held out together."""
    service = fields.mapping(raw, where)
    name = fields.text(service.get("service_name"), f"{where}: service_name")
    slots: dict[str, dict[str, Any]] = {}
    for i, slot in enumerate(fields.listed(service.get("slots"), f"{where}: slots")):
        slot = fields.mapping(slot, f"{where}: slots[{i}]")
        schema = {"type": "string", "description": slot.get("description")}
        if slot.get("is_categorical"):
            values = slot.get("possible_values")
            schema["enum"] = fields.listed(values, f"{where}: slots[{i}]: possible_values")
        slots[fields.text(slot.get("name"), f"{where}: slots[{i}]: name")] = schema
    tools = []
    for i, intent in enumerate(fields.listed(service.get("intents"), f"{where}: intents")):
        place = f"{where}: intents[{i}]"
        intent = fields.mapping(intent, place)
        required = fields.listed(intent.get("required_slots"), f"{place}: required_slots")
        optional = fields.mapping(intent.get("optional_slots") or {}, f"{place}: optional_slots")
        properties = {}
        for slot in (*required, *optional):
            properties[slot] = dict(slots[fields.one_of(slot, slots, f"{place}: slot")])
        parameters = {"type": "object", "properties": properties, "required": required}
        said = {
            "name": f"{name}.{intent.get('name')}",
            "description": intent.get("description"),
            "parameters": parameters,
        }
        tools.append(fields.tool(said, place))
    return name, tools


def _turns(turn: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """What a turn of the dialogue is: a user's text; of the system its calls with their results, then its text."""
    role = _SPEAKERS[fields.one_of(turn.get("speaker"), _SPEAKERS, f"{where}: speaker")]
    for i, frame in enumerate(fields.listed(turn.get("frames"), f"{where}: frames")):
        place = f"{where}: frames[{i}]"
        frame = fields.mapping(frame, place)
        if role != "assistant" or frame.get("service_call") is None:
            continue
        service = fields.text(frame.get("service"), f"{place}: service")
        said = fields.mapping(frame["service_call"], f"{place}: service_call")
        method = fields.text(said.get("method"), f"{place}: service_call: method")
        arguments = {"name": f"{service}.{method}", "arguments": said.get("parameters")}
        call = fields.call(arguments, f"{place}: service_call")
        yield {"role": "assistant", "content": None, "calls": [call]}
        results = fields.result(frame.get("service_results"), f"{place}: service_results")
        yield {"role": "tool", "content": results or "[]"}
    text = fields.text(turn.get("utterance"), f"{where}: utterance")
    if text.strip() or role == "user":
        yield {"role": role, "content": text}


def _unknown(record: StepRecord, where: str) -> RecordError | None:
    """Why the target of a record cannot be known from what is before it."""
    said = "\n".join(turn["content"] for turn in record.history[1:] if turn["content"])
    tools = {tool["name"]: tool for tool in record.tools}
    for call in record.target.calls:
        tool = tools.get(call.name, {})
        properties = tool.get("parameters", {}).get("properties", {})
        for name, value in call.arguments.items():
            listed = properties.get(name, {}).get("enum", ())
            if value not in listed and not _follows(str(value), said):
                return RecordError(
                    f"{where}: the value {value!r} of {name!r} is nowhere before the call"
                )
    return None


def _follows(value: str, said: str) -> bool:
    """Whether a value stands in the text, or `RULE` makes it of what does."""
    if fields.stands_in(value, said):
        return True
    low = said.lower()
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        return value in _days(low)
    if re.fullmatch(r"\d\d:\d\d", value):
        return value in _clock(low)
    if value.isdigit():
        return fields.stands_in(value, _thousands.sub("", said))
    found = re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", low)
    return found is not None and _capitals(found[0]) == value


def _capitals(text: str) -> str:
    return re.sub(r"(?<!\S)\w", lambda letter: letter[0].upper(), text)


def _days(said: str) -> set[str]:
    """The dates that a text in small letters names."""
    found = set()
    monday = TODAY - datetime.timedelta(TODAY.weekday())
    for match in _dates(said):
        after, tomorrow, today, a, b, c, d, *numbers = match.groups()
        if after or tomorrow or today:
            day = TODAY + datetime.timedelta(2 if after else 1 if tomorrow else 0)
        elif weekday := a or b or c or d:
            week = 7 if a or b else 0
            day = monday + datetime.timedelta(_WEEKDAYS.index(weekday) + week)
        else:
            number = int(next(filter(None, numbers)))
            if not 1 <= number <= 31:
                continue
            day = TODAY.replace(day=number)
        found.add(day.isoformat())
    return found


def _clock(said: str) -> set[str]:
    """The times of day that a text in small letters names; hours of which it does not say the half of the day are none."""
    found = set()
    for before, fraction, hour, minute, suffix, after in (m.groups() for m in _times(said)):
        part = before or suffix or after
        hours = _HOURS.index(hour) + 1 if hour in _HOURS else int(hour)
        if part is None or not 1 <= hours <= 12:
            continue
        minutes = 60 * (hours % 12 + (0 if part in ("am", "a.m", "morning") else 12))
        minutes += int(minute or 0)
        minutes += {"half past": 30, "quarter past": 15, "quarter to": -15}.get(fraction, 0)
        found.add(f"{minutes // 60:02}:{minutes % 60:02}")
    return found
