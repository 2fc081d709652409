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
        "step 5/10: reward 0.500, ETA 0:20",
        "step 8/10: reward 0.500, ETA 0:08",
        "step 10/10: reward 0.500, ETA 0:00",
        "held out: 50 %",
    ]


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
