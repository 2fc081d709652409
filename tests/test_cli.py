"""The command line: quick help, one line and exit code 2 for bad input, tracebacks for defects, every command succeeds."""

import contextlib
import io
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tomllib

import pytest
import typer
import yaml
from safetensors.numpy import load_file, save_file

import rest_jax
from rest_jax import cli
from rest_jax.data.records import StepRecord, to_json
from rest_jax.errors import RunStopped, UserError
from rest_jax.run import environment
from rest_jax.run.metrics import MetricsWriter, read_lines
from rest_jax.tool_calls import Target
from tests import runs

COMMANDS = [
    " ".join((name, *more))
    for name, command in typer.main.get_command(cli.app).commands.items()
    for more in [(), *((inner,) for inner in getattr(command, "commands", ()))]
]
PROGRAMS = pathlib.Path(__file__).parent / "programs"


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


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert f"Usage: rest-jax {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "takes"),
    [
        (["generate", "run", "--prompt", "x"], False),
        (["serve", "run"], False),
        (["chat", "run"], False),
        (["export", "run", "out"], False),
        (["evaluate", "run", "data"], True),
        (["variance", "run", "data"], True),
        (["credit", "run", "data"], True),
        (["gain", "run", "data"], True),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_code_that_a_run_names_is_run_only_when_the_command_asks_for_it(
    words, takes, monkeypatch, capsys
):
    def config_of(source, overrides, plugins):
        raise UserError(f"plugins {plugins}")

    monkeypatch.setattr("rest_jax.run.load.config_of", config_of)
    assert "plugins False" in refused(capsys, *words)
    assert ("plugins True" if takes else "No such option") in refused(capsys, *words, "--plugins")


def test_help_is_quick_and_does_not_import_jax():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(PROGRAMS / "show_help.py")]
    environment = os.environ | {"PYTHONPATH": str(PROGRAMS.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2  # CPU seconds; 0.2 where nothing else runs


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rest-jax {rest_jax.__version__}\n"


def test_a_group_without_a_command_prints_its_help(capsys):
    for words in ([], ["data"], ["config"]):
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert "Usage: rest-jax" in out and err == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("trian x", "No such command 'trian'. Did you mean 'train'"),
        ("train", "Missing argument 'FILE|KEY=VALUE'; see rest-jax train --help"),
        ("train x --prfile 3", "No such option: --prfile (Possible options: --profile)"),
        ("train x --profile", "Option '--profile' requires an argument"),
        ("train x --profile 0", "'--profile': Input should be greater than or equal to 1, not '0'"),
        ("data inspect f --limit x", "'--limit': Input should be a valid integer"),
        ("export a b --dtype int8", "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (
            "new rewrd x",
            "'kind': 'rewrd' is not one of 'reward', 'judge', 'weight', 'advantage', 'loss'; see",
        ),
        ("export x y z=1", "unexpected extra argument(s) (z=1)"),
        ("generate m", "exactly one of --prompt and --file is needed"),
        ("generate m --file b --tools c", "--tools belong to --prompt"),
        ("generate m --prompt b --limit 3", "--limit belongs to --file"),
        ("evaluate --compare a b --limit 3", "takes two result files and nothing else"),
        ("schema --output mine.yaml", "name a file that ends in .json"),
        ("new reward class", "new reward class: Python has that name for itself"),
        ("new reward json", "new reward json: Python has that name for itself"),
        ("generate m --prompt a --file b", "exactly one of --prompt and --file is needed"),
        ("serve m --template other", "'other' is not one of 'toolrl', 'hermes', 'llama3'"),
        ("serve m --port 65536", "'--port': Input should be less than or equal to 65535"),
        ("serve m --host 300.1.1.1", "serve: 300.1.1.1:8000: "),
        ("chat http://x --template hermes", "--template are for a model to load"),
        ("evaluate m seed=1", "evaluate: no data"),
        ("data prepare openai in.jsonl", "an input and an output file are needed"),
        ("data inspect synthetic:eval train.steps=1", "train.steps changes nothing here"),
        ("train scale/tiny seed=1 name=x seed=2", "seed: two values, '1' and '2'; give one"),
        ("evaluate m synthetic:eval seed=1 seed=2", "seed: two values"),
        ("reproduce m new seed=1 seed=2", "seed: two values"),
        ("serve m seed=1 seed=2", "seed: two values"),
        (
            "evaluate m synthetic:eval rollout.max_response_tokens=8 --max-response-tokens 9",
            "rollout.max_response_tokens: two values, '8' and '9'; give one",
        ),
        ("serve m --template hermes data.template=toolrl", "data.template: two values"),
        ("chat m --template hermes data.template=toolrl", "data.template: two values"),
        ("quickstart --seed 1 seed=2", "seed: two values, '1' and '2'"),
        ("data prepare openai a b data.template=x data.template=y", "data.template: two values"),
        ("train scale/tiny train.steps=", "override 'train.steps=': a value is missing"),
        ("train scale/tiny_sft", "read by `rest-jax sft`, not by `rest-jax train`"),
        ("sft scale/tiny method/sft", "read by `rest-jax train`, not by `rest-jax sft`"),
        ("plan scale/tiny --topology cpu:2 --json /", "--json /: is a folder"),
        (
            "plan scale/tiny --topology cpu:2 --output s3://b/x.png",
            "--output s3://b/x.png: a local path",
        ),
        ("train scale/tiny reward.plugin=s3://b/x.py", "reward.plugin s3://b/x.py: a local path"),
        ("data prepare openai ftp://b/in.jsonl o.jsonl", "ftp://b/in.jsonl: no such store as ftp"),
        ("compare quick --output s3://b/x", "--output s3://b/x: a local path is needed here"),
    ],
)
def test_wrong_usage_is_one_line(words, line, capsys):
    assert line in refused(capsys, *words.split())


def test_words_with_an_equals_sign_are_overrides_unless_they_are_paths():
    words = ["a.yaml", "data.train=/x/y", "./odd=name.yaml", "runs/a=b/config.yaml", "name=m"]
    files, overrides = cli.split(words)
    assert files == ["a.yaml", "./odd=name.yaml", "runs/a=b/config.yaml"]
    assert overrides == ["data.train=/x/y", "name=m"]


def test_module_and_function_agree_on_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "rest_jax", "report", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rest-jax: error: ") and done.stderr.count("\n") == 1


# Input that cannot be used


def test_missing_config_lists_the_builtin_ones(capsys):
    line = refused(capsys, "train", "no_such_recipe")
    assert "no_such_recipe" in line and "scale/tiny" in line and "method/rest" in line


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


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("=3", "'=3'"),
        ("train.steps=[1", "'train.steps=[1'"),
        ("name.x=1", "name: {'x': 1}"),
        (f"seed={'9' * 5000}", "the value cannot be read"),
        ("steps", "config steps: no such file"),
    ],
)
def test_bad_overrides_are_named(config, capsys, override, named):
    assert named in refused(capsys, "sft", str(config), override)


def test_broken_yaml_and_a_list_at_the_top(config, capsys):
    config.write_text("name: [1\nmodel: {")
    assert "line 2: " in refused(capsys, "train", str(config))
    config.write_text("- 1\n")
    assert "mapping" in refused(capsys, "train", str(config))
    config.write_text(f"seed: {'9' * 5000}\n")
    assert f"{config}: " in refused(capsys, "train", str(config))


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
    for text, complaint in (("{", "not JSON"), ('{"name": "a"}', "a list is needed")):
        path.write_text(text)
        line = refused(capsys, "generate", "m", "--prompt", "hello", "--tools", str(path))
        assert complaint in line and str(path) in line


def test_overrides_stand_on_both_sides_of_options(config, capsys):
    line = refused(capsys, "train", str(config), "train.step=3", "--dry-run", "loss.clip=1")
    assert "train.step: unknown key" in line and "loss.clip: unknown key" in line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "two lines"),
        (UserError(f"a{'x' * 9999}: b"), 2, f"a{'x' * 1999} .. {'x' * 1997}: b"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            2,
            "a/b: No such file or directory",
        ),
        (PermissionError(13, "Permission denied", "c"), 2, "c: Permission denied"),
        (OSError(30, "Read-only file system", "c"), 2, "c: Read-only file system"),
        (OSError(36, "File name too long", "c"), 2, "c: File name too long"),
        (
            OSError(40, "Too many levels of symbolic links", "c"),
            2,
            "c: Too many levels of symbolic links",
        ),
        (RunStopped("step 3: loss nan"), 1, "step 3: loss nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, line):
    def fail(*words):
        raise error

    monkeypatch.setattr("rest_jax.analysis.page.write_page", fail)
    assert refused(capsys, "report", "run", code=code) == f"rest-jax: error: {line}\n"


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), OSError("a defect"), OSError(5, "a defect", "of a disk")]
)
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    def fail(*words):
        raise error

    monkeypatch.setattr("rest_jax.analysis.page.write_page", fail)
    with pytest.raises(type(error), match="a defect"):
        cli.main(["report", "run"])


def test_an_output_without_a_name(records, tmp_path, capsys):
    words = ["data", "prepare", "records", str(records), ""]
    assert "the output has no name" in refused(capsys, *words)


def test_a_name_that_no_file_can_have(capsys):
    name = f"{'x' * 300}.json"
    assert f"{name}: File name too long" in refused(capsys, "schema", "--output", name)
    assert "/proc/x.json: No such file" in refused(capsys, "schema", "--output", "/proc/x.json")


@pytest.mark.parametrize(
    ("words", "output"),
    [
        *((["variance", "configs/quickstart_policy", "synthetic:eval"], out) for out in ("a/b", "{file}", "{file}/b")),
        (["credit", "configs/quickstart_policy", "synthetic:eval"], "{file}"),
        (["gain", "configs/quickstart_policy", "synthetic:train"], "/proc/x"),
        (["plan", "scale/tiny", "--topology", "cpu:8"], "/proc/x.png"),
        (["plan", "scale/tiny", "--topology", "cpu:8", "--json", "{file}"], "{file}"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    words, output, tmp_path, monkeypatch, capsys
):
    def measure(*words, **options):
        pytest.fail("measured")

    for name in (
        *("analysis.variance.measure.measure_variance", "analysis.credit.measure_credit"),
        *("analysis.gain.measure_gain", "planning.plan.make_plan"),
    ):
        monkeypatch.setattr(f"rest_jax.{name}", measure)
    file = tmp_path / "file"
    file.write_text("kept")
    (tmp_path / "a").symlink_to("a")
    words = [word.format(file=file) for word in [*words, "--output", output]]
    if not os.path.isabs(words[-1]):
        words[-1] = str(tmp_path / words[-1])
    assert words[-1] in refused(capsys, *words)
    assert file.read_text() == "kept" and len(list(tmp_path.iterdir())) == 2


# Every command succeeds

SMALL = [
    "data.synthetic_size=16", "data.eval_limit=8", "data.max_prompt_tokens=128",
    "rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.max_response_tokens=16",
    "sft.batch_size=4", "train.steps=1", "train.eval_every=0",
]  # fmt: skip


def succeed(*argv: str) -> str:
    """Runs a command that must end well; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(argv) == 0
    return out.getvalue()


def one_layer_policy(folder: pathlib.Path) -> pathlib.Path:
    """The builtin policy without its upper layers, which compiles sooner."""
    builtin = PROGRAMS.parent.parent / "configs" / "quickstart_policy"
    shutil.copytree(builtin, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(builtin / "model.safetensors")
    lowest = {k: v for k, v in weights.items() if ".layers." not in k or ".layers.0." in k}
    save_file(lowest, folder / "model.safetensors", {"format": "pt"})
    sizes = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Where the commands of `printed` work."""
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def printed(folder) -> dict[str, str]:
    """What each command that needs a policy printed: all in one process of one device, the first a small quickstart."""
    policy, tools, run = folder / "policy", folder / "tools.json", str(folder / "quickstart")
    small = [f"output={folder}", f"model.source={one_layer_policy(policy)}", *SMALL]
    tools.write_text('[{"name": "weather"}]')
    record = StepRecord("first", "", (), ({"role": "user", "content": "Hello?"},), Target())
    records = folder / "records.jsonl"
    records.write_text(json.dumps(to_json(record)) + "\n")
    train = ["train", "scale/tiny", "method/grpo", *small]
    prompt = ["--prompt", "Weather in Bern?", "--tools", str(tools), "--samples", "2"]
    scored = ["--limit", "8", "--output", str(folder / "scored.jsonl")]
    greedy = ["generate", run, "--file", str(records), "--greedy"]
    commands = {
        "quickstart": ["quickstart", *small],
        "dry run": [*train, "name=dry", "--dry-run"],
        "train": train,
        "train again": train,
        "sft": ["sft", "scale/tiny_sft", *small],
        "generate": ["generate", run, "rollout.max_response_tokens=8", *prompt],
        "generate file": greedy,
        "generate file again": greedy,
        "evaluate": ["evaluate", run, "synthetic:eval", *scored],
        "export": ["export", run, str(folder / "first")],
        "convert": ["convert", str(folder / "first"), str(folder / "orbax")],
        "export converted": ["export", str(folder / "orbax"), str(folder / "second")],
        "report": ["report", run],
    }
    file = folder / "commands.json"
    file.write_text(json.dumps(commands))
    program = [sys.executable, str(PROGRAMS / "commands.py"), str(file)]
    done = subprocess.run(
        program, env=runs.environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    failed = [name for name, (code, _) in found.items() if code != 0]
    assert not failed, done.stderr
    return {name: text for name, (_, text) in found.items()}


@pytest.fixture
def records(tmp_path) -> pathlib.Path:
    """Two records in the layout of OpenAI's chats."""
    call = {"name": "weather", "arguments": '{"city": "Bern"}'}
    tool = {
        "name": "weather",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Weather in Bern on day {day}?"},
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "id": "a", "function": call}],
                },
            ],
            "tools": [{"type": "function", "function": tool}],
        }
        for day in range(2)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_quickstart(printed, folder):
    run, exported = folder / "quickstart", folder / "quickstart-exported"
    for path in (run / "converted", exported, run / "curves.png", run / "samples.jsonl"):
        assert path.exists()
    # what the run names as a next step is what the quickstart then does
    assert f"rest-jax export {run} {exported}," in printed["quickstart"]
    assert f"[3/4] exported to {exported}" in printed["quickstart"]
    said = re.search(r"-> (\S+%) \(the reloaded export: (\S+%)\)", printed["quickstart"])
    assert said and said[1] == said[2]


def test_a_quickstart_with_another_seed_has_a_folder_of_its_own():
    from rest_jax.quickstart import load_config

    assert load_config([]).name == "quickstart"
    assert load_config(["seed=3"]).name == "quickstart-seed3"
    assert load_config(["seed=3", "name=mine"]).name == "mine"


def test_train(printed, folder):
    assert "1 steps of 4 prompts x 2 completions" in printed["dry run"]
    assert not (folder / "dry").exists()
    steps = [line["step"] for line in read_lines(folder / "tiny-grpo" / "metrics.jsonl")]
    assert (
        max(steps) == 1 and steps.count(1) == 2
    )  # training and evaluation; the second command adds none


def test_sft(printed, folder):
    assert (folder / "tiny_sft" / "checkpoints" / "1").is_dir()


def test_generate(printed):
    assert printed["generate"] != ""
    (line,) = printed["generate file"].splitlines()
    assert json.loads(line).keys() == {"id", "text"} and json.loads(line)["id"] == "first"
    assert printed["generate file again"] == printed["generate file"]


def test_evaluate(printed, folder):
    (row,) = (x for x in printed["evaluate"].splitlines() if x.startswith("synthetic:eval  "))
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert 4 <= len(scored) <= 8 and {x["data"] for x in scored} == {"synthetic:eval"}
    assert str(len(scored)) == row.split()[-1]


def test_export_and_convert_give_the_same_weights(printed, folder):
    exported = (folder / "quickstart-exported" / "model.safetensors").read_bytes()
    assert (folder / "first" / "model.safetensors").read_bytes() == exported
    assert (folder / "second" / "model.safetensors").read_bytes() == exported


def test_what_is_read_is_not_overwritten(records, tmp_run, capsys):
    fill = MetricsWriter(tmp_run)
    fill.write(1, {"reward/mean": 1.0})
    fill.close()
    config_file = tmp_run / "config.yaml"
    config_file.write_text("name: run\nmodel: {source: configs/quickstart_policy}\n")
    link = tmp_run / "link.jsonl"
    link.symlink_to(records)
    before = {path: path.read_bytes() for path in (records, config_file, tmp_run / "metrics.jsonl")}
    benchmark = ["evaluate", str(tmp_run), "--benchmark", "api_bank", "--data", str(records.parent)]
    for words in (
        ["evaluate", "configs/quickstart_policy", str(records), "--output", str(records)],
        ["evaluate", "configs/quickstart_policy", str(records), "--output", str(link)],
        ["evaluate", str(tmp_run), str(records), "--output", str(config_file)],
        ["report", str(tmp_run), "--output", str(tmp_run / "metrics.jsonl")],
        ["report", str(tmp_run), "--output", str(tmp_run / "model" / "config.json")],
        [*benchmark, "--output", str(tmp_run / "metrics.jsonl")],
        [*benchmark, "--output", str(records)],
        ["plan", str(config_file), "--topology", "cpu:8", "--json", str(config_file)],
        ["plan", str(config_file), "--topology", "cpu:8", "--output", str(config_file)],
    ):
        assert "what is read" in refused(capsys, *words), words
    assert before == {path: path.read_bytes() for path in before}


def test_report(printed, folder):
    for name in ("curves.png", "report.html"):
        assert str(folder / "quickstart" / name) in printed["report"]
    text = (folder / "quickstart" / "report.html").read_text()
    assert "The method at a glance" in text and '"tokens":{"steps":[1' in text


def test_config_show_says_where_values_come_from(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("train:\n  steps: 7\nweights:\n  zero: [tag, name]\n")
    said = succeed("config", "show", "scale/tiny", str(own), "rollout.group_size=4")
    origins = {line.split(":")[0]: line.partition("# ")[2] for line in said.splitlines()}
    assert re.search(f"^  steps: 7 +# {re.escape(str(own))}$", said, re.M)
    assert origins["  group_size"] == "command line"
    assert origins["  prompts_per_step"] == "scale/tiny" and origins["  dtype"] == "default"
    shown = yaml.safe_load(said)
    assert shown["rollout"]["group_size"] == 4 and shown["weights"]["zero"] == ["tag", "name"]


def test_config_show_knows_values_of_options_and_texts_of_several_lines():
    """`tag` is an option and a key of its section; a line of YAML is broken where a text is long."""
    data = "/a b/" + "c " * 60 + "tag: d"
    words = ("weights.options={share: 0.1, tag: 5}", f"data.train='{data}'")
    said = succeed("config", "show", "scale/tiny", "method/top_entropy", *words)
    lines = [(line.split(":")[0], line.partition("# ")[2]) for line in said.splitlines()]
    assert ("    share", "command line") in lines and ("    tag", "command line") in lines
    assert ("  tag", "default") in lines
    assert yaml.safe_load(said)["data"]["train"] == data


def test_doctor(monkeypatch):
    said = succeed("doctor").splitlines()
    lines = {line.split("  ")[0]: line for line in said}
    assert {"python", "jax", "device", "host", "compilation cache", "huge pages"} <= lines.keys()
    assert sum(line.startswith("device") for line in said) == 8
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    broken = next(line for line in succeed("doctor").splitlines() if line.startswith("device"))
    assert "jax does not start: " in broken and "no_such_platform" in broken


def test_doctor_knows_every_extra():
    project = tomllib.loads((PROGRAMS.parent.parent / "pyproject.toml").read_text())["project"]
    assert environment.EXTRAS.keys() == project["optional-dependencies"].keys()


def test_data_prepare_and_inspect(records, tmp_path):
    prepared = tmp_path / "out.jsonl"
    words = ["data", "prepare", "openai", str(records), str(prepared), "data.template=hermes"]
    succeed(*words, "--mask-names", "0.5", "--seed", "1")
    said = succeed("data", "inspect", str(prepared), "--tokenizer", "configs/quickstart_policy")
    assert ["records", "2"] in [line.split() for line in said.splitlines()]
    assert "prompt tokens" in said


def test_data_describes_a_synthetic_world(capsys):
    said = succeed("data", "inspect", "synthetic:train", "--limit", "20", "data.synthetic_seed=1")
    assert ["records", "20"] in [line.split() for line in said.splitlines()]
    assert "synthetic:nowhere" in refused(capsys, "data", "inspect", "synthetic:nowhere")


@pytest.mark.slow
def test_variance(tmp_path):
    few = ["rollout.group_size=4", "rollout.max_response_tokens=64", "data.brief_prompt=true"]
    words = [
        "synthetic:eval",
        *few,
        "--prompts",
        "4",
        "--limit",
        "8",
        "--tokens",
        "1",
    ]
    said = succeed("variance", "configs/quickstart_policy", *words, "--output", str(tmp_path))
    assert "1 - sum p^2 <= 1 - exp(-H) holds" in said
    assert json.loads((tmp_path / "variance.json").read_text())["overall"]["violations"] == 0
