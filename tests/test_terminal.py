"""Fields in a terminal and in a pipe; what a terminal would obey is taken out of texts."""

import sys

import pytest

from rest_jax import cli
from rest_jax.distributed import say
from rest_jax.run.metrics import summary_table
from rest_jax.terminal import fields
from rest_jax.texts import printable

ROWS = [("model", "a [bold]name[/] " + 12 * "word "), ("writes", "\x1b[31mruns/x")]
# a colour, a bell, the cursor up (C1), a turn of direction, half a pair
HOSTILE = "a\x1b[2Jb\x07\x9b1A\u202ec\rd\ud800"
SAFE = "a[2Jb1Acd\\ud800"


def test_in_a_pipe_every_field_is_one_plain_line():
    assert fields(ROWS).splitlines() == [
        f"model   a [bold]name[/] {12 * 'word '}",
        "writes  [31mruns/x",
    ]


def test_on_a_terminal_labels_are_bold_and_texts_broken(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in {"COLUMNS": "40", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    first, second, *_, last = fields(ROWS).splitlines()
    assert first.startswith("\x1b[1mmodel") and "[bold]name[/]" in first
    assert second.startswith(8 * " " + "word") or second.startswith("\x1b[1m" + 8 * " ")
    assert "\x1b[31m" not in last and last.rstrip().endswith("\x1b[0m[31mruns/x")


@pytest.mark.parametrize("text", ["tab\tand\nline", "naïve 你好 \U0001f600", ""])
def test_plain_texts_stay(text):
    assert printable(text) == text


def test_what_is_said_in_tables_and_in_errors_is_harmless(capsys):
    say(HOSTILE)
    print(summary_table([["run"], [HOSTILE + "\nx"]]).splitlines()[-1])
    assert cli.main(["export", f"no{HOSTILE[:-1]}", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == f"{SAFE}\n{SAFE} x\n"
    assert "noa[2Jb1Acd" in err and "\x1b" not in err
