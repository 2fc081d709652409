"""metrics.jsonl: names from the table, exact numbers, stable order, exact truncation; tables."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.run import checkpoint, folder, fork, metrics, record
from rest_jax.run.metrics import (
    DIGESTS_FILE,
    FILES,
    METRICS,
    METRICS_FILE,
    REGION_NAMES,
    SAMPLES_FILE,
    TOKENS_FILE,
    MetricsWriter,
    read_lines,
)
from rest_jax.tool_calls import Region


def test_table_covers_every_region_and_every_entry_says_what_it_is():
    assert len(REGION_NAMES) == len(Region) - 1
    for name in REGION_NAMES:
        for kind in ("entropy", "gini", "weight", "weight_share", "count"):
            assert f"region/{name}/{kind}" in METRICS
    assert all(metric.meaning for metric in METRICS.values())


def test_lines_are_in_table_order_whatever_the_order_given(tmp_run):
    values = {"time/step": 1.5, "eval/exact": 0.25, "reward/mean": -1.0}
    with_writer(tmp_run, lambda w: (w.write(1, values), w.write(1, dict(reversed(values.items())))))
    first, second = (tmp_run / METRICS_FILE).read_text().splitlines()
    assert (
        first == second == '{"step": 1, "reward/mean": -1.0, "eval/exact": 0.25, "time/step": 1.5}'
    )


def test_floats_come_back_bit_for_bit_from_any_scalar(tmp_run):
    third = np.float32(1) / np.float32(3)
    scalars = [0.1 + 0.2, third, jnp.asarray(third), np.float64(1e-310), np.int32(7), 3]
    with_writer(tmp_run, lambda w: [w.write(i, {"reward/mean": x}) for i, x in enumerate(scalars)])
    found = [line["reward/mean"] for line in read_lines(tmp_run / METRICS_FILE)]
    assert found == [0.1 + 0.2, float(third), float(third), 1e-310, 7.0, 3]


def test_nan_and_infinities_are_null_and_the_line_is_json(tmp_run):
    values = {"reward/mean": math.nan, "reward/max": math.inf, "reward/min": jnp.float32(-math.inf)}
    with_writer(tmp_run, lambda w: w.write(1, values))
    (line,) = (tmp_run / METRICS_FILE).read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "reward/mean": None, "reward/min": None, "reward/max": None}


def test_unknown_name_is_refused_with_the_nearest_and_nothing_is_written(tmp_run):
    with pytest.raises(ValueError, match=r"'reward/meen' .*nearest: reward/mean"):
        with_writer(tmp_run, lambda w: w.write(1, {"reward/meen": 1.0}))
    assert (tmp_run / METRICS_FILE).read_text() == ""


def test_parts_of_a_plugin_are_written_last(tmp_run):
    values = {"eval/part/b-1": 1.0, "reward/part/a": 2.0, "time/step": 3.0, "reward/mean": 4.0}
    with_writer(tmp_run, lambda w: w.write(1, values))
    (line,) = read_lines(tmp_run / METRICS_FILE)
    assert list(line) == ["step", "reward/mean", "time/step", "eval/part/b-1", "reward/part/a"]
    with pytest.raises(ValueError, match="'reward/part/a b'"):
        with_writer(tmp_run, lambda w: w.write(1, {"reward/part/a b": 1.0}))


def test_truncate_drops_later_steps_and_half_lines_of_all_files(tmp_run):
    writer = MetricsWriter(tmp_run)
    for step in range(4):
        samples = [{"text": f"é{step}"}, {"text": "\ud800"}]
        writer.write(step, {"reward/mean": step / 3}, samples, {"tokens": "AA=="}, {"ids": "a"})
        writer.write_launch(step, {"command": "train"})
    writer.close()
    kept = {name: (tmp_run / name).read_bytes().splitlines(keepends=True) for name in FILES}
    for name in kept:
        with (tmp_run / name).open("ab") as file:
            file.write(b'{"step": 1, "rew')
    writer = MetricsWriter(tmp_run)
    writer.truncate_after(2)
    writer.write(9, {"reward/mean": 1.0})
    writer.close()
    lines = (tmp_run / METRICS_FILE).read_bytes().splitlines(keepends=True)
    assert lines[:-1] == kept[METRICS_FILE][:3]
    assert json.loads(lines[-1])["step"] == 9
    assert (tmp_run / SAMPLES_FILE).read_bytes().splitlines(keepends=True) == kept[SAMPLES_FILE][:6]
    assert (tmp_run / TOKENS_FILE).read_bytes().splitlines(keepends=True) == kept[TOKENS_FILE][:3]
    # how a process continues behind a step is no later than the step
    assert (tmp_run / DIGESTS_FILE).read_bytes().splitlines(keepends=True) == kept[DIGESTS_FILE][:6]
    assert not list(tmp_run.glob("*.partial"))


def test_a_half_line_is_dropped_even_when_it_is_whole_json(tmp_run):
    (tmp_run / METRICS_FILE).write_text('{"step": 1}\n{"step": 2}')
    with_writer(tmp_run, lambda w: w.truncate_after(5))
    assert (tmp_run / METRICS_FILE).read_text() == '{"step": 1}\n'


def test_reading_leaves_out_the_half_line_and_names_a_broken_one(tmp_run):
    path = tmp_run / METRICS_FILE
    path.write_text('{"step": 1}\n{"st')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_lines(path)
    with pytest.raises(UserError, match="no such file"):
        read_lines(tmp_run / "other.jsonl")
    assert read_lines(tmp_run / "other.jsonl", missing_ok=True) == []


@pytest.mark.parametrize(
    "value", ['"12"', "NaN", "-Infinity", "1e400", "-1e200", "1" * 400, "[1.0]"]
)
def test_a_metric_that_no_run_writes_is_named_with_its_line(tmp_run, value):
    path = tmp_run / METRICS_FILE
    path.write_text(f'{{"step": 1, "reward/max": null}}\n{{"step": 2, "reward/mean": {value}}}\n')
    with pytest.raises(UserError, match=r"line 2: reward/mean is .* not a finite number") as stop:
        read_lines(path)
    assert len(str(stop.value)) < 400 and "\n" not in str(stop.value)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": true}', '{"step": %s}' % ("9" * 400)])
def test_a_line_without_a_step_that_can_be_is_named(tmp_run, line):
    path = tmp_run / METRICS_FILE
    path.write_text(f'{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 1: not a JSON object with a step"):
        read_lines(path)
    with_writer(tmp_run, lambda w: w.truncate_after(1))
    assert path.read_text() == ""
    path.write_text(f'{line}\n{{"step": 1}}\n')
    with_writer(tmp_run, lambda w: w.truncate_after(1))
    assert path.read_text() == f'{line}\n{{"step": 1}}\n'  # one that was synced: it is told


@pytest.mark.parametrize("behind", ["", '{"step": 4}\n', '{"step": 4}\n{"st'])
def test_a_page_that_was_never_written_is_cut_with_what_was_to_go(tmp_run, behind):
    """As a power cut leaves it: a part of a file in zeros, and lines behind it."""
    for name in FILES:
        (tmp_run / name).write_text('{"step": 1}\n{"step": 2}\n' + "\0" * 40 + f": 1.0}}\n{behind}")
    with_writer(tmp_run, lambda w: w.truncate_after(2))
    for name in FILES:
        assert (tmp_run / name).read_text() == '{"step": 1}\n{"step": 2}\n'


def test_summary_table_aligns_and_refuses_ragged_rows():
    rows = [["name", "first", "last"], ["long name", 0.123456, None], ["b", 12, 1e-9]]
    assert metrics.summary_table(rows).splitlines() == [
        "name        first   last",
        "---------  ------  -----",
        "long name  0.1235      -",
        "b              12  1e-09",
    ]
    with pytest.raises(ValueError, match="longer"):
        metrics.summary_table([["a"], ["b", "c"]])


def with_writer(run, act):
    writer = MetricsWriter(run)
    try:
        act(writer)
    finally:
        writer.close()


def test_the_files_of_a_store_are_put_whole_at_a_sync_and_continued(memory_store, monkeypatch):
    run, put = as_path(memory_store) / "run", []
    monkeypatch.setattr(
        metrics,
        "upload",
        lambda f, url, plain=metrics.upload: (put.append(url.name), plain(f, url)),
    )
    writer = MetricsWriter(run)
    writer.write(1, {"reward/mean": 0.5}, [{"text": "a"}], {"tokens": "AA=="})
    assert not (run / METRICS_FILE).exists()
    writer.sync()
    writer.write(2, {"reward/mean": 1.5})
    assert [line["step"] for line in read_lines(run / METRICS_FILE)] == [1]
    writer.close()
    assert [line["step"] for line in read_lines(run / METRICS_FILE)] == [1, 2]
    assert put == [
        DIGESTS_FILE,
        METRICS_FILE,
        SAMPLES_FILE,
        TOKENS_FILE,
        METRICS_FILE,
    ]  # what has not changed is not put again
    again = MetricsWriter(run)
    again.truncate_after(1)
    again.write(2, {"reward/mean": 2.5}, [{"text": "b"}])
    again.close()
    assert [line["reward/mean"] for line in read_lines(run / METRICS_FILE)] == [0.5, 2.5]
    assert [line["text"] for line in read_lines(run / SAMPLES_FILE)] == ["a", "b"]
    with pytest.raises(UserError, match=r"s3://bucket/none/metrics\.jsonl: no such file"):
        read_lines(f"{memory_store}/none/{METRICS_FILE}")


def test_all_that_a_run_reads_again_is_no_output():
    names = {path.name for path in metrics.run_files("runs/x")}
    assert names > {fork.FILE, record.CERTIFICATE_FILE, folder.MODEL_FOLDER, checkpoint.FOLDER}
