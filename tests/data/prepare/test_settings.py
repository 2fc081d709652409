"""Which files `rest-jax data prepare` may touch: its own four, none of them an input, none that is there without --overwrite."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rest_jax import cli
from rest_jax.errors import UserError
from tests.data.prepare.dialogues import (
    REPOSITORY,
    dialogue,
    files_under,
    names,
    run,
    write,
)

BESIDE = ["out.jsonl", "out.eval.jsonl", "out.jsonl.rejected.jsonl", "out.jsonl.summary.json"]


@pytest.fixture
def items(tmp_path) -> str:
    return write(tmp_path / "in.jsonl", [dialogue(i) for i in range(3)])


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("held_out", [0.0, 0.5])
def test_a_file_that_is_there_is_replaced_on_request_only(tmp_path, items, name, held_out):
    there = tmp_path / name
    there.write_text("of someone else")
    with pytest.raises(UserError, match=f"data {there}: exists; --overwrite replaces"):
        run(items, tmp_path / "out.jsonl", held_out=held_out)
    assert there.read_text() == "of someone else" and names(tmp_path) == sorted(["in.jsonl", name])
    run(items, tmp_path / "out.jsonl", overwrite=True)
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "out.jsonl.summary.json"]


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("linked", [False, True])
def test_an_input_is_never_replaced_or_removed(tmp_path, items, name, linked):
    there = tmp_path / name
    write(there, [dialogue(7)])
    given = tmp_path / "link.jsonl" if linked else there
    if linked:
        given.symlink_to(there)
    before = there.read_bytes()
    with pytest.raises(UserError, match=f"data {there}: is an input too; choose another OUT"):
        run((items, str(given)), tmp_path / "out.jsonl", overwrite=True)
    assert there.read_bytes() == before


@pytest.mark.parametrize("name", BESIDE)
def test_a_folder_in_the_way_is_refused(tmp_path, items, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: is a folder"):
        run(items, tmp_path / "out.jsonl", overwrite=True)


def test_a_terminated_process_leaves_nothing(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "made" / "out.jsonl"
    write(source, [dialogue(i) for i in range(20_000)])
    command = [sys.executable, "-m", "rest_jax", "data", "prepare", "openai", str(source), str(out)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    end = time.monotonic() + 60
    while not any(out.parent.glob("out.jsonl.*.partial")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert files_under(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["s3://bucket/out.jsonl"], "data s3://bucket/out.jsonl: a local path is needed here"),
        (
            ["out.jsonl", "--irrelevance-response", "no"],
            "--irrelevance-response: needs --irrelevance",
        ),
    ],
    ids=["a URL", "a response to no records"],
)
def test_words_that_would_do_nothing_are_refused(tmp_path, items, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "prepare", "openai", items, *words]) == 2
    assert said in capsys.readouterr().err
    assert names(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    "setting", ["data.train=x", "model.source=x", "seed=3", "data.template.x=1"]
)
def test_only_what_shapes_the_text_can_be_set(tmp_path, items, capsys, setting):
    argv = ["data", "prepare", "openai", items, str(tmp_path / "out.jsonl"), setting]
    assert cli.main(argv) == 2
    key = setting.partition("=")[0]
    assert capsys.readouterr().err == (
        f"rest-jax: error: {setting}: {key} changes nothing here; "
        "known: data.template, data.brief_prompt\n"
    )
    assert names(tmp_path) == ["in.jsonl"]
