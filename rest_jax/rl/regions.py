"""Region of every generated token, from the byte spans of the parsed completions.

In: one `Answer` a response and the number of bytes of each generated id. Out: int8 region ids.
Offsets come from the ids themselves, so nothing is tokenised again. A token belongs to the region
that holds most of its bytes; on a tie to the more specific one. Vectorised over the batch:
Python touches answers, never tokens. Host code (NumPy).
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int8

from rest_jax.tool_calls import NUM_REGIONS, Answer, Region

# Most specific first: the order in which ties are broken.
PRIORITY = np.array(
    [
        Region.NAME,
        Region.PARAM,
        Region.THINK,
        Region.RESPONSE,
        Region.TAG,
        Region.SCAFFOLD,
        Region.OTHER,
    ],
    np.int8,
)


def label_tokens(
    answers: Sequence[Answer],
    token_bytes: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    has_stop: Bool[np.ndarray, " B"],
) -> Int8[np.ndarray, "B T"]:
    """int8 [B, T] region ids.

    answers: the parse of each row's text; token_bytes: bytes of each id; lengths: tokens of text a
    row, the end-of-turn token not counted; has_stop: whether an end-of-turn token follows the text
    (it is TAG). All after that is NONE. A token without bytes takes the region at its offset, OTHER
    at the end of the text. ValueError when a row's token bytes and its answer's bytes differ in
    number, or a length does not fit.
    """
    _check(answers, token_bytes, lengths, has_stop)
    region = np.zeros(token_bytes.shape, np.int8)
    is_text = np.arange(token_bytes.shape[1]) < lengths[:, None]
    text_bytes = np.where(is_text, token_bytes, 0).sum(axis=1, dtype=np.int64)
    answer_bytes = np.array([a.span_ends[-1] if len(a.span_ends) else 0 for a in answers], np.int64)
    if (wrong := np.flatnonzero(text_bytes != answer_bytes)).size:
        row = wrong[0]
        raise ValueError(
            f"label_tokens: row {row} has {text_bytes[row]} bytes of tokens, {answer_bytes[row]} in its answer"
        )
    region[is_text] = _label_text(answers, token_bytes[is_text], lengths, answer_bytes)
    rows = np.flatnonzero(has_stop)
    region[rows, lengths[rows]] = Region.TAG
    return region


def mark_phrases(
    texts: Sequence[bytes], token_bytes: Int[np.ndarray, "B T"], phrases: Sequence[str]
) -> Bool[np.ndarray, "B T"]:
    """bool [B, T]: the tokens that hold a byte of one of the phrases, as complete words, in small letters or capitals, with any
    white space between their words.

    texts: the bytes of each row's tokens of text; token_bytes: bytes of each id. ValueError for a phrase without a word.
    """
    words = [r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases]
    if not all(words):
        raise ValueError(f"mark_phrases: {list(phrases)}: a phrase is blank")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
    marked = np.zeros(token_bytes.shape, bool)
    end = np.cumsum(token_bytes, axis=1, dtype=np.int64)
    for row, text in enumerate(texts):
        # As characters, since a byte does not tell whether it is part of a letter; what is no UTF-8 borders on any word.
        said = text.decode("utf-8", "surrogateescape")
        for found in pattern.finditer(said):
            begin = _size(said[: found.start()])
            first = np.searchsorted(end[row], begin, side="right")
            last = np.searchsorted(end[row], begin + _size(found[0]) - 1, side="right")
            marked[row, first : last + 1] = True
    return marked


def _size(text: str) -> int:
    """In bytes, of a part of a text that was decoded."""
    return len(text.encode("utf-8", "surrogateescape"))


def _label_text(
    answers: Sequence[Answer],
    size: Int[np.ndarray, " N"],
    lengths: Int[np.ndarray, " B"],
    answer_bytes: Int[np.ndarray, " B"],
) -> Int8[np.ndarray, " N"]:
    """Regions of the text tokens of all rows in one line; offsets count from the first byte of the
    first row.
    """
    row_end = np.cumsum(answer_bytes)
    spans = np.array([len(a.span_ends) for a in answers], np.int64)
    span_end = np.concatenate([np.zeros(0, np.int64), *(a.span_ends for a in answers)])
    span_end = span_end + np.repeat(row_end - answer_bytes, spans)
    span_region = np.concatenate([np.zeros(0, np.int8), *(a.span_regions for a in answers)])
    end = np.cumsum(size, dtype=np.int64)
    start = end - size
    first = np.searchsorted(span_end, start, side="right")
    last = np.searchsorted(span_end, np.maximum(end - 1, start), side="right")
    # Only a token without bytes at the end of a row can look beyond its row, or beyond the last span.
    outside = start >= np.repeat(row_end, lengths)
    region = np.append(span_region, np.int8(Region.OTHER))[
        np.where(outside, len(span_region), first)
    ]
    (mixed,) = np.nonzero(first != last)
    if mixed.size:
        region[mixed] = _majority(
            start[mixed], end[mixed], first[mixed], last[mixed], span_end, span_region
        )
    return region


def _majority(
    start: Int[np.ndarray, " M"],
    end: Int[np.ndarray, " M"],
    first: Int[np.ndarray, " M"],
    last: Int[np.ndarray, " M"],
    span_end: Int[np.ndarray, " S"],
    span_region: Int8[np.ndarray, " S"],
) -> Int8[np.ndarray, " M"]:
    """Region with the most bytes of each token, which lies in the spans first..last (inclusive)."""
    count = last - first + 1
    token = np.repeat(np.arange(len(start)), count)
    span = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[token]
    span_start = np.where(span > 0, span_end[span - 1], 0)
    overlap = np.minimum(end[token], span_end[span]) - np.maximum(start[token], span_start)
    cell = token * NUM_REGIONS + span_region[span]
    held = np.bincount(cell, weights=overlap, minlength=len(start) * NUM_REGIONS).reshape(
        -1, NUM_REGIONS
    )
    return PRIORITY[np.argmax(held[:, PRIORITY], axis=1)]


def _check(answers, token_bytes, lengths, has_stop) -> None:
    rows, width = token_bytes.shape
    if not len(answers) == len(lengths) == len(has_stop) == rows:
        raise ValueError(
            f"label_tokens: {len(answers)} answers, {len(lengths)} lengths, {len(has_stop)} stops for {rows} rows"
        )
    if rows and (lengths.min() < 0 or (lengths + has_stop).max() > width):
        raise ValueError(
            f"label_tokens: lengths {lengths.min()} to {(lengths + has_stop).max()}, end-of-turn included, "
            f"do not fit in {width} tokens"
        )
