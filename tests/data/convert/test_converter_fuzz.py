"""Fixtures with any part replaced: an item is either refused in one line, or its records can be stored and rendered."""

import copy
import json
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.data.convert import SOURCES
from rest_jax.data.fields import RecordError
from rest_jax.data.records import from_json, to_json
from rest_jax.templates import TEMPLATES

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
EXAMPLES = int(os.environ.get("REST_JAX_FUZZ", "25"))  # of each source; thousands find more

WORDS = st.sampled_from(
    [
        "",
        "x",
        "tool",
        "assistant",
        "[f(a=1)]",
        "[now()]",
        "{}",
        "[]",
        '{"a": 1}',
        "<user> a </user>",
    ]
)
NEW = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.just(1.5) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


def _places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _change(raw, path, what, value):
    node = raw
    for key in path[:-1]:
        node = node[key]
    if what == "drop":
        del node[path[-1]]
    elif what == "repeat" and isinstance(node, list):
        node.insert(path[-1], copy.deepcopy(node[path[-1]]))
    else:
        node[path[-1]] = value


@pytest.mark.parametrize("source", list(SOURCES))
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(data=st.data())
def test_any_change_is_refused_or_understood(source, data):
    items = json.loads((FIXTURES / f"{source}.json").read_text(encoding="utf-8"))
    raw = data.draw(st.sampled_from(items))
    for _ in range(data.draw(st.integers(1, 3))):
        places = [path for path in _places(raw) if path]
        hypothesis.assume(places)
        what = data.draw(st.sampled_from(["drop", "repeat", "set", "set"]))
        _change(raw, data.draw(st.sampled_from(places)), what, data.draw(NEW))
    before = copy.deepcopy(raw)
    try:
        records = SOURCES[source](raw, "s", "here")
    except RecordError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)
        return
    assert raw == before
    assert [from_json(json.loads(json.dumps(to_json(record)))) for record in records] == records
    for record in records:
        for template in TEMPLATES.values():
            template.render_answer(record.target)
            record.prompt_messages(template)
            record.prompt_messages(template, brief=True)
