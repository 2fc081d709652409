"""What is told of a completion while it is drawn adds up to what is told at once, and is never taken back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.rollout.requests import Piece
from rest_jax.serving.text import Completion, Delta, Plain, Turn
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call

F, G = Call("f", {"a": "<x> é"}), Call("g", {})
HERMES = (
    '<tool_call>\n{"name": "f", "arguments": {"a": "<x> é"}}\n</tool_call>',
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
)
LLAMA = ('{"name": "f", "parameters": {"a": "<x> é"}}', '{"name": "g", "parameters": {}}')
TOOLRL = f"<tool_call>\n{LLAMA[0]}\n{LLAMA[1]}\n</tool_call>"
# template, text -> thought, text, calls
TURNS = [
    ("hermes", "plain\n\n{a} [b] <c\n ", "", "plain\n\n{a} [b] <c", ()),
    ("hermes", f"<think>\nhm <tool_call> x\n</think>\n\nHi é.\n{HERMES[0]}\n{HERMES[1]}",
     "hm <tool_call> x", "Hi é.", (F, G)),
    ("hermes", f"one\n{HERMES[1]}\ntwo", "", "one\ntwo", (G,)),
    ("hermes", '<tool_call>\n{"name": "f", "argu', "", '{"name": "f", "argu', ()),
    ("hermes", '<tool_call>\n{"name": "f"} no\n</tool_call> so', "", '{"name": "f"} no\nso', ()),
    ("hermes", "<think>\nnever ends", "never ends", "", ()),
    ("toolrl", f"<think> a b </think>\n{TOOLRL}\n<response> hi  there </response>", "a b", "hi  there",
     (F, G)),
    ("toolrl", "no format at all", "", "no format at all", ()),
    ("toolrl", "<response> cut off", "", "cut off", ()),
    ("llama3", LLAMA[0], "", "", (F,)),
    ("llama3", f"<|python_tag|>{LLAMA[1]}", "", "", (G,)),
    ("llama3", f"first\n{LLAMA[0]}; {LLAMA[1]}\nlast", "", "first\nlast", (F, G)),
    ("llama3", 'some [x]\n[1, 2]\n{"a": 1}', "", 'some [x]\n[1, 2]\n{"a": 1}', ()),
]  # fmt: skip

TURN = pytest.mark.parametrize(
    ("name", "text", "thought", "said", "calls"),
    TURNS,
    ids=[f"{turn[0]}-{i}" for i, turn in enumerate(TURNS)],
)


def in_parts(turn: Turn, text: str, size: int) -> list[Delta]:
    ends = [len(text[:n].encode()) for n in range(size, len(text), size)]
    data = text.encode()
    return [*(turn.read(data, end, False) for end in ends), turn.read(data, len(data), True)]


def joined(deltas: list[Delta]) -> tuple[str, str, tuple[Call, ...]]:
    calls = tuple(call for delta in deltas for call in delta.calls)
    return "".join(d.thought for d in deltas), "".join(d.text for d in deltas), calls


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@TURN
def test_a_turn_in_parts(name, text, thought, said, calls, size):
    deltas = in_parts(Turn(TEMPLATES[name], None), text, size)
    assert joined(deltas) == (thought, said, calls)
    assert [d.first_call for d in deltas if d.calls] == sorted(
        {d.first_call for d in deltas if d.calls}
    )


@TURN
def test_without_tools_calls_are_text(name, text, thought, said, calls):
    turn = Turn(TEMPLATES[name], 0)
    got = joined(in_parts(turn, text, 1))
    assert got == joined(in_parts(Turn(TEMPLATES[name], 0), text, 10_000))
    assert got[2] == () and all(call.name in got[1] for call in calls) and got[0] == thought


def test_calls_and_text_come_as_soon_as_they_are_certain():
    text = f"<think>\nso\n</think>\n\nHi.\n{HERMES[1]}\nrest"
    deltas = in_parts(Turn(TEMPLATES["hermes"], None), text, 1)
    when = {name: next(i for i, d in enumerate(deltas, 1) if getattr(d, name))
            for name in ("thought", "text", "calls")}  # fmt: skip
    assert when["thought"] == text.index("s") + 1 and when["text"] == text.index("H") + 1
    assert when["calls"] == text.index("</tool_call>") + len("</tool_call>")


def test_one_call_when_one_is_wanted():
    for size in (1, 10_000):
        deltas = in_parts(Turn(TEMPLATES["llama3"], 1), f"{LLAMA[0]}\n{LLAMA[1]}\n{LLAMA[1]}", size)
        assert joined(deltas) == ("", "", (F,))


def test_a_thought_that_the_prompt_opened():
    turn = Turn(TEMPLATES["hermes"].behind(True), None)
    deltas = in_parts(turn, f"\nhm {HERMES[0]}\n</think>\n\nHi", 1)
    assert joined(deltas) == (f"hm {HERMES[0]}", "Hi", ())


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thought_open", [False, True])
@pytest.mark.parametrize("tool", [None, 'a "b"'])
def test_an_opening_is_the_beginning_of_a_call(name, thought_open, tool):
    template = TEMPLATES[name].behind(thought_open)
    opening, word = template.call_opening(tool), "arguments" if name == "hermes" else "parameters"
    behind = ' {"x": 1}}' if tool else f' "g", "{word}": {{}}}}'
    closing = "" if name == "llama3" else "\n</tool_call>"
    answer = template.parse((opening + behind + closing).encode())
    assert answer.calls == (Call(tool, {"x": 1}) if tool else G,) and not answer.broken_calls


def pieces(tokenizer, text: str, size: int, finish: str = "length") -> list[Piece]:
    ids = tokenizer.encode(text)
    if finish == "stop":
        ids = np.append(ids, tokenizer.end_id)
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    ends = [None] * (len(parts) - 1) + [finish]
    return [
        Piece(0, part, -np.ones(len(part), np.float32), np.ones(len(part), np.float32), None, end)
        for part, end in zip(parts, ends, strict=True)
    ]


def told(one: Completion, drawn: list[Piece]) -> tuple[str, list[int], str | None]:
    text, ids, finish = "", [], None
    for piece in drawn:
        one.add(piece)
        delta = one.read()
        text, finish = text + delta.text, delta.finish
        ids += [token.id for token in delta.tokens]
        if finish is not None:
            break
    return text, ids, finish


@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_stop_string_ends_the_text_and_is_never_shown(tokenizer, size):
    one = Completion(tokenizer, Plain(), (b"END", b"never"))
    text, ids, finish = told(one, pieces(tokenizer, "EN ENEND more", size))
    assert (text, finish) == ("EN EN", "stop")
    assert tokenizer.text(ids) == "EN ENEND" and one.drawn == len(ids)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_characters_are_told_whole_and_the_end_of_the_turn_is_no_text(tokenizer, size):
    shown = "é 漢字 🙂"
    one = Completion(tokenizer, Plain())
    text, ids, finish = told(one, pieces(tokenizer, shown, size, "stop"))
    assert (text, finish) == (shown, "stop") and ids[-1] == tokenizer.end_id
    assert tokenizer.text(ids[:-1]) == shown


def test_a_character_that_is_cut_is_replaced_at_the_end(tokenizer):
    drawn = pieces(tokenizer, "a漢", 1)[:-1]
    drawn[-1] = Piece(0, drawn[-1].ids, drawn[-1].logp, drawn[-1].entropy, None, "length")
    assert told(Completion(tokenizer, Plain()), drawn)[0] == "a\N{REPLACEMENT CHARACTER}"


def test_offsets_count_characters(tokenizer):
    one = Completion(tokenizer, Plain())
    (piece,) = pieces(tokenizer, "漢a", 50)
    one.add(piece)
    delta = one.read()
    offset = {token.data: token.offset for token in delta.tokens}
    assert delta.text[offset[b"a"]] == "a"


PARTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>", "\n", " ", "a", "é",
         '{"name": "f", ', '"arguments": {"a": 1}}', '"parameters": {}}', "[", "]", ";", "<|python_tag|>", "{"]  # fmt: skip


DEEP = f'{{"a": {"[" * 40}{"]" * 40}}}'
UNREAD = ['{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": 007}', '{"a": "\\d"}', DEEP]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_what_has_the_form_of_a_call_and_is_none_is_text(name, size):
    """Word for word, between sound calls that are told as calls."""
    key = "arguments" if name == "hermes" else "parameters"
    one = f'{{"name": "g", "{key}": {{}}}}'
    told = [f'{{"name": "f", "{key}": {arguments}}}' for arguments in UNREAD]
    told.append('{"name": "f", "parameters": {}, "arguments": {}}')
    if name == "hermes":
        told += [f"{one}\n{one}", f"{one}, {one}"]
    if name == "toolrl":
        told += [f"{one} {one}", f"{one}, {one}"]
    if name != "llama3":
        told += [f"{one} done", f"ok {one}", f"{one}}}", f"[{one}", f"{one}\n[", f"{told[0]} {one}"]

    def block(text: str) -> str:
        return text if name == "llama3" else f"<tool_call>\n{text}\n</tool_call>"

    for text in told:
        for whole, calls in ((block(text), ()), (f"{block(one)}\n{block(text)}", (G,))):
            assert joined(in_parts(Turn(TEMPLATES[name], None), whole, size)) == ("", text, calls)


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(PARTS), max_size=14),
    st.sampled_from(sorted(TEMPLATES)),
    st.integers(1, 9),
)
def test_nothing_is_lost_in_parts(parts, name, size):
    """Whatever is written: a part may be read otherwise once more is known, but all letters and calls of the end are told."""
    text = "".join(parts)
    data = text.encode()
    whole = Turn(TEMPLATES[name], None).read(data, len(data), True)
    thought, said, calls = joined(in_parts(Turn(TEMPLATES[name], None), text, size))
    assert len(calls) >= len(whole.calls)
    # a thought that begins late, or ends twice, is seen late
    late = "<think>" in text[1:] or text.count("</think>") > text.startswith("<think>")
    if not late:
        assert (thought, said, calls) == (whole.thought, whole.text, tuple(whole.calls))
