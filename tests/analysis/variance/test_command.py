"""`rest-jax variance`: what it refuses, what it prints and writes, and one measurement of the shipped policy."""

import csv
import json

import pytest

from rest_jax import cli
from rest_jax.analysis.variance.tables import variance_tables, write_variance

INEQUALITY = {
    "tokens": 10, "entropy": 0.2, "gini": 0.1, "bound": 0.15, "sampled": 0.11, "sampled_error": 0.02,
    "largest_ratio": None, "largest_excess": -0.01, "violations": 0,
}  # fmt: skip
REGION = INEQUALITY | {
    "gradient_square": 2.0, "gradient_variance": 1.0, "sampled_tokens": 1, "beta": 5.0, "beta_error": None,
    "jacobian": 30.0, "jacobian_error": None, "score": 1.0, "score_error": None,
}  # fmt: skip
RULE = {
    "weights": {"name": 1.0}, "bound": 1.0, "variance": 0.5, "mean_square": 2.0, "share": 0.25,
    "share_interval": [0.2, None], "relative": 1.0, "relative_interval": [1.0, None], "noise_scale": None,
    "cosine": 1.0,
}  # fmt: skip
FOUND = {
    "model": "m", "data": "d", "prompts": 2, "group_size": 4, "groups_with_advantage": 1,
    "exact_gradients": False, "gradient_dimensions": 7, "tolerance": 1e-5, "overall": INEQUALITY,
    "regions": {"name": REGION}, "rules": {"uniform": RULE, "paper": RULE},
}  # fmt: skip


def refused(capsys, *words: str) -> str:
    assert cli.main(["variance", "configs/quickstart_policy", *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_what_cannot_be_measured_is_refused(capsys, tmp_path):
    out = ["--output", str(tmp_path / "out")]
    assert "temperature 0.7" in refused(capsys, "synthetic:eval", "rollout.temperature=0.7", *out)
    assert "--prompts 1" in refused(capsys, "synthetic:eval", "--prompts", "1", *out)
    assert "has 3 that fit" in refused(capsys, "synthetic:eval", "--limit", "3", *out)
    assert "synthetic:nowhere" in refused(capsys, "synthetic:nowhere", *out)
    assert list(tmp_path.iterdir()) == []


def test_tables_say_whether_the_inequality_holds():
    text = variance_tables(FOUND)
    assert "holds: 0 of 10 tokens" in text and "count sketches" in text and "1 to -" in text
    broken = FOUND | {"overall": INEQUALITY | {"violations": 3}}
    assert "IS BROKEN: 3 of 10 tokens" in variance_tables(broken)


def test_files_are_whole_and_agree(tmp_path):
    for _ in range(2):  # the second replaces the first
        paths = write_variance(FOUND, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)
    found, table, picture = paths
    assert json.loads(found.read_text()) == FOUND
    rows = {(r["kind"], r["name"], r["quantity"]): r["value"] for r in csv.DictReader(table.open())}
    assert float(rows["rule", "paper", "variance"]) == 0.5
    assert float(rows["rule", "paper", "weights.name"]) == 1.0
    assert rows["rule", "paper", "relative_interval.high"] == ""
    assert float(rows["region", "all", "gini"]) == 0.1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_shipped_policy_end_to_end(capsys, tmp_path):
    words = [
        "synthetic:eval",
        "--prompts",
        "8",
        "--limit",
        "24",
        "--tokens",
        "2",
        "data.brief_prompt=true",
    ]
    words += ["rollout.group_size=4", "rollout.max_response_tokens=64"]
    command = ["variance", "configs/quickstart_policy", *words, "--output", str(tmp_path)]
    assert cli.main(command) == 0
    assert "1 - sum p^2 <= 1 - exp(-H) holds" in capsys.readouterr().out
    found = json.loads((tmp_path / "variance.json").read_text())
    assert found["overall"]["violations"] == 0 and found["rules"]["paper"]["variance"] > 0
    assert abs(found["overall"]["sampled"] - found["overall"]["gini"]) < 0.03
