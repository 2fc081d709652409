"""A measurement as tables, as a JSON file and as a figure."""

import json

from rest_jax.analysis.variance.report import variance_tables, write_variance

INEQUALITY = {
    "tokens": 10, "entropy": 0.2, "gini": 0.1, "bound": 0.15, "sampled": 0.11, "sampled_error": 0.02,
    "largest_ratio": None, "violations": 0,
}  # fmt: skip
REGION = INEQUALITY | {
    "gradient_square": 2.0, "beta": 5.0, "beta_error": None,
    "jacobian": 30.0, "score": 1.0, "score_error": None,
}  # fmt: skip
RULE = {
    "weights": {"name": 1.0}, "bound": 1.0, "variance": 0.5, "mean_square": 2.0, "share": 0.25,
    "relative": 1.0, "relative_interval": [1.0, None], "noise_scale": None,
    "cosine": 1.0,
}  # fmt: skip
FOUND = {
    "model": "m", "data": "d", "prompts": 2, "group_size": 4, "groups_with_advantage": 1,
    "exact_gradients": False, "gradient_dimensions": 7, "tolerance": 1e-5, "overall": INEQUALITY,
    "regions": {"name": REGION}, "rules": {"uniform": RULE, "paper": RULE},
}  # fmt: skip


def test_tables_say_whether_the_inequality_holds():
    text = variance_tables(FOUND)
    assert "holds: 0 of 10 tokens" in text and "count sketches" in text and "1 to -" in text
    broken = FOUND | {"overall": INEQUALITY | {"violations": 3}}
    assert "IS BROKEN: 3 of 10 tokens" in variance_tables(broken)


def test_files_replace_earlier_ones(tmp_path):
    for _ in range(2):
        found, figure = write_variance(FOUND, tmp_path / "new")
    assert sorted((tmp_path / "new").iterdir()) == [found, figure]
    assert json.loads(found.read_text()) == FOUND
    assert figure.read_bytes().startswith(b"\x89PNG")
