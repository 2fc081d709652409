"""Texts of strangers do no harm in a terminal, a table or a page."""

import csv
import io
import json
import subprocess
import sys

import pytest

from rest_jax import cli
from rest_jax.analysis import page
from rest_jax.config import dump, from_overrides
from rest_jax.run.metrics import MetricsWriter
from rest_jax.run.progress import Progress
from rest_jax.texts import csv_cell, one_line, print_text, printable, warn
from tests.runs import environment

HARMFUL = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;title\x07",
    "c1": "\x9b2J",
    "carriage": "mine\rtheirs",
    "surrogate": "\ud800",
    "delete": "\x7f\x08",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_terminal_gets_no_control_character_and_can_write_it(name, capsys):
    print_text(f"a\tb\n{HARMFUL[name]}é")
    out = capsys.readouterr().out
    assert out.startswith("a\tb\n") and out.endswith("é\n")
    assert all(c in "\t\n" or c.isprintable() for c in out)
    out.encode()


@pytest.mark.parametrize("name", HARMFUL)
def test_an_error_and_a_warning_that_quote_it_are_harmless(name, tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    text = HARMFUL[name]
    call = {"id": "1", "type": "function", "function": {"name": text, "arguments": {}}}
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": text, "tool_calls": [call]}]}
    file.write_text(json.dumps(chat) + "\n")
    assert cli.main(["data", "prepare", "openai", str(file), str(tmp_path / "out.jsonl")]) == 2
    assert cli.main(["data", "inspect", f"{file}{text.encode(errors='replace').decode()}"]) == 2
    said = capsys.readouterr()
    # a progress bar has carriage returns of its own
    assert "rest-jax: error: " in said.err and text not in said.out + said.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("storage postgresql://me:p@ss@host:1/d: no", "storage postgresql://me:***@host:1/d: no"),
        ("https://token@hub.example/x", "https://***@hub.example/x"),
        ("redis://:secret@host", "redis://:***@host"),
        ("'unknown url type: h:80/?write_token=secret'", "'unknown url type: h:80/?write_token=***'"),
        ("http://h/p?a=1&key=s%20e; say so", "http://h/p?a=***&key=*** say so"),
        ("s3://bucket/a@b: no such user: me@host?", "s3://bucket/a@b: no such user: me@host?"),
        ("first\nsecond\x1b[2J", "first second[2J"),
    ],
)  # fmt: skip
def test_errors_and_warnings_are_one_line_without_secrets(text, shown, capsys):
    assert one_line(text) == shown
    warn(text)
    assert capsys.readouterr().err == f"rest-jax: warning: {shown}\n"


def test_a_progress_line_is_harmless():
    file = io.StringIO()
    Progress(1, file=file).message("\x1b[2Jgone")
    assert file.getvalue() == "[2Jgone\n"


def test_a_spreadsheet_calculates_no_text():
    for text in ("=1+1", "+1", "-1", "@a", "\t=1", "\x1b=1"):
        assert csv_cell(text)[0] == "'"
    for value in (-1.5, 3, None, "a=1", "run-1"):
        assert csv_cell(value) == value


def test_a_run_in_a_folder_with_a_harmful_name(tmp_path):
    run = tmp_path / "=HYPERLINK(1)<script>"
    run.mkdir()
    (run / "config.yaml").write_text(dump(from_overrides({"name": "x", "model": {"source": "m"}})))
    writer = MetricsWriter(run)
    writer.write(1, {"reward/mean": 0.5})
    writer.close()
    path = page.write_page([str(run)])
    rows = list(csv.reader(path.with_suffix(".csv").read_text().splitlines()))
    assert rows[1][0] == "'=HYPERLINK(1)<script>"
    assert "(1)<script>" not in path.read_text()


def test_texts_in_a_page_end_no_element():
    text = page.embedded({"a": "</script><script>alert(1)</script><!--\u2028\ud800"})
    assert not set("<>&\u2028\ud800") & set(text)
    assert json.loads(text)["a"].startswith("</script>")


@pytest.mark.slow
def test_a_stream_that_is_not_utf_8_takes_them_too():
    words = ["config", "show", "scale/tiny", "method/rest", "data.train=é"]
    done = subprocess.run(
        [sys.executable, "-m", "rest_jax", *words],
        env=environment() | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert rb"train: \xe9 " in done.stdout
    assert printable("é") == "é"
