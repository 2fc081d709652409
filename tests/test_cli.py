"""The command line: quick help, one line and exit code 2 for bad input, tracebacks for defects, thin commands."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from rest_jax import builtin, cli
from rest_jax.errors import RunStopped, UserError

COMMANDS = (
    "train",
    "sft",
    "convert",
    "export",
    "generate",
    "evaluate",
    "data",
    "sweep",
    "report",
    "quickstart",
)


def refused(capsys, *argv: str, code: int = 2) -> str:
    """Runs a command that must fail with exactly one line on stderr; returns it."""
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert err.startswith("rest-jax: error: ") and err.count("\n") == 1, (out, err)
    return err


@pytest.fixture
def config(tmp_path) -> pathlib.Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\noutput: {tmp_path / 'runs'}\nmodel:\n  source: {tmp_path / 'model'}\n"
    )
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"rest-jax {command}" in capsys.readouterr().out


def test_help_does_not_import_jax():
    script = (
        "import sys; from rest_jax import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    )
    script += (
        "print('heavy', sorted({'jax', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "heavy []" in out.stdout
    assert time.perf_counter() - started < 5  # 0.1 s on an idle machine


def test_module_and_function_agree_on_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "rest_jax", "report", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rest-jax: error: ") and done.stderr.count("\n") == 1


def test_missing_config_lists_the_shipped_ones(capsys):
    line = refused(capsys, "train", "no_such_recipe")
    assert "no_such_recipe" in line and all(name in line for name in builtin.names())


def test_every_config_fault_at_once_with_the_nearest_name(config, capsys):
    line = refused(
        capsys, "train", str(config), "train.step=3", "loss.clip_low=-1", "rollout.group_sise=4"
    )
    assert "train.step: unknown key (nearest: steps)" in line
    assert "rollout.group_sise: unknown key (nearest: group_size)" in line
    assert "loss.clip_low: -1" in line


def test_impossible_division_names_both_numbers(config, capsys):
    line = refused(
        capsys, "train", str(config), "rollout.prompts_per_step=10", "train.prompts_per_update=4"
    )
    assert "10" in line and "4" in line


@pytest.mark.parametrize("override", ["steps", "=3", "name.x=1", "train.steps=[1"])
def test_bad_overrides_are_named(config, capsys, override):
    assert repr(override) in refused(capsys, "sft", str(config), override)


def test_broken_yaml_and_a_list_at_the_top(config, capsys):
    config.write_text("name: [1\nmodel: {")
    assert "not YAML" in refused(capsys, "train", str(config))
    config.write_text("- 1\n")
    assert "mapping" in refused(capsys, "train", str(config))


def test_missing_model_leaves_no_run_folder(config, capsys, tmp_path):
    for command in ("train", "sft"):
        assert str(tmp_path / "model") in refused(capsys, command, str(config))
    assert not (tmp_path / "runs").exists()


def test_convert_of_nothing_makes_nothing(capsys, tmp_path):
    out = tmp_path / "out"
    assert str(tmp_path / "absent") in refused(
        capsys, "convert", str(tmp_path / "absent"), str(out)
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_files_of_the_other_commands(capsys, tmp_path):
    absent = str(tmp_path / "absent")
    assert absent in refused(capsys, "data", "inspect", absent)
    assert absent in refused(capsys, "report", absent)
    assert absent in refused(capsys, "evaluate", absent, "synthetic:eval", "--limit", "1")
    assert absent in refused(capsys, "generate", absent, "--prompt", "hello")
    assert absent in refused(
        capsys, "generate", absent, "--prompt", "hello", "--tools", f"{absent}.json"
    )
    assert absent in refused(capsys, "export", absent, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_tools_file_must_be_a_list_of_tools(capsys, tmp_path):
    path = tmp_path / "tools.json"
    for text, complaint in (("{", "not JSON"), ('{"name": "a"}', "a list of objects")):
        path.write_text(text)
        line = refused(capsys, "generate", "m", "--prompt", "hello", "--tools", str(path))
        assert complaint in line and str(path) in line


def test_data_describes_a_synthetic_world(capsys):
    assert cli.main(["data", "inspect", "synthetic:train", "--limit", "20"]) == 0
    assert ["records", "20"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "synthetic:nowhere" in refused(capsys, "data", "inspect", "synthetic:nowhere")


def test_overrides_stand_on_both_sides_of_options(config, capsys):
    line = refused(capsys, "train", str(config), "train.step=3", "--dry-run", "loss.clip=1")
    assert "train.step: unknown key" in line and "loss.clip: unknown key" in line
    for words in (["train", "x", "--dry", "--nonsense"], ["report", "x", "y=1"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "two lines"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            2,
            "a/b: No such file or directory",
        ),
        (PermissionError(13, "Permission denied", "c"), 2, "c: Permission denied"),
        (RunStopped("step 3: loss nan"), 1, "step 3: loss nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, line):
    def fail(_):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "report", fail)
    assert refused(capsys, "report", "run", code=code) == f"rest-jax: error: {line}\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise ValueError("a defect")

    monkeypatch.setitem(cli.COMMANDS, "report", fail)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["report", "run"])


@pytest.mark.parametrize(
    "argv", [["generate", "m"], ["data", "inspect", "f", "--limit", "0"], ["nothing"], []]
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
