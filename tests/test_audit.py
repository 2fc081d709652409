"""Audits: which steps are repeated and from where, what counts as a difference, runs of every kind, tampered runs."""

import collections
import contextlib
import copy
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml

from rest_jax import audit, cli
from rest_jax.audit import (
    SAMPLED,
    Base,
    Repeaters,
    bases,
    choose,
    compare,
    examine,
    has_start,
    launch_faults,
    override,
)
from rest_jax.config import from_overrides
from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.run.checkpoint import MANIFEST, manifest_digest, write_manifest
from rest_jax.run.contents import MADE_OF
from rest_jax.run.fork import Origin
from rest_jax.run.metrics import DIGESTS_FILE, FILES, METRICS_FILE, SAMPLES_FILE, TOKENS_FILE
from rest_jax.run.record import (
    CERTIFICATE_FILE,
    Recorded,
    differences,
    launch_digest,
    line_faults,
    read_recorded,
)
from tests.runs import PROGRAMS, environment, finish, launch, recipe, start


def recorded_run(
    last: int, *launches: tuple[int, dict], begin: int = 0, folder: pathlib.Path = pathlib.Path()
) -> Recorded:
    """Of steps whose lines are all alike. A launch: the step it began behind, and values of its config."""
    made = [
        (step, {"command": "train", "config": {"rollout": {"staleness": 0}} | values})
        for step, values in launches
    ]
    lines = {
        name: {step: [{"step": step}] for step in range(begin + 1, last + 1)} for name in FILES
    }
    origin = Origin("other", begin, "") if begin else None
    return Recorded(as_path(folder), lines, made, origin)


def base_steps(*args) -> dict[int, int | None]:
    return {step: base.step for step, base in bases(*args).items()}


def test_a_step_is_repeated_from_the_nearest_checkpoint_before_it():
    run = recorded_run(6, (0, {}))
    assert base_steps(run, [2, 4], True) == {1: None, 2: None, 3: 2, 4: 2, 5: 4, 6: 4}
    # the starting weights are others now
    assert base_steps(run, [2, 4], False) == {3: 2, 4: 2, 5: 4, 6: 4}


def test_a_fork_begins_where_it_came_from_while_that_is_there(tmp_path, capsys):
    run, there = recorded_run(6, (4, {}), begin=4), tmp_path / "checkpoints" / "4"
    assert not has_start(run, Repeaters())
    there.mkdir(parents=True)
    (there / MANIFEST).write_text("{}")
    origin = Origin(str(tmp_path), 4, manifest_digest(as_path(there)))
    assert has_start(dataclasses.replace(run, origin=origin), Repeaters())
    assert not has_start(dataclasses.replace(run, origin=Origin(str(tmp_path), 4, "")), Repeaters())
    unknown = Origin("ftp://runs", 4, "")
    assert not has_start(dataclasses.replace(run, origin=unknown), Repeaters())
    assert "ftp://runs" in capsys.readouterr().out


def test_a_batch_sampled_ahead_is_sampled_again():
    """The checkpoint of step 2 has the batch of step 3; the one that a fork begins with has none."""
    ahead = {"rollout": {"staleness": 1}}
    assert base_steps(recorded_run(4, (0, ahead)), [1, 2], True) == {1: None, 2: None, 3: 1, 4: 2}
    assert base_steps(recorded_run(7, (5, ahead), begin=5), [5], True) == {6: 5, 7: 5}


def test_a_change_of_the_config_is_not_replayed_over():
    same = recorded_run(6, (0, {}), (3, {"train": {"checkpoint_every": 2}}))
    assert base_steps(same, [2], True)[6] == 2
    other = recorded_run(6, (0, {}), (3, {"train": {"steps": 9}}), (5, {"train": {"steps": 9}}))
    assert bases(other, [2, 5], True) == {
        1: Base(0, None),
        2: Base(0, None),
        3: Base(0, 2),
        6: Base(1, 5),
    }


def test_the_metrics_and_the_seed_choose_the_steps(tmp_path):
    run = recorded_run(50, (0, {}), folder=tmp_path)
    (tmp_path / METRICS_FILE).write_text("a")
    first = choose(run, range(1, 51), 5, 0, ())
    assert first == choose(run, range(1, 51), 5, 0, ()) and len(set(first)) == 5
    others = [choose(run, range(1, 51), 5, seed, ()) for seed in (1, 2)]
    (tmp_path / METRICS_FILE).write_text("b")
    others.append(choose(run, range(1, 51), 5, 0, ()))
    assert len({tuple(one) for one in [first, *others]}) == 4
    assert choose(run, range(1, 51), 5, 0, [7, 3]) == [3, 7]
    assert choose(run, [4, 6], 5, 0, ()) == [4, 6]
    with pytest.raises(UserError, match="step 51 cannot be repeated: of steps 1 to 50"):
        choose(run, range(1, 51), 5, 0, [51])
    with pytest.raises(UserError, match="no step can be repeated"):
        choose(run, [], 5, 0, ())


def test_differences_name_the_value_and_a_tolerance_is_of_numbers_alone():
    there = {"a": {"b": [1.0, 2.0]}, "c": "x", "d": None}
    assert differences(there, {"a": {"b": [1.0, 2.0]}, "c": "x", "d": None}) == []
    here = {"a": {"b": [1.0, 2.001]}, "c": "y", "d": 1}
    assert differences(there, here) == [
        "a.b[1]: 2.0 recorded, 2.001 here",
        'c: "x" recorded, "y" here',
        "d: null recorded, 1 here",
    ]
    assert [text[0] for text in differences(there, here, (1e-2, 0.0))] == ["c", "d"]
    # a value that is gone, another length, another type
    assert differences({"a": 1}, {}) == ["a: 1 recorded, null here"]
    assert differences([1], [1, 2]) == [": [1] recorded, [1, 2] here"]
    assert differences({"a": 1}, {"a": 1.0}) == ["a: 1 recorded, 1.0 here"]


def written(run: Recorded, of: str | None = None, **changes) -> Recorded:
    """With the digests of a real line in every step, its launch's among them."""
    steps = run.lines[DIGESTS_FILE]
    line = {"ids": "aa", "prompts": "bb", "params": "cc"} | changes
    own = {} if of is None else {"of": of}
    digests = {step: [{"step": step, **own, **line}] for step in steps}
    lines = copy.deepcopy({**run.lines, DIGESTS_FILE: digests})
    return Recorded(run.folder, lines, run.launches, run.origin)


@pytest.mark.parametrize("name", [METRICS_FILE, SAMPLES_FILE, TOKENS_FILE, DIGESTS_FILE, "launch"])
def test_a_change_in_any_file_of_a_step_is_seen(name):
    run = recorded_run(3, (0, {}))
    of = launch_digest(run.launches[0][1])
    there, here = written(run, of), written(run, of)
    assert compare(there, here.lines, 2, True) == ("equal", [])
    if name == "launch":
        there = written(run, "dd")
    else:
        there.lines[name][2][0]["more"] = 1  # type: ignore[index]
    _, found = compare(there, here.lines, 2, True)
    assert len(found) == 1 and found[0].startswith(name)
    assert compare(there, here.lines, 3, True)[1] == ([] if name != "launch" else found)


def test_the_evaluation_before_the_first_step_belongs_to_it():
    run = recorded_run(3, (0, {}))
    there, here = (written(run, launch_digest(run.launches[0][1])) for _ in range(2))
    there.lines[METRICS_FILE][0] = [{"step": 0, "eval/exact": 0.5}]  # type: ignore[index]
    assert len(compare(there, here.lines, 1, True)[1]) == 1
    assert compare(there, here.lines, 2, True)[1] == []


def test_on_other_devices_only_the_data_must_have_the_same_bits():
    run = recorded_run(3, (0, {}))
    of = launch_digest(run.launches[0][1])
    assert compare(written(run, of), written(run, of, params="x").lines, 2, False)[1] == []
    other = compare(written(run, of), written(run, of, ids="x").lines, 2, False)
    assert other == (SAMPLED, [])
    (text,) = compare(written(run, of), written(run, of, prompts="x").lines, 2, False)[1]
    assert "prompts" in text


def test_only_places_and_sizes_may_be_given():
    config = from_overrides({"name": "x", "model": {"source": "a"}})
    assert override(config, ["model.source=b", "mesh.fsdp=2"], "audit").model.source == "b"
    with pytest.raises(UserError, match=r"audit: seed: decides what the run is"):
        override(config, ["seed=3"], "audit")


def test_a_run_without_digests_is_told_in_a_line(tmp_run):
    (tmp_run / "config.yaml").write_text("name: x")
    (tmp_run / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match=r"it has no digests.jsonl"):
        read_recorded(as_path(tmp_run))
    (tmp_run / DIGESTS_FILE).write_text(json.dumps({"step": 0, "launch": a_launch()}) + "\n")
    with pytest.raises(UserError, match=r"no step is recorded"):
        read_recorded(as_path(tmp_run))


def a_launch(**changes) -> dict:
    config = from_overrides({"name": "x", "model": {"source": "m"}}).model_dump(mode="json")
    devices = {"kind": "EPYC", "mesh": {"data": 1}}
    return {"command": "train", "config": config, "made_of": {"weights": "aa"}, "versions": {}} | {
        "devices": devices,
        **changes,
    }


NO_DIGESTS = {
    "an empty launch": ({"step": 1, "launch": {}}, "launch.command: Field required"),
    "a launch that is none": ({"step": 1, "launch": 5}, "launch: Input should be"),
    "a launch of no config": (
        {"step": 1, "launch": a_launch(config={"rollout": {"staleness": 0}})},
        "launch: config: name: missing",
    ),
    "no contents": ({"step": 1, "launch": a_launch(made_of=None)}, "launch.made_of: Input"),
    "no parameters": ({"step": 2, "of": "aa"}, "neither a launch nor the digests of a step"),
    "a digest that is none": ({"step": 2, "of": "a", "params": "b", "ids": 5}, "neither a launch"),
}


@pytest.mark.parametrize("case", NO_DIGESTS)
def test_digests_of_another_form_are_told_by_their_line(tmp_run, case):
    line, said = NO_DIGESTS[case]
    (tmp_run / "config.yaml").write_text("name: x")
    (tmp_run / METRICS_FILE).write_text("")
    found = [{"step": 0, "launch": a_launch()}, {"step": 1, "of": "aa", "params": "bb"}, line]
    (tmp_run / DIGESTS_FILE).write_text("".join(json.dumps(one) + "\n" for one in found))
    with pytest.raises(UserError, match=f"{DIGESTS_FILE}, line 3: no run writes that: {said}"):
        read_recorded(as_path(tmp_run))


def write_recorded(folder: pathlib.Path) -> None:
    """A run of one step, as far as it is read before anything is repeated."""
    (folder / "config.yaml").write_text("name: x")
    (folder / METRICS_FILE).write_text('{"step": 1}\n')
    lines = [{"step": 0, "launch": a_launch()}, {"step": 1, "of": "aa", "params": "bb"}]
    (folder / DIGESTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_it_is_seen_at_once_that_the_certificate_cannot_be_written(tmp_run, monkeypatch):
    write_recorded(tmp_run)
    monkeypatch.setattr(audit, "examine", lambda *_: pytest.fail("repeated"))
    with pytest.raises(UserError, match=r"metrics.jsonl: is what is read"):
        audit.audit(tmp_run, output=tmp_run / METRICS_FILE)
    with pytest.raises(UserError, match=r"a.json: cannot be written \(No such file"):
        audit.audit(tmp_run, output=tmp_run / "gone" / "a.json")

    def touch(self):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.touch", touch)
    said = r"audit.json: cannot be written \(Read-only file system\); --output FILE writes"
    with pytest.raises(UserError, match=said):
        audit.audit(tmp_run)


def test_the_certificate_is_printed_before_it_is_written(tmp_run, tmp_path, monkeypatch):
    write_recorded(tmp_run)
    found = {"result": "passed", "steps": []}
    monkeypatch.setattr(audit, "examine", lambda *_: found)
    monkeypatch.setattr(audit, "describe", lambda _: "the certificate")
    output = tmp_path / "elsewhere.json"

    said = []
    monkeypatch.setattr(audit, "say", lambda text: said.append((text, output.exists())))
    assert audit.audit(tmp_run, output=output) == 0
    assert said == [("the certificate", False), (f"certificate: {output}", True)]
    assert json.loads(output.read_text()) == found and not (tmp_run / CERTIFICATE_FILE).exists()


def test_lines_of_no_recorded_step_are_found():
    run = recorded_run(3, (0, {}))
    assert line_faults(run) == []
    run.lines[METRICS_FILE][0] = []  # type: ignore[index]  the evaluation before the first step
    assert line_faults(run) == []
    for name in (METRICS_FILE, SAMPLES_FILE, TOKENS_FILE):
        for step in (-1, 5):
            run = recorded_run(3, (0, {}))
            run.lines[name][step] = []  # type: ignore[index]
            assert line_faults(run) == [f"{name}: lines of step {step}, which is no recorded step"]
    run = recorded_run(9, (5, {}), begin=5)
    run.lines[METRICS_FILE][4] = []  # type: ignore[index]
    assert len(line_faults(run)) == 1
    (text,) = line_faults(recorded_run(3, (0, {}), (7, {})))
    assert text == f"{DIGESTS_FILE}: lines of step 7, which is no recorded step"


def test_of_a_killed_run_it_is_said_that_it_can_be_resumed():
    """It writes the metrics of a step before the digests."""
    run = recorded_run(3, (0, {}))
    run.lines[METRICS_FILE][4] = []  # type: ignore[index]
    assert line_faults(run) == [
        f"{METRICS_FILE}: lines of step 4, which is no recorded step; was the run killed? resume it first"
    ]


def test_steps_that_are_missing_are_found():
    run = recorded_run(4, (0, {}))
    del run.lines[METRICS_FILE][2]  # type: ignore[attr-defined]
    assert line_faults(run) == [f"{METRICS_FILE}: no line of step 2"]
    run = recorded_run(4, (0, {}))
    for name in FILES:
        del run.lines[name][2]  # type: ignore[attr-defined]
    assert line_faults(run) == [f"{DIGESTS_FILE}: 1 of the steps 1 to 4 are missing"]
    assert base_steps(run, [2], True) == {1: None, 3: 2, 4: 2}


def config_with(**changes) -> dict:
    raw = {"name": "x", "model": {"source": "m"}} | changes
    return from_overrides(raw).model_dump(mode="json")


MAY_DIFFER = {
    "where it computes": a_launch(config=config_with(mesh={"fsdp": 2}), versions={"jax": "9"}),
    "how long": a_launch(config=config_with(train={"steps": 9})),
    "adapters that it began with": a_launch(made_of={"weights": "aa", "adapters": "bb"}),
}
WITH_KL = {"lora": {"rank": 2, "adapter": "x"}, "loss": {"kl_coefficient": 0.1}}
MUST_NOT = {
    "config.optimizer.learning_rate: 1e-06 before, 0.1 then": a_launch(
        config=config_with(optimizer={"learning_rate": 0.1})
    ),
    "config.rollout.group_size: 4 before, 2 then": a_launch(
        config=config_with(rollout={"group_size": 2})
    ),
    "made_of.weights: 'aa' before, 'bb' then": a_launch(made_of={"weights": "bb"}),
    "made_of.records: None before, 'bb' then": a_launch(made_of={"weights": "aa", "records": "bb"}),
    "command: 'train' before, 'sft' then": a_launch(command="sft"),
}


def launched(first: dict, second: dict) -> Recorded:
    return Recorded(as_path("runs/a"), {}, [(0, first), (3, second)], None)


def test_a_run_is_resumed_under_what_may_change_alone():
    for other in MAY_DIFFER.values():
        assert launch_faults(launched(a_launch(), other)) == []
    for said, other in MUST_NOT.items():
        assert launch_faults(launched(a_launch(), other)) == [f"launch behind step 3: {said}"]
    # the policy that a KL term refers to, wherever it is
    first, moved, other, gone = (
        a_launch(made_of={"adapters": name}, config=config_with(**WITH_KL | {"lora": lora}))
        for name, lora in (
            ("aa", WITH_KL["lora"]),
            ("aa", {"rank": 2, "adapter": "y"}),
            ("bb", WITH_KL["lora"]),
            ("aa", {"rank": 2}),
        )
    )
    assert launch_faults(launched(first, moved)) == []
    (said,) = launch_faults(launched(first, other))
    assert said.endswith("made_of.adapters: 'aa' before, 'bb' then")
    assert "config.lora.adapter: 'x' before, None then" in launch_faults(launched(first, gone))[0]
    # what a supervised run reads for its evaluations alone
    sampled = config_with(rollout={"group_size": 2})
    first, second = a_launch(command="sft"), a_launch(command="sft", config=sampled)
    assert launch_faults(launched(first, second)) == []


AHEAD = {"staleness": 1, "recompute_logprobs": True, "tis_cap": 2.0}


def simple(model, output, **changes) -> pathlib.Path:
    """Four steps of two updates each."""
    raw = recipe(model, output, seed=1, data={"max_prompt_tokens": 128}, **changes)
    assert launch(raw) == 0
    return output / "tiny"


def resumed(model, output) -> pathlib.Path:
    """From step 2 on, under another interval of checkpoints."""
    run = simple(model, output)
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    simple(model, output, train={"checkpoint_every": 3})
    assert len(read_recorded(as_path(run)).launches) == 2
    return run


def forked(model, output) -> pathlib.Path:
    """From step 4 of another run on, to step 6."""
    simple(model, output)
    raw = yaml.safe_load((output / "config.yaml").read_text())
    raw["train"]["steps"], raw["optimizer"]["learning_rate"] = 6, 1e-4
    assert launch(raw, "--fork", "other") == 0
    shutil.rmtree(output / "other" / "checkpoints" / "4")  # its own copy of where it begins
    return output / "other"


def supervised(model, output) -> pathlib.Path:
    raw = recipe(model, output, seed=1, data={"max_prompt_tokens": 128})
    assert launch(raw, "sft.tool_call_weight=2", command="sft") == 0
    return output / "tiny"


def with_adapters(model, output, kl: float = 0.0) -> pathlib.Path:
    """Whose KL term refers to the adapters that it began with; without one no resumed run needs their folder."""
    folder = output / "adapter"
    lora = {"rank": 2, "alpha": 4, "targets": ["q", "down"]}
    first = simple(model, output, lora=lora, train={"steps": 1})
    assert cli.main(["export", str(first), str(folder), "--adapter"]) == 0
    shutil.rmtree(first)
    changes = {"lora": lora | {"adapter": str(folder)}, "loss": {"kl_coefficient": kl}}
    run = simple(model, output, **changes)
    shutil.rmtree(run / "checkpoints" / "4")
    raw = yaml.safe_load((output / "config.yaml").read_text())
    assert launch(raw, "lora.adapter=null") == (2 if kl else 0)
    if kl:
        moved = shutil.copytree(folder, output / "moved")
        assert launch(raw, f"lora.adapter={moved}") == 0
    return run


RUNS = {
    "unbroken": simple,
    "adapters": with_adapters,
    "adapters, KL": lambda *places: with_adapters(*places, kl=0.01),
    "ahead, KL": lambda *places: simple(*places, rollout=AHEAD, loss={"kl_coefficient": 0.01}),
    "resumed": resumed,
    "forked": forked,
    "supervised": supervised,
}


def certificate(run: pathlib.Path) -> dict:
    return json.loads((run / CERTIFICATE_FILE).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_every_step_is_repeated_bit_for_bit(model, tmp_path, capsys, kind):
    run = RUNS[kind](model, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["audit", str(run), "--steps", "9"]) == 0
    found = certificate(run)
    steps = [5, 6] if kind == "forked" else [1, 2, 3, 4]
    assert [one["step"] for one in found["steps"]] == steps
    assert {one["result"] for one in found["steps"]} == {"equal"}
    assert found["steps"][0]["from"] == "the start"
    said = capsys.readouterr().out
    assert "passed" in said and said.endswith(f"certificate: {run / CERTIFICATE_FILE}\n")
    # it only reads
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {run / CERTIFICATE_FILE}


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> pathlib.Path:
    return simple(model, tmp_path_factory.mktemp("audited"))


@pytest.mark.slow
def test_on_another_mesh_numbers_are_compared_by_tolerance(run):
    assert cli.main(["audit", str(run), "--at", "3", "mesh.data=1", "mesh.fsdp=-1"]) == 0
    found = certificate(run)
    assert found["comparison"].startswith("by tolerance, since other: devices.mesh.")
    assert [one["result"] for one in found["steps"]] == ["within tolerance"]
    assert found["steps"][0]["checkpoint"] is not None


@pytest.mark.slow
def test_a_checkpoint_whose_parameters_are_of_another_step_is_found(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    last = other / "checkpoints" / "3"
    shutil.rmtree(last / "params")
    shutil.copytree(other / "checkpoints" / "2" / "params", last / "params")
    write_manifest(as_path(last))
    assert cli.main(["audit", str(other), "--at", "4"]) == 1
    assert certificate(other)["steps"][0]["differences"][0].startswith("checkpoint 3: params: ")


def other_parameters(last: pathlib.Path) -> None:
    shutil.rmtree(last / "params")
    shutil.copytree(last.parent / "2" / "params", last / "params")


def other_contents(last: pathlib.Path) -> None:
    (path,) = (x for x in (last / "loader").iterdir() if MADE_OF in x.read_text())
    tree = json.loads(path.read_text())
    tree[MADE_OF]["weights"] = "0000000000000000"
    path.write_text(json.dumps(tree))


SWAPPED = {
    other_parameters: "checkpoint 4: params: ",
    other_contents: "checkpoint 4: made_of.weights: ",
}


@pytest.mark.slow
def test_the_checkpoint_behind_a_step_is_that_of_the_step(run, tmp_path):
    """Export writes the newest, which no step is repeated from."""
    repeaters, path = Repeaters(), run / "checkpoints" / "4"
    found = examine(read_recorded(as_path(run)), 1, 0, [4], repeaters)
    assert found["result"] == "passed"
    assert found["steps"][0]["checkpoint"] == manifest_digest(as_path(path))
    for swap, said in SWAPPED.items():
        other = shutil.copytree(run, tmp_path / swap.__name__)
        swap(other / "checkpoints" / "4")
        (found,) = examine(read_recorded(as_path(other)), 1, 0, [4], repeaters)["steps"]
        assert found["differences"][0].startswith("checkpoint 4: damaged: ")
        write_manifest(as_path(other / "checkpoints" / "4"))
        (found,) = examine(read_recorded(as_path(other)), 1, 0, [4], repeaters)["steps"]
        (text,) = found["differences"]
        assert text.startswith(said) and found["checkpoint"] is None, text
    other = shutil.copytree(run, tmp_path / "gone")
    shutil.rmtree(other / "checkpoints" / "4")
    (found,) = examine(read_recorded(as_path(other)), 1, 0, [4], repeaters)["steps"]
    assert found["result"] == "equal" and found["checkpoint"] is None


def add(path: pathlib.Path, *lines: dict) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def a_line_behind_the_last_step(run: pathlib.Path) -> None:
    add(run / METRICS_FILE, {"step": 5, "eval/exact": 0.999})


def a_line_before_the_first_step(run: pathlib.Path) -> None:
    text = json.dumps({"step": -1, "eval/exact": 0.999}) + "\n"
    (run / METRICS_FILE).write_text(text + (run / METRICS_FILE).read_text())


def samples_of_a_step_that_was_not_made(run: pathlib.Path) -> None:
    add(run / SAMPLES_FILE, {"step": 9, "split": "eval", "completion": "right"})


def digests_that_end_before(run: pathlib.Path) -> None:
    lines = (run / DIGESTS_FILE).read_text().splitlines(keepends=True)
    (run / DIGESTS_FILE).write_text("".join(x for x in lines if json.loads(x)["step"] < 4))


def steps_in_another_order(run: pathlib.Path) -> None:
    lines = (run / METRICS_FILE).read_text().splitlines(keepends=True)
    (run / METRICS_FILE).write_text("".join(lines[-1:] + lines[:-1]))


def a_launch_that_made_no_step(run: pathlib.Path) -> None:
    (_, first), *_ = read_recorded(as_path(run)).launches
    config = first["config"] | {"optimizer": first["config"]["optimizer"] | {"learning_rate": 0.5}}
    made_of = first["made_of"] | {"weights": "0000000000000000"}
    add(
        run / DIGESTS_FILE,
        {"step": 4, "launch": first | {"config": config, "made_of": made_of}},
    )
    (run / "config.yaml").write_text(yaml.safe_dump(config))


FORGED = {
    a_line_behind_the_last_step: f"{METRICS_FILE}: lines of step 5",
    a_line_before_the_first_step: f"{METRICS_FILE}: lines of step -1",
    samples_of_a_step_that_was_not_made: f"{SAMPLES_FILE}: lines of step 9",
    digests_that_end_before: f"{METRICS_FILE}: lines of step 4",
    steps_in_another_order: f"{METRICS_FILE}: its steps do not ascend",
    a_launch_that_made_no_step: "launch behind step 4: config.optimizer.learning_rate: 0.001 before, 0.5",
}  # fmt: skip


@pytest.mark.slow
def test_what_belongs_to_no_step_that_is_repeated_is_found_as_well(run, tmp_path):
    repeaters = Repeaters()
    for forge, said in FORGED.items():
        other = shutil.copytree(run, tmp_path / forge.__name__)
        forge(other)
        found = examine(read_recorded(as_path(other)), 1, 0, [3], repeaters)
        assert found["result"] == "failed" and found["steps"][0]["result"] == "equal", forge
        assert found["findings"][0].startswith(said), found["findings"]
        assert found["made_of"]["weights"] != "0000000000000000"


@pytest.mark.slow
def test_from_other_weights_only_steps_behind_a_checkpoint_can_be_repeated(run):
    """The run itself is a model like its start, with other weights."""
    source = f"model.source={run}"
    assert cli.main(["audit", str(run), "--steps", "9", source]) == 0
    assert [one["step"] for one in certificate(run)["steps"]] == [2, 3, 4]
    assert cli.main(["audit", str(run), "--at", "1", source]) == 2


@pytest.mark.slow
def test_every_tampered_copy_is_found_and_no_other(model, tmp_path):
    """REST_JAX_TAMPERED copies with one change each, and a quarter as many without one."""
    count = int(os.environ.get("REST_JAX_TAMPERED", "40"))
    raw = recipe(model, tmp_path, seed=1, data={"max_prompt_tokens": 128})
    finish(start("train", raw, tmp_path))
    copies = tmp_path / "copies"
    copies.mkdir()
    words = [str(PROGRAMS / "tampered.py"), str(tmp_path / "tiny"), str(copies), str(count)]
    process = subprocess.Popen(
        [sys.executable, *words, str(count // 4)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    results = collections.Counter()
    with contextlib.closing(process.stdout):  # type: ignore[type-var]
        for text in process.stdout:  # type: ignore[union-attr]
            one = json.loads(text)
            results[one["kind"] != "none", one["result"]] += 1
            assert one["result"] == ("passed" if one["kind"] == "none" else "failed"), text
    assert process.wait() == 0
    assert results == {(True, "failed"): count, (False, "passed"): count // 4}
