"""Calls in bracketed Python-like syntax: what is read, what is refused, and that all that can be written is read back."""

import ast
import json
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.data.convert.call_syntax import (
    SyntaxFault,
    looks_like_calls,
    mentions_call,
    parse,
)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[]", []),
        ("[f(a=1), ]", [("f", {"a": 1})]),
        ("[f()]", [("f", {})]),
        (' [ f ( a = 1 , b = "x" , ) ,g()] ', [("f", {"a": 1, "b": "x"}), ("g", {})]),
        ("[Market Trends API(t='UP')]", [("Market Trends API", {"t": "UP"})]),
        ("[a.b/c-d: e!(x=1)]", [("a.b/c-d: e!", {"x": 1})]),
        ("[Find (v2)(max-results=3, $top=1, f[id]=2)]",
         [("Find (v2)", {"max-results": 3, "$top": 1, "f[id]": 2})]),
        ("[f(a=[1, [2.5, -3e2]], b={'k': {\"l\": ()}})]",
         [("f", {"a": [1, [2.5, -300.0]], "b": {"k": {"l": []}}})]),
        ("[f(a=True, b=true, c=None, d=null, e=False)]",
         [("f", {"a": True, "b": True, "c": None, "d": None, "e": False})]),
        ("[f(a='])}, g(x=1)', b=\"it's, (ok)\")]", [("f", {"a": "])}, g(x=1)", "b": "it's, (ok)"})]),
        (r"""[f(a='it\'s', b="a\\b\n\"c\"", c="\u00e9\ud83d\ude00", d="http:\/\/x", e='\d')]""",
         [("f", {"a": "it's", "b": 'a\\b\n"c"', "c": "é😀", "d": "http://x", "e": r"\d"})]),
        ("[f(a='two\nlines')]", [("f", {"a": "two\nlines"})]),
        ("[f(a=(1), b=(1,), c=(1, 2), d=-.5, e=+7, g=0)]",
         [("f", {"a": 1, "b": [1], "c": [1, 2], "d": -0.5, "e": 7, "g": 0})]),
        ("[f(q='a == b')]", [("f", {"q": "a == b"})]),
    ],
)  # fmt: skip
def test_calls_that_are_read(text, calls):
    found = parse(text)
    assert found == [{"name": name, "arguments": arguments} for name, arguments in calls]
    assert repr([c["arguments"] for c in found]) == repr([a for _, a in calls])  # 1, 1.0, True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 0: '\\[' is needed, found the end"),
        ("f()", "character 0: '\\[' is needed, found 'f\\(\\)'"),
        ("[f()", "character 4: ',' or ']' is needed, found the end"),
        ("[f() g()]", "character 5: ',' or ']' is needed"),
        ("[f()] and more", "character 6: text after the end"),
        ("[f(1)]", "a call is needed"),
        ("[(a=1)]", "a name is needed"),
        ("[f(a=1, 2)]", "character 8: a keyword and '=' are needed"),
        ("[f(a=1, a=2)]", "the keyword 'a' comes twice"),
        ("[f(a={'k': 1, 'k': 2})]", "the key 'k' comes twice"),
        ("[f(a={1: 2})]", "a key that is a string"),
        ("[f(a=Paris)]", "character 5: a value is needed"),
        ("[f(a=2024-01-01)]", "character 9: ',' or '\\)' is needed"),
        ("[f(a=007)]", "a value is needed"),
        ("[f(a=nan)]", "a value is needed"),
        ("[f(a=1e999)]", "a finite number"),
        ("[f(a=" + "9" * 5000 + ")]", "more than 1000 digits"),
        ("[f(a=__import__('os'))]", "a value is needed"),
        ("[f(a=g(b=1))]", "a value is needed"),
        ("[f(a='open)]", "a value is needed"),
        ("[f(a=" + "[" * 40 + "]" * 40 + ")]", "nested deeper than 32"),
        ("[f(a=" + "[" * 100_000 + ")]", "nested deeper than 32"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(SyntaxFault, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("[f(a=1)]", True),
        (" [f(a=1), g()] \n", True),
        ("[f(a=Paris)]", True),
        ("[f(a=1]", False),
        ("[]", False),
        ("[Note (important)]", False),
        ("[1] See (a).", False),
        ("I call f(a=1)", False),
    ],
)
def test_what_is_meant_as_calls(text, meant):
    assert looks_like_calls(text) is meant


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[f(a=1)", "f"), ("[f(a=1)].", "f"), ("Sure. [f(a=1)]", "f"), ("f(a=1)", "f"), ("I ran f()", "f"),
        ("f ( a = 1 )", "f"), ("f ()", "f"), ("f('x')", "f"), ("do Go (v2)(x=1)", "Go (v2)"), ("a f.g(", "f.g"),
        ("f (see below)", None), ("if(x)", None), ("f is fine (x=1)", None), ("g(a=1)", None), ("", None),
    ],
)  # fmt: skip
def test_a_call_that_is_mentioned(text, name):
    assert mentions_call(text, ["f", "f.g", "Go (v2)", ""]) == name


@pytest.mark.parametrize(
    "text",
    ["[" + "f(" * 50_000, "[" + "f (a" * 50_000, "[f(a='" + "\\" * 100_001, "[f(" + "a" * 200_000,
     "[" + "f(a=1)," * 50_000, "[f(a=[" + "1," * 50_000, "[" + "( " * 100_000],
)  # fmt: skip
def test_time_is_linear(text):
    start = time.perf_counter()
    looks_like_calls(text + ")]")
    with pytest.raises(SyntaxFault):
        parse(text)
    assert time.perf_counter() - start < 15  # seconds; a quadratic reader takes minutes


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PIECES = st.sampled_from(
    ["'", '"', "\\", "[", ")", ",", "=", "{", "\n", "é", "😀", "True", "(a=1)"]
)
STRINGS = TEXT | st.lists(PIECES, max_size=6).map("".join)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"[A-Za-z0-9$_.:/'\"-][A-Za-z0-9 $_.:/'\"-]{0,8}[A-Za-z0-9]", fullmatch=True)
KEYS = st.from_regex(r"[A-Za-z$_.\[{-][A-Za-z0-9 $_.\[\]{}-]{0,6}[A-Za-z0-9\]]", fullmatch=True)


def _written(calls):
    texts = []
    for call in calls:
        arguments = ", ".join(f"{k}={_literal(v)}" for k, v in call["arguments"].items())
        texts.append(f"{call['name']}({arguments})")
    return f"[{', '.join(texts)}]"


def _literal(value):
    """Strings as JSON writes them, True, False and None as Python does."""
    if isinstance(value, dict):
        members = (f"{json.dumps(k, ensure_ascii=False)}: {_literal(v)}" for k, v in value.items())
        return f"{{{', '.join(members)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if value is None or isinstance(value, bool):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    st.lists(
        st.fixed_dictionaries(
            {
                "name": NAMES | NAMES.map("{} (v2)".format),
                "arguments": st.dictionaries(KEYS, VALUES),
            }
        ),
        max_size=3,
    )
)
def test_what_is_written_is_read_back(calls):
    text = _written(calls)
    pairs = [[(c["name"], c["arguments"]) for c in some] for some in (parse(text), calls)]
    assert repr(pairs[0]) == repr(pairs[1])  # repr: 1, 1.0 and True differ
    assert looks_like_calls(text) is bool(calls)


@hypothesis.given(VALUES.filter(lambda v: v is not None))
def test_python_literals_are_read_as_python_reads_them(value):
    for text in (repr(value), _literal(value)):
        assert parse(f"[f(a={text})]")[0]["arguments"] == {"a": value}
    assert ast.literal_eval(_literal(value)) == value
