"""The table and the picture of weight shares, from the metrics of runs."""

import importlib.util
import json
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "weight_shares.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("weight_shares", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, tmp_path):
    """Twenty steps in which names move from 10 to 86 % of the weight; tags have the rest."""
    lines = []
    for step in range(20):
        shares = dict.fromkeys(tool.REGIONS, 0.0)
        shares["name"] = 0.1 + 0.04 * step
        shares["tag"] = 1 - shares["name"]
        named = {f"region/{name}/weight_share": value for name, value in shares.items()}
        lines.append(json.dumps({"step": step + 1} | named) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_first_middle_and_last_tenth_of_the_steps(tool, run, capsys):
    assert tool.main(["runs", str(run / "out.png"), f"a = b={run}"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| a = b "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1 + tool.REGIONS.index("name")] == "12.0 -> 48.0 -> 84.0"
    assert cells[1 + tool.REGIONS.index("tag")] == "88.0 -> 52.0 -> 16.0"
    assert (run / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_is_one_line(tool, tmp_path, capsys):
    assert tool.main(["runs", str(tmp_path / "out.png"), f"a={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("weight_shares: error: ") and error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
