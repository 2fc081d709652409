"""Progress: plain lines off a terminal, one bar on it."""

import io

from rest_jax.run import progress
from rest_jax.run.progress import Progress


def test_off_a_terminal_it_prints_the_first_the_due_and_the_last_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    shown = Progress(total=10, start=4, file=file)
    for step in range(5, 11):
        now[0] += 4
        shown.update(step, "reward 0.500")
    shown.message("held out: 50 %")
    shown.close()
    lines = file.getvalue().splitlines()
    assert lines == [
        "step 5/10: reward 0.500",
        "step 8/10: reward 0.500, ETA 0:08",
        "step 10/10: reward 0.500, ETA 0:00",
        "held out: 50 %",
    ]


def test_what_is_under_way_counts_by_half(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    shown = Progress(total=40, file=file, unit="entry", at_once=16)
    for done in (1, 36, 40):
        now[0] += 90
        shown.update(done, "x")
    # 31 are left of what took 90 s for 9, then 2 of what took 180 s for 38
    assert [line.split()[-1] for line in file.getvalue().splitlines()] == ["5:10", "0:09", "0:00"]


def test_on_a_terminal_it_is_one_bar():
    file = io.StringIO()
    file.isatty = lambda: True
    shown = Progress(total=3, start=1, file=file)
    shown.update(2, "reward 0.250")
    shown.message("a line")
    shown.update(3, "reward 0.750")
    shown.close()
    text = file.getvalue()
    assert "3/3" in text and "reward 0.750" in text and "a line\n" in text


def transferred(monkeypatch, seconds, parts=4, tty=False):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    file.isatty = lambda: tty
    with progress.Transfer("convert", file) as shown:
        for _ in range(parts):
            now[0] += seconds / parts
            shown(2 * 10**9, parts * 2 * 10**9)
    return file.getvalue().splitlines()


def test_a_transfer_says_every_ten_seconds_how_fast_it_is(monkeypatch):
    assert transferred(monkeypatch, 24) == [
        "convert: 4.0/8.0 GB, 333 MB/s, ETA 0:12",
        "convert: 8.0/8.0 GB, 333 MB/s, ETA 0:00",
    ]


def test_a_short_transfer_says_nothing(monkeypatch):
    assert transferred(monkeypatch, 9) == []


def test_a_transfer_is_a_bar_on_a_terminal_after_two_seconds():
    file = io.StringIO()
    file.isatty = lambda: True
    with progress.Transfer("export", file) as shown:
        shown(10**9, 4 * 10**9)
        assert file.getvalue() == ""
        shown._bar.start_t -= 3
        shown(10**9, 4 * 10**9)
        shown._bar.refresh()
    assert "export:  50%" in file.getvalue() and "2.00G/4.00G" in file.getvalue()
