"""A fork continues from the newest checkpoint of another run under its own name and config, or is refused in one line."""

import json
import pathlib
import shutil
from collections.abc import Callable

import pytest

from rest_jax import config as config_lib
from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.run.checkpoint import MANIFEST, manifest_digest
from rest_jax.run.fork import FILE, Origin, find_origin, is_there, write_origin
from rest_jax.run.metrics import read_lines
from tests.runs import STEPS, assert_same, launch, lines, recipe, state

FORKED = 2


def config_of(model, output: pathlib.Path) -> dict:
    return recipe(model, output, seed=1, data={"max_prompt_tokens": 128})


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> pathlib.Path:
    """The folder of a run of all steps."""
    output = tmp_path_factory.mktemp("unbroken")
    assert launch(config_of(model, output)) == 0
    return output / "tiny"


@pytest.fixture
def output(unbroken, tmp_path) -> pathlib.Path:
    """An output folder with a copy of that run as it was after its second step."""
    run = shutil.copytree(unbroken, tmp_path / "tiny")
    for step in range(FORKED + 1, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / str(step))
    return tmp_path


@pytest.mark.slow
def test_a_fork_that_changes_nothing_goes_on_as_the_run_would(model, unbroken, output, capsys):
    assert launch(config_of(model, output), "--fork", "new") == 0
    assert "the data continues where it was" in capsys.readouterr().out
    there = [line for line in lines(unbroken) if line["step"] >= FORKED]
    assert lines(output / "new") == there[1:]  # the evaluation at the fork, then its steps
    assert_same(state(output / "new"), state(unbroken))
    origin = json.loads((output / "new" / FILE).read_text())
    assert origin["run"] == str(output / "tiny") and origin["step"] == FORKED
    assert len(origin["digest"]) == 64
    # The same command resumes, as that of any run does; the other run is no longer needed.
    shutil.rmtree(output / "tiny")
    shutil.rmtree(output / "new" / "checkpoints" / str(STEPS))
    assert launch(config_of(model, output), "--fork", "new") == 0
    assert lines(output / "new") == there[1:]


@pytest.mark.slow
def test_a_fork_takes_what_a_resume_refuses(model, output, capsys):
    changes = [
        "optimizer.learning_rate=0.002",
        "optimizer.schedule=linear",
        "optimizer.max_grad_norm=null",
        "rollout.group_size=2",
        "train.prompts_per_update=8",
        "data.synthetic_size=32",
        "seed=2",
    ]
    assert launch(config_of(model, output), *changes) == 2
    said = capsys.readouterr().err
    assert "optimizer.learning_rate: 0.001 there, 0.002 now" in said and "--fork NEW_NAME" in said
    assert launch(config_of(model, output), *changes, "--fork", "new") == 0
    said = capsys.readouterr().out
    assert "fork" in said and "seed: 1 there, 2 now" in said and "the data begins anew" in said
    found = [line for line in lines(output / "new") if "update/loss" in line]
    assert [line["step"] for line in found] == list(range(FORKED + 1, STEPS + 1))
    assert found[0]["data/epoch"] == 1
    # The schedule is that of the fork's own updates, one a step.
    rates = [line["update/learning_rate"] for line in found]
    assert rates == pytest.approx([0.002 * (1 - step / STEPS) for step in (FORKED, FORKED + 1)])


@pytest.mark.slow
def test_a_supervised_run_is_forked_by_the_same_option(model, tmp_path):
    raw = config_of(model, tmp_path)
    assert launch(raw, "train.steps=1", command="sft") == 0
    assert launch(raw, "train.steps=2", "--fork", "new", command="sft") == 0
    assert [line["step"] for line in lines(tmp_path / "new")] == [1, 2, 2]


def no_checkpoint(output: pathlib.Path) -> list[str]:
    (output / "tiny" / "checkpoints").mkdir(parents=True)
    return []


def something_there(output: pathlib.Path) -> list[str]:
    (output / "new").mkdir()
    (output / "new" / "notes.txt").write_text("")
    return []


def what_cannot_be_read(text: str) -> Callable[[pathlib.Path], list[str]]:
    def write(output: pathlib.Path) -> list[str]:
        (output / "new").mkdir()
        (output / "new" / FILE).write_text(text)
        return []

    return write


REFUSED = {
    "an empty origin": (what_cannot_be_read(""), "fork.json: does not say where"),
    "a part of an origin": (what_cannot_be_read('{"run": "a"}'), "fork.json: does not say where"),
    "an origin of another form": (what_cannot_be_read("[1]"), "fork.json: does not say where"),
    "no checkpoint": (no_checkpoint, "has no checkpoint to go on from"),
    "no run": (lambda _: [], "has no checkpoint to go on from"),
    "a folder that exists": (something_there, "exists and is no fork of"),
    "a bad name": (lambda _: ["--fork", "../up"], "--fork ../up: name"),
    "its own name": (lambda _: ["--fork", "tiny"], "the run itself has that name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_fork_that_cannot_be_is_one_line_and_leaves_nothing(model, tmp_path, capsys, case):
    prepare, said = REFUSED[case]
    assert_refused(config_of(model, tmp_path), prepare(tmp_path), said, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.source=configs/quickstart_policy", "it is of another model"),
        (f"train.steps={FORKED}", "raise train.steps"),
    ],
)
def test_a_fork_that_does_not_fit_is_one_line_and_leaves_nothing(model, output, capsys, word, said):
    assert_refused(config_of(model, output), [word], said, capsys)


def assert_refused(raw: dict, words: list[str], said: str, capsys) -> None:
    output = pathlib.Path(raw["output"])
    before = sorted(path for path in output.rglob("*") if path.name != "config.yaml")
    assert launch(raw, "--fork", "new", *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and error.startswith("rest-jax: error: ")
    assert before == sorted(path for path in output.rglob("*") if path.name != "config.yaml")


@pytest.mark.slow
def test_a_fork_killed_before_its_first_checkpoint_is_made_by_the_same_command(
    model, unbroken, output, capsys
):
    raw = config_of(model, output)
    assert launch(raw, "--fork", "new") == 0
    wanted = lines(output / "new")
    forget_all_but_the_origin(output / "new")
    assert launch(raw, "name=new") == 0  # without the option, too
    assert lines(output / "new") == wanted
    assert read_lines(output / "new" / "samples.jsonl")
    # Its origin is verified on this path, too.
    forget_all_but_the_origin(output / "new")
    file = next(x for x in (output / "tiny/checkpoints/2/params").rglob("*") if x.is_file())
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert launch(raw, "name=new") == 2
    assert "checkpoints/2: damaged: params/" in capsys.readouterr().err
    # Killed a moment before: a part of the file that says where it comes from.
    file.write_bytes(content)
    shutil.rmtree(output / "new")
    (output / "new").mkdir()
    (output / "new" / f"{FILE}.123.partial").write_text("{")
    assert launch(raw, "--fork", "new") == 0
    assert lines(output / "new") == wanted


def test_a_fork_is_made_again_where_nothing_else_is(tmp_path):
    raw = {"name": "again", "output": str(tmp_path), "model": {"source": "m"}}
    config = config_lib.from_overrides(raw)
    there = tmp_path / "tiny" / "checkpoints" / "2"
    there.mkdir(parents=True)
    (there / MANIFEST).write_text("{}")
    origin = Origin(str(tmp_path / "tiny"), 2, manifest_digest(as_path(there)))
    assert find_origin(origin, config, restart=False) == origin
    config.folder.mkdir()
    for content in (None, Origin(origin.run, 1, origin.digest)):
        if content is None:
            (config.folder / "metrics.jsonl").write_text("")
        else:
            write_origin(config.folder, content)
        with pytest.raises(
            UserError, match=r"reproduce again: .* exists and is no fork of .* at step 2"
        ):
            find_origin(origin, config, restart=False)
    write_origin(config.folder, origin)
    assert find_origin(origin, config, restart=False) is None
    (there / MANIFEST).write_text("[]")
    assert not is_there(origin)
    with pytest.raises(UserError, match="gone, or not what it was"):
        find_origin(origin, config.renamed("other", "name"), restart=False)


def forget_all_but_the_origin(run: pathlib.Path) -> None:
    for name in ("checkpoints", ".saved", "metrics.jsonl", "config.yaml"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
