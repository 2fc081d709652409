"""The table and the picture of weight shares, from the metrics of runs."""

import json

import pytest


@pytest.fixture
def run(weight_shares, tmp_path):
    """Twenty steps in which names move from 10 to 86 % of the weight; tags have the rest."""
    lines = []
    for step in range(20):
        shares = dict.fromkeys(weight_shares.REGIONS, 0.0)
        shares["name"] = 0.1 + 0.04 * step
        shares["tag"] = 1 - shares["name"]
        named = {f"region/{name}/weight_share": value for name, value in shares.items()}
        lines.append(json.dumps({"step": step + 1} | named) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_first_middle_and_last_tenth_of_the_steps(weight_shares, run, capsys):
    assert weight_shares.main(["runs", str(run / "out.png"), f"a = b={run}"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| a = b "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1 + weight_shares.REGIONS.index("name")] == "12.0 -> 48.0 -> 84.0"
    assert cells[1 + weight_shares.REGIONS.index("tag")] == "88.0 -> 52.0 -> 16.0"
    assert (run / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_method_over_the_steps_of_a_run(weight_shares, run, capsys):
    """Counts and entropies that stay: format gives up three quarters of its share under `rest`, nothing under `grpo`."""
    steady = {"step": 1, "reward/format_score": 1.0}
    for name in weight_shares.REGIONS:
        steady |= {f"region/{name}/{kind}": 0.5 for kind in ("entropy", "gini")}
        steady |= {f"region/{name}/count": 100.0}
    lines = (json.dumps(steady | {"step": step}) + "\n" for step in range(1, 22))
    (run / "metrics.jsonl").write_text("".join(lines))
    assert weight_shares.main(["replay", str(run), str(run / "out"), "rest", "grpo"]) == 0
    for method, last in (("rest", 2 * 0.25 / 7), ("grpo", 2 / 7)):
        steps, shares = weight_shares.read_shares(run / "out" / method)
        assert steps == list(range(1, 22))
        form = shares["tag"] + shares["scaffold"]
        expected = {0: 2 / 7, 20: 2 / 7 + (last - 2 / 7) * 20 / 21}
        assert {i: form[i] for i in expected} == pytest.approx(expected, rel=1e-3)
        assert shares["name"] == pytest.approx([1 / 7] * 21, rel=1e-3)


def test_a_run_without_metrics_is_one_line(weight_shares, tmp_path, capsys):
    assert weight_shares.main(["runs", str(tmp_path / "out.png"), f"a={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("weight_shares: error: ") and error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
