"""The notebook: without outputs in git, its commands parse, and it runs from its first cell to its last."""

import ast
import json
import re
import shlex

import pytest
import typer

from rest_jax import cli
from tests import runs
from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "quickstart.ipynb"
CODE = [
    "".join(cell["source"])
    for cell in json.loads(NOTEBOOK.read_text())["cells"]
    if cell["cell_type"] == "code"
]
COMMANDS = re.findall(r"^!\{REST\} (.*)", "\n".join(CODE), re.M)


def test_it_is_kept_without_outputs_and_its_cells_are_python():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    for text in CODE:
        ast.parse(re.sub(r"^[!%].*", "pass", text, flags=re.M))


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command):
    name, *words = shlex.split(command)
    parsed = typer.main.get_command(cli.app).commands[name]
    parsed.make_context(name, words)


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    for name, value in (runs.environment() | {"STEPS": "2"}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources=where
    ).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "2/2" in said and "95 % from" in said and "exported runs/notebook" in said
    pictures = [
        o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 1 and (tmp_path / "exported" / "config.json").is_file()
