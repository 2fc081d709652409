"""Many processes over loopback do what one does: the same metrics, parameters and files; a lost one ends the others."""

import json
import pathlib
import re
import shutil
import signal
import time
from typing import Any

import jax
import numpy as np
import optax
import pytest
import yaml

from rest_jax import config as config_lib
from rest_jax.data.synthetic import world as synthetic
from rest_jax.errors import UNFINISHED
from rest_jax.rollout.tokens import read_record
from rest_jax.run.load import load_policy
from rest_jax.run.metrics import read_lines
from tests.data.writing import write_records
from tests.runs import finish, lines, recipe, start, start_processes, state

pytestmark = pytest.mark.multihost

# The learning rate is low: the order of sums changes no sampled token then.
TWO_STEPS = {
    "train": {"steps": 2, "checkpoint_every": 2, "prompts_per_update": 4},
    "rollout": {"prompts_per_step": 8},
    "optimizer": {"learning_rate": 1e-5},
}
# (processes, devices of each, mesh); `rollout`: the tensor size of the rollout
RUNS = {
    "data": (2, 1, {"data": 2}),
    "fsdp": (2, 1, {"fsdp": 2}),
    "tensor across processes": (2, 1, {"fsdp": 1, "tensor": 2}),
    "tensor in processes": (2, 2, {"fsdp": 2, "tensor": 2}),
    "four": (4, 1, {"data": 2, "fsdp": 2}),
    "two shards on two processes each": (4, 1, {"fsdp": 2, "tensor": 2}),
    "a rollout over more devices": (2, 2, {"fsdp": 4, "rollout": 2}),
    "a rollout in other processes": (2, 1, {"tensor": 2, "fsdp": 1, "rollout": 1}),
}


def write(path: pathlib.Path, raw: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def two_steps(model: pathlib.Path, output: pathlib.Path, mesh: dict) -> str:
    raw, mesh = recipe(model, output, **TWO_STEPS), dict(mesh)
    raw["rollout"]["tensor"] = mesh.pop("rollout", None)
    return write(output / "config.yaml", raw | {"mesh": {"data": 1, "fsdp": 1} | mesh})


@pytest.fixture(scope="module")
def one(model, tmp_path_factory) -> pathlib.Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    finish(start("train", recipe(model, folder, **TWO_STEPS), folder))
    return folder / "tiny"


def assert_close(found: pathlib.Path, expected: pathlib.Path) -> None:
    """Two runs have the same metrics, but for the order of sums and the packing, which depends on
    the mesh, and their parameters have moved alike.
    """
    for line, other in zip(lines(found), lines(expected), strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if name not in ("update/padding", "update/micro_batches"):
                assert line[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    assert_tokens_close(found, expected)
    for run in (found, expected):
        assert_rates_are_global(run)
    config = config_lib.load([expected / "config.yaml"])
    start = load_policy(config.model, config_lib.MeshConfig()).params
    params, others = (state(run)[0].params for run in (found, expected))
    apart, moved = (
        optax.tree.norm(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), one, two))
        for one, two in ((params, others), (others, start))
    )
    assert float(apart) < 0.02 * float(moved)


def assert_tokens_close(found: pathlib.Path, expected: pathlib.Path) -> None:
    """The first process has written the tokens of the first groups that it samples, which on several processes may be fewer than
    one process writes, with the weights that belong to them.
    """
    steps = [
        [read_record(line) for line in read_lines(run / "tokens.jsonl")]
        for run in (found, expected)
    ]
    for own, other in zip(*steps, strict=True):
        theirs = {prompt["id"]: prompt for prompt in other["prompts"]}
        names = [prompt["id"] for prompt in own["prompts"]]
        assert names and names == list(theirs)[: len(names)]
        for prompt in own["prompts"]:
            for one, same in zip(
                prompt["completions"], theirs[prompt["id"]]["completions"], strict=True
            ):
                assert one["tokens"]["id"] == same["tokens"]["id"]
                for name in ("weight", "logp", "entropy"):
                    assert one["tokens"][name] == pytest.approx(
                        same["tokens"][name], rel=2e-3, abs=2e-3
                    ), name
                assert one["advantage"] == pytest.approx(same["advantage"], abs=2e-3)


def assert_rates_are_global(run: pathlib.Path) -> None:
    """A rate times its seconds is what all processes did in a step, not what the first one did."""
    groups = TWO_STEPS["rollout"]["prompts_per_step"]
    for line in read_lines(run / "metrics.jsonl"):
        if "update/loss" not in line:
            continue
        sampled, completions = line["rollout/tokens"], groups * 4
        done = {
            "tokens_per_second": (sampled, "step"),
            "rollout_tokens_per_second": (sampled, "rollout"),
            "reward_tokens_per_second": (sampled, "score"),
            "reward_responses_per_second": (completions, "score"),
            "update_tokens_per_second": (
                sampled + completions * line["rollout/prompt_tokens"],
                "update",
            ),
        }
        for rate, (amount, seconds) in done.items():
            found = line[f"time/{rate}"] * line[f"time/{seconds}"]
            assert found == pytest.approx(amount, rel=1e-4), rate


@pytest.mark.parametrize("name", RUNS)
def test_many_processes_equal_one(model, one, tmp_path, name):
    count, devices, mesh = RUNS[name]
    for process in start_processes(["train", two_steps(model, tmp_path, mesh)], count, devices):
        finish(process)
    assert_close(tmp_path / "tiny", one)


def test_many_processes_with_lora_equal_one(model, tmp_path):
    raw = recipe(model, tmp_path / "one", **TWO_STEPS) | {"lora": {"rank": 4}}
    (tmp_path / "one").mkdir()
    finish(start("train", raw, tmp_path / "one"))
    raw |= {"output": str(tmp_path / "two"), "mesh": {"data": 1, "fsdp": 1, "tensor": 2}}
    for process in start_processes(["train", write(tmp_path / "two.yaml", raw)], 2):
        finish(process)
    found, expected = (lines(tmp_path / name / "tiny") for name in ("two", "one"))
    for line, other in zip(found, expected, strict=True):
        for name in set(other) - {"update/padding", "update/micro_batches"}:
            assert line[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), name


PLUGIN = """
def score(completion, text, record, target):
    if len(text) % 7 == 0:
        raise ValueError("seven")
    return {"length": len(text) / 100, "one": 1.0}
"""


def test_each_process_asks_a_plugin_about_its_own_rows(model, tmp_path):
    """Also where two processes have the same rows: the metrics count each completion once."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    mesh = {"fsdp": 2, "tensor": 2}
    reward = {"reward": {"plugin": f"{tmp_path}/mine.py:score", "plugin_workers": 2}}
    raw = recipe(model, tmp_path / "one", **TWO_STEPS) | reward
    (tmp_path / "one").mkdir()
    finish(start("train", raw, tmp_path / "one"))
    many = raw | {"output": str(tmp_path / "many"), "mesh": {"data": 1} | mesh}
    path = write(tmp_path / "many" / "config.yaml", many)
    for process in start_processes(["train", path], 4):
        finish(process)
    found, expected = (lines(tmp_path / name / "tiny") for name in ("many", "one"))
    for line, other in zip(found, expected, strict=True):
        for name in line:
            if "/part/" in name or "plugin" in name:
                assert line[name] == pytest.approx(other[name], rel=1e-6), name
    assert any(line.get("reward/plugin_failures") for line in found)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_a_process_is_lost(model, tmp_path, victim):
    raw = recipe(model, tmp_path, train={"steps": 500, "checkpoint_every": 500})
    path = write(tmp_path / "config.yaml", raw | {"mesh": {"data": 2, "fsdp": 1}})
    words = ["train", path, "data.synthetic_size=4096", "train.eval_every=0"]
    processes = start_processes(words, 2)
    metrics, other = tmp_path / "tiny" / "metrics.jsonl", processes[1 - victim]
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and "update/loss" in metrics.read_text()):
        assert other.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    out, _ = other.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert other.returncode != 0
    (said,) = [line for line in out.splitlines() if "rest-jax: error" in line]
    assert re.search(r"process.* is lost", said) and "run the same command" in said
    assert "Traceback" not in out and "Check failure" not in out, out


def test_the_others_are_told_why_a_process_ends(model, tmp_path):
    path = two_steps(model, tmp_path, {"data": 2})
    absent = ["train", path, "data.train=nowhere.jsonl"]
    first, second = start_processes(["train", path], 2, programs={1: absent})
    assert "nowhere.jsonl: no such file" in finish(second, 2)
    out = finish(first, 1)
    (said,) = [line for line in out.splitlines() if "rest-jax: error" in line]
    assert "process 1 of 2 ended: " in said and "nowhere.jsonl" in said


def test_a_run_resumes_on_another_number_of_processes(model, one, tmp_path):
    raw = recipe(model, tmp_path, **TWO_STEPS) | {"mesh": {"fsdp": 2}}
    raw["train"] |= {"checkpoint_every": 1}
    path = write(tmp_path / "config.yaml", raw)
    # one more step than there is time for: both are killed once the first one is saved
    processes = start_processes(["train", path], 2)
    saved = tmp_path / "tiny" / "checkpoints" / "1" / "manifest.json"
    deadline = time.monotonic() + 300
    while not saved.exists():
        assert processes[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start("train", raw | {"mesh": {"data": 1, "fsdp": 1}}, tmp_path))
    assert_close(tmp_path / "tiny", one)


def test_a_signal_to_one_process_stops_all_and_the_run_resumes(model, one, tmp_path):
    path = two_steps(model, tmp_path, {"data": 2})
    processes = start_processes(["train", path], 2)
    metrics, deadline = tmp_path / "tiny" / "metrics.jsonl", time.monotonic() + 300
    while not (
        metrics.is_file() and metrics.stat().st_size
    ):  # the evaluation before the first step
        assert processes[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    said = [finish(process, UNFINISHED) for process in processes]
    assert "run the same command to resume" in said[0] and "Traceback" not in "".join(said)
    for process in start_processes(["train", path], 2):
        finish(process)
    assert_close(tmp_path / "tiny", one)


# (processes, devices of each, mesh)
CONTINUED = {
    "2x2": (1, 4, {"data": 2, "fsdp": 2}),
    "two processes": (2, 2, {"data": 2, "fsdp": 2}),
    "two processes, fsdp across": (2, 2, {"fsdp": 4}),
}


@pytest.fixture(scope="module")
def one_by_four(model, tmp_path_factory) -> pathlib.Path:
    """Two steps on mesh 1x4, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("one_by_four")
    words = ["train", two_steps(model, folder, {"fsdp": 4}), "train.checkpoint_every=1"]
    (process,) = start_processes(words, 1, devices=4)
    finish(process)
    return folder / "tiny"


@pytest.mark.parametrize("name", CONTINUED)
def test_a_checkpoint_continues_on_another_mesh(model, one_by_four, tmp_path, name):
    """From the first checkpoint the second step has the same samples and the same loss."""
    count, devices, mesh = CONTINUED[name]
    run = shutil.copytree(one_by_four, tmp_path / "tiny")
    shutil.rmtree(run / "checkpoints" / "2")
    words = ["train", two_steps(model, tmp_path, mesh), "train.checkpoint_every=1"]
    for process in start_processes(words, count, devices):
        finish(process)
    found, expected = (
        next(line for line in lines(folder) if line["step"] == 2 and "update/loss" in line)
        for folder in (run, one_by_four)
    )
    assert found["reward/mean"] == expected["reward/mean"]
    assert found["update/loss"] == pytest.approx(expected["update/loss"], abs=1e-6)
    assert found["update/grad_norm"] == pytest.approx(expected["update/grad_norm"], rel=1e-4)


def test_processes_share_the_tokenising(model, tmp_path):
    """Of a file each tokenises its part; another number of processes finds what is there."""
    data = tmp_path / "train.jsonl"
    write_records(data, synthetic.world("train", 0, 600, "single"))
    runs = {}
    for count in (2, 1):
        raw = recipe(model, tmp_path, **TWO_STEPS) | {"name": f"of{count}"}
        raw |= {"mesh": {"data": count, "fsdp": 1}}
        raw["data"] |= {"train": str(data)}
        path = write(tmp_path / f"{count}.yaml", raw)
        for process in start_processes(["train", path], count):
            finish(process)
        runs[count] = tmp_path / f"of{count}"
    (folder,) = (tmp_path / ".tokenised").iterdir()
    names = {"tokens-{}-of-2.bin", "records-{}-of-2.jsonl", "index-{}-of-2.npz"}
    parts = {name.format(i) for name in names for i in range(2)}
    assert {path.name for path in folder.iterdir()} == parts | {"complete.json"}
    assert_close(runs[2], runs[1])


def test_dynamic_sampling_on_two_processes_is_that_of_one(model, tmp_path):
    """Also where one of them has nothing to sample again."""
    rollout = TWO_STEPS["rollout"] | {"dynamic_sampling": 2}
    found = []
    for count in (1, 2):
        raw = recipe(model, tmp_path / str(count), **TWO_STEPS | {"rollout": rollout})
        raw["mesh"] = {"data": count, "fsdp": 1}
        (tmp_path / str(count)).mkdir()
        for process in start_processes(["train", write(tmp_path / f"{count}.yaml", raw)], count):
            finish(process)
        found.append(lines(tmp_path / str(count) / "tiny"))
    for line, other in zip(*found, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if name not in ("update/padding", "update/micro_batches"):
                assert line[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    sampled = [line["rollout/groups_sampled"] for line in found[0] if "update/loss" in line]
    most = 3 * rollout["prompts_per_step"]
    assert all(rollout["prompts_per_step"] < count <= most for count in sampled)
    assert any(count < most for count in sampled)


def test_processes_that_read_other_data_are_told(model, tmp_path):
    data = [tmp_path / str(i) / "train.jsonl" for i in range(2)]
    programs = {}
    for i, path in enumerate(data):
        path.parent.mkdir()
        write_records(path, synthetic.world("train", i, 20, "single"))
        raw = recipe(model, tmp_path, **TWO_STEPS) | {"mesh": {"data": 2, "fsdp": 1}}
        raw["data"] |= {"train": str(path)}
        programs[i] = ["train", write(tmp_path / f"{i}.yaml", raw)]
    for process in start_processes(programs[0], 2, programs={1: programs[1]}):
        out = finish(process, 2)
        assert "reads something else than process" in out and "Traceback" not in out
    assert not (tmp_path / ".tokenised").exists()


COMMANDS = {
    "evaluate": ["evaluate", "RUN", "synthetic:eval", "--limit", "5", "--output", "OUT/scored.jsonl"],
    "generate": ["generate", "RUN", "--file", "synthetic:eval", "--limit", "3", "--greedy"],
    "export": ["export", "RUN", "OUT/hf"],
    # an untrained policy earns the same reward everywhere, so has no gradient
    "variance": ["variance", "configs/quickstart_policy", "synthetic:eval", "--prompts", "8", "--tokens", "2",
                 "--output", "OUT/variance", "data.brief_prompt=true", "rollout.max_response_tokens=96"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_run_a_model(one, tmp_path, command):
    """Two processes write and print what one does."""
    results = []
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        words = [w.replace("RUN", str(one)).replace("OUT", str(out)) for w in COMMANDS[command]]
        first, *others = [finish(p) for p in start_processes(words, count)]
        assert not any("error" in text for text in [first, *others])
        assert all("|" not in text and "exported" not in text for text in others)
        # gloo greets on stdout
        said = [line for line in first.splitlines() if not line.startswith("[Gloo]")]
        results.append(("\n".join(said).replace(str(out), "OUT"), contents(out)))
    (said, files), (said_by_two, files_of_two) = results
    assert said and files.keys() == files_of_two.keys()
    if command == "variance":
        alone, shared = (json.loads(f["variance/variance.json"]) for f in (files, files_of_two))
        assert alone["groups_with_advantage"] == shared["groups_with_advantage"] > 0
        for kind in ("regions", "rules"):
            assert numbers(alone[kind]) == pytest.approx(numbers(shared[kind]), rel=1e-3, abs=1e-6)
        return
    assert said == said_by_two and files == files_of_two


def numbers(tree: Any, path: str = "") -> dict[str, float]:
    """Those in a tree of JSON, by their places."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in pairs for k, v in numbers(value, f"{path}/{key}").items()}
    return {path: tree} if isinstance(tree, int | float) else {}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_folders_that_are_not_shared_are_one_line_before_anything_is_loaded(tmp_path):
    """Each process has an output folder of its own, as on hosts without a shared file system."""
    begun, commands = time.monotonic(), {}
    for index in range(2):
        # There is no such model: it would be named if it was looked for.
        raw = recipe(tmp_path / "no-model", tmp_path / f"host-{index}")
        path = write(tmp_path / str(index) / "config.yaml", raw | {"mesh": {"data": 2, "fsdp": 1}})
        commands[index] = ["train", path]
    for process in start_processes([], 2, programs=commands):
        out = finish(process, 2)
        (line,) = [line for line in out.splitlines() if "error" in line]
        assert "not shared by all processes: process 0" in line and "gs://BUCKET" in line
        assert "compil" not in out and "no-model" not in out
    assert time.monotonic() - begun < 30
