"""Loaders: the order, its resumption, the padding, the dropping of long records."""

import itertools
import json
import re

import numpy as np
import pytest

from rest_jax.config import DataConfig
from rest_jax.data.files import read_records
from rest_jax.data.loader import Loader, TargetBatch, bucketed, pad
from rest_jax.data.synthetic import world as synthetic
from rest_jax.data.tokenize import (
    Encoder,
    Prepared,
    load_split,
    prepare,
    prepare_supervised,
)
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import TEMPLATES
from rest_jax.types import PromptBatch
from tests.data.writing import write_records
from tools.tiny_tokenizer import train_tokenizer

TEMPLATE = TEMPLATES["toolrl"]
CFG = DataConfig(brief_prompt=True)
SIZE = 10


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [
        m["content"]
        for r in synthetic.world("train", 0, 200)
        for m in r.prompt_messages(TEMPLATE, True)
    ]
    train_tokenizer(texts, 600, folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def prepared(tokenizer) -> Prepared:
    return prepare(synthetic.world("train", 0, SIZE), tokenizer, TEMPLATE, CFG)


def _rows(loader, count=None):
    return [batch.row.tolist() for batch, _ in itertools.islice(loader, count)]


def _loader(prepared, cfg=CFG, seed=0, **options):
    options = {"batch": 3, "num_steps": 20} | options
    return Loader(prepared, PromptBatch, seed=seed, pad_id=0, cfg=cfg, **options)


def test_an_epoch_sees_each_record_once_in_an_order_of_its_own(prepared):
    loader = _loader(prepared, batch=5)
    assert loader.batches_per_epoch == 2
    rows = np.array(_rows(loader, 6)).reshape(3, SIZE)
    for epoch, seen in enumerate(rows):
        assert sorted(seen) == list(range(epoch * SIZE, (epoch + 1) * SIZE))
    orders = {tuple(seen % SIZE) for seen in rows}
    assert len(orders) == 3


def test_the_last_incomplete_batch_of_an_epoch_is_dropped(prepared):
    loader = _loader(prepared, batch=4, num_steps=5)
    rows = _rows(loader)
    assert len(rows) == 5 and loader.batches_per_epoch == 2
    assert [row[0] // SIZE for row in rows] == [0, 0, 1, 1, 2]


def test_the_seed_decides_the_order(prepared):
    assert _rows(_loader(prepared), 6) == _rows(_loader(prepared), 6)
    assert _rows(_loader(prepared), 6) != _rows(_loader(prepared, seed=1), 6)
    plain = _rows(_loader(prepared, CFG.model_copy(update={"shuffle": False})), 4)
    assert plain == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [10, 11, 12]]


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
def test_resumes_where_it_stopped(prepared, done):
    loader = _loader(prepared, num_steps=9)
    for _ in range(done):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    rest = _rows(loader)
    again = _loader(prepared, num_steps=9)
    again.set_state(state)
    assert _rows(again) == rest and len(rest) == 9 - done


@pytest.mark.parametrize(("key", "other"), [("batch", {"batch": 2}), ("seed", {"seed": 9})])
def test_a_state_of_another_run_is_refused(prepared, key, other):
    state = _loader(prepared).get_state()
    with pytest.raises(
        ValueError, match=f"saved with {key} {state[key]}, this run has {key} {other[key]}"
    ):
        _loader(prepared, **other).set_state(state)


def test_batches_hold_their_records(prepared, tokenizer):
    batch, records = next(_loader(prepared))
    assert batch.tokens.dtype == batch.length.dtype == batch.row.dtype == np.int32
    assert batch.tokens.shape[1] % 64 == 0 and batch.tokens.shape[1] == bucketed(prepared.prompts)
    for tokens, length, row, record in zip(
        batch.tokens, batch.length, batch.row, records, strict=True
    ):
        assert record == prepared.records[row]
        prompt = tokenizer.encode_prompt(record.prompt_messages(TEMPLATE, True))
        assert np.array_equal(tokens[:length], prompt)
        assert (tokens[length:] == 0).all()


HALVES = (np.array([0, 1]), np.array([2, 3]))


def test_processes_take_their_rows_of_the_global_batch(prepared):
    whole = _rows(_loader(prepared, batch=4), 3)
    parts = [_rows(_loader(prepared, batch=4, rows=rows), 3) for rows in HALVES]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    # not the neighbouring ones: shards may lie in any order
    odd = _rows(_loader(prepared, batch=4, rows=np.array([1, 3])), 3)
    assert odd == [batch[1::2] for batch in whole]


def test_a_position_holds_for_any_number_of_processes(prepared):
    loader = _loader(prepared, batch=4)
    _rows(loader, 3)  # into the second epoch
    state = json.loads(json.dumps(loader.get_state()))
    rest = _rows(loader, 4)
    parts = []
    for rows in HALVES:
        again = _loader(prepared, batch=4, rows=rows)
        again.set_state(state)
        parts.append(_rows(again, 4))
    assert [a + b for a, b in zip(*parts, strict=True)] == rest


def test_fewer_records_than_a_batch(prepared):
    with pytest.raises(ValueError, match="10 usable records, fewer than one batch of 11"):
        _loader(prepared, batch=11)


def test_row_ids_never_pass_32_bits(prepared):
    with pytest.raises(ValueError, match="row ids would pass"):
        _loader(prepared, num_steps=2**31)


def test_long_prompts_are_dropped_and_counted(tokenizer):
    records = synthetic.world("train", 0, 40)
    lengths = [len(tokenizer.encode_prompt(r.prompt_messages(TEMPLATE, True))) for r in records]
    limit = int(np.median(lengths))
    made = prepare(
        records, tokenizer, TEMPLATE, CFG.model_copy(update={"max_prompt_tokens": limit})
    )
    assert made.records == [r for r, n in zip(records, lengths, strict=True) if n <= limit]
    assert made.dropped == sum(n > limit for n in lengths) > 0
    assert max(map(len, made.prompts)) <= limit
    assert f"{made.dropped} dropped (longer than {limit} tokens; data.max_" in made.summary()
    (key, value) = re.findall(r"; ([\w.]+)=(\d+) keeps \d+%\)", made.summary())[0]
    enough = CFG.model_copy(update={key.removeprefix("data."): int(value)})
    nearly_all = prepare(records, tokenizer, TEMPLATE, enough)
    assert nearly_all.size >= 38 and "keeps" not in nearly_all.summary()
    first = f"{made.size} records of the first 40 (data.eval_limit), {made.dropped} dropped"
    assert made.summary(40, "data.eval_limit").startswith(first)
    # there were no more
    assert made.summary(41, "data.eval_limit") == made.summary()


def test_nothing_fits(tokenizer):
    cfg = CFG.model_copy(update={"max_prompt_tokens": 5})
    with pytest.raises(
        ValueError,
        match=r"max_prompt_tokens 5: every one of the 3 records is longer \(shortest: \d+ tokens\); "
        r"raise it: data\.max_prompt_tokens=\d+ keeps 100%",
    ):
        prepare(synthetic.world("train", 0, 3), tokenizer, TEMPLATE, cfg)
    with pytest.raises(ValueError, match="no records"):
        prepare([], tokenizer, TEMPLATE, CFG)


def _supervised(record, tokenizer):
    (prompt,), (target,) = Encoder(tokenizer, TEMPLATE, brief=True, supervised=True)([record])
    return prompt, target


def test_supervised_targets_end_with_the_end_of_turn(tokenizer):
    record = synthetic.world("train", 0, 1)[0]
    prompt, answer = _supervised(record, tokenizer)
    assert answer[-1] == tokenizer.end_id and answer.dtype == prompt.dtype == np.int32
    assert tokenizer.text(answer[:-1]) == TEMPLATE.render_answer(record.target)


def test_supervised_batches(tokenizer):
    records = synthetic.demonstrations("train", 0, 8)
    made = prepare_supervised(records, tokenizer, TEMPLATE, CFG, max_tokens=1000)
    loader = Loader(
        made, TargetBatch, batch=4, seed=0, pad_id=tokenizer.pad_id, cfg=CFG, num_steps=2
    )
    batch, held = next(loader)
    assert batch.prompt.shape[0] == 4 and batch.target.shape[0] == 4
    for i, record in enumerate(held):
        prompt, answer = _supervised(record, tokenizer)
        assert np.array_equal(batch.prompt[i, : batch.prompt_length[i]], prompt)
        assert np.array_equal(batch.target[i, : batch.target_length[i]], answer)
        assert record == records[batch.row[i]]


def test_supervised_records_that_are_too_long(tokenizer):
    records = synthetic.world("train", 0, 40)
    totals = [sum(map(len, _supervised(r, tokenizer))) for r in records]
    limit = int(np.median(totals))
    made = prepare_supervised(records, tokenizer, TEMPLATE, CFG, max_tokens=limit)
    assert "; sft.max_tokens=" in made.summary()
    assert made.size == sum(n <= limit for n in totals) and made.dropped == len(records) - made.size


def test_pad():
    tokens, length = pad([np.array([1, 2, 3]), np.array([4])], 5, 9)
    assert tokens.tolist() == [[1, 2, 3, 9, 9], [4, 9, 9, 9, 9]] and length.tolist() == [3, 1]


def test_splits_by_name_and_by_path(tmp_path):
    cfg = DataConfig(synthetic_size=30, synthetic_seed=2, synthetic_level="single")
    assert load_split("synthetic:train", cfg) == synthetic.world("train", 2, 30, "single")
    assert load_split("synthetic:train", cfg, limit=4) == synthetic.world("train", 2, 4, "single")
    assert load_split("synthetic:eval", cfg, limit=4) == synthetic.world("eval", 2, 4, "single")
    assert load_split("synthetic:demonstrations", cfg) == synthetic.demonstrations(
        "train", 2, 30, "single"
    )
    write_records(tmp_path / "r.jsonl", synthetic.world("eval", 0, 5))
    assert load_split(str(tmp_path / "r.jsonl"), cfg, limit=3) == synthetic.world("eval", 0, 3)
    with pytest.raises(ValueError, match="synthetic:test"):
        load_split("synthetic:test", cfg)


def test_rows_without_thoughts_are_no_supervised_data(tokenizer, tmp_path):
    import pyarrow.parquet

    world = synthetic.world("train", 0, 3)
    rows = [
        {
            "data_source": "rlla",
            "prompt": r.prompt_messages(TEMPLATE),
            "reward_model": {"ground_truth": TEMPLATE.render_answer(r.target), "style": "rule"},
        }
        for r in world
    ]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    records = read_records(path)
    assert [r.target.calls for r in records] == [r.target.calls for r in world]
    with pytest.raises(
        UserError, match=r"placeholders, are no supervised data; use rlla_sft\.json"
    ):
        prepare_supervised(records, tokenizer, TEMPLATE, CFG, max_tokens=10_000)
