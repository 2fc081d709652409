"""Runs made again: which config, what is refused, and where two runs first differ."""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from rest_jax import cli
from rest_jax.config import from_overrides
from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.reproduce import beside, compare
from rest_jax.run.metrics import DIGESTS_FILE, FILES, METRICS_FILE, SAMPLES_FILE
from rest_jax.run.record import Recorded, read_recorded
from tests.runs import launch, recipe


def made(**changes) -> Recorded:
    """Three steps; `changes`: of the reward of a step, by its number."""
    lines: dict[str, dict[int, list[dict[str, Any]]]]
    lines = {name: {step: [{"step": step}] for step in (1, 2, 3)} for name in FILES}
    for step in (1, 2, 3):
        reward = changes.get(f"step_{step}", 0.5)
        lines[METRICS_FILE][step] = [{"step": step, "reward/mean": reward}]
        lines[DIGESTS_FILE][step] = [{"step": step, "of": str(changes)}]
    return Recorded(as_path("/runs/a"), lines, [], None)


def test_the_first_difference_is_named_with_its_values():
    assert compare(made(), made(step_4=1.0), False) == [
        "/runs/a and /runs/a: steps 1 to 3 are equal"
    ]
    found = compare(made(), made(step_2=0.25, step_3=1.0), False)
    assert found[1:] == ["first at step 2: metrics.jsonl[0].reward/mean: 0.5 recorded, 0.25 here"]


def longer(run: Recorded, **steps: Sequence[int]) -> Recorded:
    """With further steps in the files of these names."""
    for name, more in steps.items():
        own = {step: [{"step": step}] for step in more}
        run.lines[f"{name}.jsonl"].update(own)  # type: ignore[attr-defined]
    return run


def test_all_that_is_recorded_must_have_been_made_again():
    every = dict.fromkeys(("metrics", "samples", "tokens", "digests"), (4, 5))
    found = compare(longer(made(), **every), made(), False)
    assert found[0].endswith("steps 1 to 5 differ") and found[1].startswith("first at step 4: ")
    found = compare(longer(made(), metrics=[9]), made(), False)
    assert found[1:] == [
        f"{METRICS_FILE}: lines of step 9, which is no recorded step",
        f'first at step 9: {METRICS_FILE}: [{{"step": 9}}] recorded, [] here',
    ]
    # a run that was stopped is made again to its end
    assert compare(made(), longer(made(), **every), False) == [
        "/runs/a and /runs/a: steps 1 to 3 are equal; the second has steps to 5"
    ]


def test_on_other_devices_it_is_also_said_what_is_beyond_the_tolerance():
    _, first, beyond = compare(made(), made(step_2=0.5001, step_3=0.6), True)
    assert "step 2" in first and "step 3: metrics.jsonl[0].reward/mean: 0.5 recorded, 0.6" in beyond
    assert compare(made(), made(step_2=0.5001), True)[2].endswith("nothing")


def test_a_run_is_made_again_beside_it_under_another_name():
    config = from_overrides({"name": "x", "output": "elsewhere", "model": {"source": "m"}})
    assert beside(config, made(), None).folder == as_path("/runs/a-reproduced")
    assert beside(config, made(), "b").folder == as_path("/runs/b")
    with pytest.raises(UserError, match="a: the run itself has that name"):
        beside(config, made(), "a")
    words = ["train.tensorboard=true", "train.wandb_project=theirs", "train.trackio_project=theirs"]
    theirs = from_overrides(config.model_dump(mode="json"), words)
    assert beside(theirs, made(), "b") == beside(config, made(), "b")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> pathlib.Path:
    raw = recipe(model, tmp_path_factory.mktemp("reproduced"), seed=1)
    assert launch(raw) == 0
    return pathlib.Path(raw["output"], "tiny")


@pytest.mark.slow
def test_a_run_made_again_is_equal(run, capsys):
    assert cli.main(["reproduce", str(run), "again"]) == 0
    assert "steps 1 to 4 are equal" in capsys.readouterr().out
    assert read_recorded(as_path(run.parent / "again")).last == 4
    # The same command finds it done.
    assert cli.main(["reproduce", str(run), "again", "--strict"]) == 0


@pytest.mark.slow
def test_on_another_mesh_strict_refuses(run, capsys):
    words = ["reproduce", str(run), "meshed", "mesh.data=1", "mesh.fsdp=-1"]
    assert cli.main([*words, "--strict"]) == 2
    assert "not what made it: devices.mesh.data: 8 recorded, 1 here" in capsys.readouterr().err
    assert not (run.parent / "meshed").exists()


@pytest.mark.slow
def test_a_tampered_metric_is_where_they_first_differ(run, tmp_path, capsys):
    other = tmp_path / "tiny"
    shutil.copytree(run, other)
    lines = (other / METRICS_FILE).read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith('{"step": 3'))
    values = json.loads(lines[at])
    values["reward/mean"] += 1
    lines[at] = json.dumps(values) + "\n"
    (other / METRICS_FILE).write_text("".join(lines))
    assert cli.main(["reproduce", str(other)]) == 1
    assert "first at step 3: metrics.jsonl[0].reward/mean: " in capsys.readouterr().out
    assert (tmp_path / "tiny-reproduced" / SAMPLES_FILE).is_file()


@pytest.mark.slow
def test_a_fork_begins_where_the_recorded_one_did(run, capsys):
    raw = recipe(run.parent.parent, run.parent, seed=2, train={"steps": 6})
    raw["model"] = {"source": str(read_recorded(as_path(run)).launches[0][1]["config"]["model"]["source"])}  # fmt: skip
    assert launch(raw, "--fork", "forked") == 0
    assert cli.main(["reproduce", str(run.parent / "forked")]) == 0
    assert "steps 5 to 6 are equal" in capsys.readouterr().out
    # into no run that began otherwise
    assert cli.main(["reproduce", str(run.parent / "forked"), "tiny"]) == 2
    assert "tiny exists and is no fork of" in capsys.readouterr().err
    assert not (run / "fork.json").exists()
