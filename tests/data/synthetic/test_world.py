"""The synthetic world: answerable, split by tool, seeded, compact; its sloppy demonstrator errs at the stated rates."""

import collections
import json

import numpy as np
import pytest

from rest_jax.data.records import from_json, to_json
from rest_jax.data.synthetic import world as synthetic
from rest_jax.data.synthetic.words import ACTIONS, OBJECTS, PARAMETER_TYPES, pairs, split_of
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import TEMPLATES
from tests.conftest import REPOSITORY
from tools.tiny_tokenizer import train_tokenizer

SIZE = 1500
JSON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list}


@pytest.fixture(scope="module", params=["train", "eval"])
def records(request):
    return synthetic.world(request.param, 7, SIZE)


def _kind(record):
    return record.id.rsplit("-", 1)[1]


def test_seeded_and_independent_of_size():
    assert synthetic.world("train", 3, 20) == synthetic.world("train", 3, 40)[:20]
    assert synthetic.world("train", 3, 20) != synthetic.world("train", 4, 20)
    assert len({r.id for r in synthetic.world("train", 3, 500)}) == 500


def test_every_kind_occurs_at_its_rate(records):
    counts = collections.Counter(map(_kind, records))
    for kind, share in synthetic.KINDS["mixed"].items():
        assert counts[kind] / SIZE == pytest.approx(share, abs=0.04)


def test_single_level_has_no_parallel_calls_and_no_dialogues():
    records = synthetic.world("train", 1, 300, "single")
    assert {_kind(r) for r in records} == {"single", "none"}
    assert all(len(r.target.calls) <= 1 and len(r.history) == 1 for r in records)


def test_thoughts_of_the_inferred_level_name_no_tool():
    records = synthetic.world("train", 1, 300, "inferred")
    assert {_kind(r) for r in records} == {"single", "parallel", "none"}
    for record in records:
        assert record.target.think.startswith("need to ")
        assert not any(tool["name"] in record.target.think for tool in record.tools)
        for call in record.target.calls:
            does = {tool["name"]: tool["description"] for tool in record.tools}[call.name]
            assert does in record.target.think


def test_the_demonstrator_of_the_inferred_level_calls_the_right_tools_and_forgets_the_second():
    right = synthetic.world("train", 1, 300, "inferred")
    sloppy = synthetic.demonstrations("train", 1, 300, "inferred")
    names = [
        ([c.name for c in a.target.calls], [c.name for c in b.target.calls])
        for a, b in zip(right, sloppy, strict=True)
    ]
    assert all(made and made == wanted[: len(made)] for wanted, made in names if wanted)
    forgotten = [len(made) == 1 for wanted, made in names if len(wanted) == 2]
    assert sum(forgotten) / len(forgotten) == pytest.approx(0.4, abs=0.15)


def test_held_out_tools_never_occur_in_training(records):
    split = records[0].id.split("-")[1]
    for record in records:
        for tool in record.tools:
            assert split_of(*tool["description"].split()) == split


def test_splits_share_every_word_but_no_tool():
    train, held_out = pairs("train"), pairs("eval")
    assert not set(train) & set(held_out)
    for split in (train, held_out):
        assert {a for a, _ in split} == set(ACTIONS) and {o for _, o in split} == set(OBJECTS)
    assert 0.15 < len(held_out) / (len(train) + len(held_out)) < 0.25


def test_the_page_of_results_says_what_is_new_of_held_out_tools():
    """Of the quickstart: the pairs alone, whose words and names training has too."""
    train = synthetic.world("train", 0, 2048)
    called = [c.name for r in synthetic.world("eval", 0, 192) for c in r.target.calls]
    names = {tool["name"] for record in train for tool in record.tools}
    recur = sum(name in names for name in called)
    page = (REPOSITORY / "docs" / "results.md").read_text()
    assert f"{recur} of the {len(called)} gold calls of the first 192 held-out records" in page
    for text in (page, (REPOSITORY / "README.md").read_text()):
        assert "never seen" not in text and "unseen" not in text


def test_calls_are_of_offered_tools_with_typed_arguments(records):
    for record in records:
        tools = {tool["name"]: tool for tool in record.tools}
        assert len(tools) == len(record.tools) and 2 <= len(tools) <= 4
        for call in record.target.calls:
            parameters = tools[call.name]["parameters"]
            assert list(call.arguments) == list(parameters)
            for name, value in call.arguments.items():
                assert type(value) is JSON_TYPES[parameters[name]["type"]]


def test_the_right_tool_is_the_one_described_and_its_values_are_said(records):
    for record in records:
        if _kind(record) not in ("single", "parallel", "first"):
            continue
        request = record.history[0]["content"]
        tools = {tool["name"]: tool for tool in record.tools}
        for call in record.target.calls:
            action, thing = tools[call.name]["description"].split()
            assert f"{action} the {thing}" in request
            for name, value in call.arguments.items():
                word = tools[call.name]["parameters"][name]["description"]
                said = {"true": "yes", "false": "no"}.get(json.dumps(value), json.dumps(value))
                assert f"{word} {said}" in request


def test_where_no_tool_fits_none_is_described(records):
    for record in records:
        if _kind(record) == "none":
            assert not record.target.calls and record.target.response == synthetic.NO_TOOL
            for tool in record.tools:
                action, thing = tool["description"].split()
                assert f"{action} the {thing}" not in record.history[0]["content"]


def test_parallel_calls_differ_and_are_two(records):
    for record in records:
        if _kind(record) == "parallel":
            first, second = record.target.calls
            assert first != second


def test_second_step_uses_the_observation(records):
    seconds = [r for r in records if _kind(r) == "second"]
    for record in seconds:
        observed = record.history[-1]["content"].split()[1]
        assert list(record.target.calls[0].arguments.values()) == [observed]
        assert observed not in record.history[0]["content"]
    for record in records:
        if _kind(record) == "final":
            assert not record.target.calls
            assert record.history[-1]["content"] in record.target.response


def test_names_are_fresh_within_a_record(records):
    for record in records:
        names = [t["name"] for t in record.tools] + [
            p for t in record.tools for p in t["parameters"]
        ]
        assert len(set(names)) == len(names)
        assert not {t["name"] for t in record.tools} & {*ACTIONS, *OBJECTS, *PARAMETER_TYPES}


def test_records_survive_json(records):
    for record in records[:100]:
        assert from_json(json.loads(json.dumps(to_json(record)))) == record


def test_gold_answers_parse_to_their_targets(records):
    template = TEMPLATES["toolrl"]
    for record in records[:300]:
        answer = template.parse(template.render_answer(record.target).encode())
        assert answer.calls == record.target.calls and answer.broken_calls == 0
        assert (answer.response is None) == (record.target.response is None)


def test_habits_strike_at_their_rates():
    """Each mistake is found from the outside, by comparing with the right answer of the same record."""
    right, sloppy = synthetic.world("train", 5, 4000), synthetic.demonstrations("train", 5, 4000)
    made = collections.defaultdict(list)
    for good, bad in zip(right, sloppy, strict=True):
        assert (good.id, good.tools, good.history) == (bad.id, bad.tools, bad.history)
        if _kind(good) == "none":
            made["spurious_call"].append(bool(bad.target.calls))
        if _kind(good) == "parallel":
            made["forgets_second"].append(len(bad.target.calls) == 1)
        if good.target.calls:
            made["chatty"].append(bad.target.response is not None)
            values = good.target.calls[0].arguments.values()
            if any(type(v) in (bool, int, float) for v in values):
                strings = [type(v) is str for v in bad.target.calls[0].arguments.values()]
                changed = [type(v) is not str for v in values]
                made["stringly"].append(any(s and c for s, c in zip(strings, changed, strict=True)))
    for habit, rate in synthetic.HABITS.items():
        assert np.mean(made[habit]) == pytest.approx(rate, abs=0.05), habit


def test_spurious_calls_are_well_formed():
    for record in synthetic.demonstrations("train", 5, 1000):
        tools = {tool["name"]: tool for tool in record.tools}
        for call in record.target.calls:
            assert set(call.arguments) <= set(tools[call.name]["parameters"])


def test_compact_for_a_small_vocabulary(tmp_path):
    """Within 256 prompt tokens with 1,024 words; masked names are two or three of them."""
    template = TEMPLATES["toolrl"]

    def rendered(records):
        return [
            (r.prompt_messages(template, brief=True), template.render_answer(r.target))
            for r in records
        ]

    texts = [
        t
        for m, a in rendered(synthetic.world("train", 0, 2000))
        for t in (*(x["content"] for x in m), a)
    ]
    train_tokenizer(texts, 1024, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    records = synthetic.world("eval", 0, 400)
    prompts = [len(tokenizer.encode_prompt(m)) for m, _ in rendered(records)]
    answers = [len(tokenizer.encode(a)) for _, a in rendered(records)]
    assert np.median(prompts) <= 150 and max(prompts) <= 256
    assert np.median(answers) <= 45
    names = [len(tokenizer.encode(tool["name"])) for r in records for tool in r.tools]
    assert np.mean(np.array(names) <= 3) > 0.98
