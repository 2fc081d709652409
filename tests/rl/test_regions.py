"""Token regions against a loop over tokens and bytes, and their properties."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rest_jax.rl.regions import PRIORITY, label_tokens, mark_phrases
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Answer, Region


def an_answer(spans) -> Answer:
    """An answer of (length, region) spans."""
    ends = np.cumsum([n for n, _ in spans], dtype=np.int64) if spans else np.zeros(0, np.int64)
    return Answer((), 0, None, None, (), ends, np.array([r for _, r in spans], np.int8))


def oracle(answer: Answer, sizes, has_stop: bool, width: int) -> list[int]:
    """Region of each token, by counting its bytes one by one."""
    of_byte = np.repeat(answer.span_regions, np.diff(answer.span_ends, prepend=0)).tolist()
    out, at = [], 0
    for size in sizes:
        held = of_byte[at : at + size]
        if size == 0:
            out.append(of_byte[at] if at < len(of_byte) else Region.OTHER)
        else:
            out.append(max(PRIORITY.tolist(), key=held.count))  # the first of equals, as listed
        at += size
    return out + [Region.TAG] * has_stop + [Region.NONE] * (width - len(sizes) - has_stop)


@st.composite
def rows(draw):
    """(answer, token sizes, has_stop) whose bytes agree."""
    spans = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), max_size=8))
    left, sizes = sum(n for n, _ in spans), []
    while left:
        sizes.append(draw(st.integers(0, min(left, 7))))
        left -= sizes[-1]
    sizes += draw(st.lists(st.just(0), max_size=2))
    return an_answer(spans), sizes, draw(st.booleans())


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(rows(), min_size=1, max_size=5), st.integers(0, 3))
def test_labels_equal_a_loop_over_bytes(batch, slack):
    width = max(len(sizes) + stop for _, sizes, stop in batch) + slack
    token_bytes = np.full((len(batch), width), 3, np.int32)  # what follows the text must not matter
    for i, (_, sizes, _) in enumerate(batch):
        token_bytes[i, : len(sizes)] = sizes
    lengths = np.array([len(sizes) for _, sizes, _ in batch], np.int32)
    stops = np.array([stop for *_, stop in batch])
    found = label_tokens([a for a, *_ in batch], token_bytes, lengths, stops)
    assert found.dtype == np.int8
    assert found.tolist() == [oracle(a, sizes, stop, width) for a, sizes, stop in batch]


def test_every_region_has_its_priority():
    order = [
        Region.NAME,
        Region.PARAM,
        Region.THINK,
        Region.RESPONSE,
        Region.TAG,
        Region.SCAFFOLD,
        Region.OTHER,
    ]
    assert PRIORITY.tolist() == order


@pytest.mark.parametrize("first", range(len(PRIORITY)))
def test_ties_go_to_the_more_specific_region(first):
    for second in range(first + 1, len(PRIORITY)):
        pair = [(2, PRIORITY[second]), (2, PRIORITY[first])]
        found = label_tokens([an_answer(pair)], np.array([[4]]), np.array([1]), np.array([False]))
        assert found.tolist() == [[PRIORITY[first]]]


def test_bytes_of_one_region_in_two_spans_are_added():
    answer = an_answer([(2, Region.SCAFFOLD), (3, Region.NAME), (2, Region.SCAFFOLD)])
    found = label_tokens([answer], np.array([[7]]), np.array([1]), np.array([False]))
    assert found.tolist() == [[Region.SCAFFOLD]]


def test_finer_tokens_of_a_real_answer_cover_each_name_whole():
    calls = b'{"name": "first_tool", "parameters": {}}\n{"name": "b", "parameters": {}}'
    text = b"<think> t </think>\n<tool_call>\n" + calls + b"\n</tool_call>"
    answer = TEMPLATES["toolrl"].parse(text)
    found = label_tokens(
        [answer], np.ones((1, len(text)), np.int32), np.array([len(text)]), np.array([False])
    )
    names = bytes(b for b, r in zip(text, found[0], strict=True) if r == Region.NAME)
    assert names == b"first_toolb"


def test_no_rows_and_empty_rows():
    none = np.zeros((0, 4), np.int32)
    assert label_tokens([], none, none[:, 0], np.zeros(0, bool)).shape == (0, 4)
    found = label_tokens(
        [an_answer([])], np.ones((1, 3), np.int32), np.array([0]), np.array([True])
    )
    assert found.tolist() == [[Region.TAG, 0, 0]]


def test_bytes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="row 1 has 5 bytes of tokens, 4 in its answer"):
        label_tokens(
            [an_answer([(5, 1)]), an_answer([(4, 1)])],
            np.array([[5], [5]]),
            np.array([1, 1]),
            np.array([False, False]),
        )


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit in 1 tokens"):
        label_tokens([an_answer([(5, 1)])], np.array([[5]]), np.array([1]), np.array([True]))
    with pytest.raises(ValueError, match="2 answers, 1 lengths"):
        label_tokens([an_answer([])] * 2, np.ones((1, 1), int), np.array([0]), np.array([False]))


@pytest.mark.parametrize("size", [1, 3, 40])
def test_phrases_mark_the_tokens_that_hold_a_byte_of_them(size):
    """As complete words, in any case, over any white space, also behind characters of several bytes."""
    texts = ["é Let  me\nSee: outlet me see", "let me seem", "so. (We can use it) we can use", ""]
    data = [text.encode() for text in texts]
    rows = [[len(x[i : i + size]) for i in range(0, len(x), size)] for x in data]
    width = max(map(len, rows)) + 1
    token_bytes = np.array(
        [row + [9] * (width - len(row)) for row in rows]
    )  # padding has bytes, too
    found = mark_phrases(data, token_bytes, ["let me see", "we can use"])
    spans = [["Let  me\nSee"], [], ["We can use", "we can use"], []]
    for row, (text, marked) in enumerate(zip(data, spans, strict=True)):
        expected, at = np.zeros(width, bool), 0
        for phrase in marked:
            at = text.index(phrase.encode(), at)
            expected[at // size : (at + len(phrase) - 1) // size + 1] = True
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize(
    ("text", "phrase", "marked"),
    [
        ("größe", "e", ""),
        ("größe", "gr", ""),
        ("größe", "größe", "größe"),
        ("so “let me see” so", "let me see", "let me see"),
        ("so—na ja", "na\tja", "na ja"),
    ],
    ids=ascii,
)
def test_a_letter_of_several_bytes_is_no_border_of_a_word(text, phrase, marked):
    data, at = text.encode(), text.encode().find(marked.encode())
    found = mark_phrases([data], np.ones((1, len(data)), int), [phrase])[0]
    assert np.flatnonzero(found).tolist() == list(range(at, at + len(marked.encode())))


def test_phrases_are_found_beside_bytes_that_are_no_text():
    found = mark_phrases([b"\xc3 so \xff"], np.ones((1, 6), int), ["so"])[0]
    assert np.flatnonzero(found).tolist() == [2, 3]
    for blank in ("", " "):
        with pytest.raises(ValueError, match="a phrase is blank"):
            mark_phrases([b"so"], np.ones((1, 2), int), ["so", blank])


def test_a_phrase_is_no_pattern():
    assert (
        mark_phrases([b"a.c abc"], np.ones((1, 7), int), ["a.c"])[0].tolist()
        == [True] * 3 + [False] * 4
    )
