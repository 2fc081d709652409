"""The closing table of a run: its first and its last evaluation."""

import pytest

from rest_jax.evaluation import heldout
from rest_jax.run.metrics import MetricsWriter


@pytest.mark.parametrize(
    ("evaluated", "shown"), [([3], [3]), ([0, 3], [0, 3]), ([0, 2, 3], [0, 3])]
)
def test_the_table_has_each_evaluation_once(tmp_run, capsys, monkeypatch, evaluated, shown):
    monkeypatch.setattr("rest_jax.analysis.curves.write_curves", lambda folder: "curves.png")
    writer = MetricsWriter(tmp_run)
    for step in evaluated:
        writer.write(step, dict.fromkeys(heldout.TABLE, step / 4))
    writer.close()
    heldout.report_evaluations(tmp_run)
    head, _, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "held",
        "out",
        *(word for step in shown for word in ("step", str(step))),
    ]
    assert first.split() == ["eval/exact", *(f"{step / 4:.4g}" for step in shown)]
