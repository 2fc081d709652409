"""The whole loop on a tiny random policy: resumption bit for bit after SIGKILL, SIGTERM, NaN, refusals, supervised start."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml

from rest_jax import cli
from rest_jax import config as config_lib
from rest_jax.models.decoder import init_params
from rest_jax.models.hf.config import decoder_config
from rest_jax.models.hf.write import export
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.step import init_state
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.metrics import read_lines
from rest_jax.run.policy import load_policy

STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory, configs_dir) -> pathlib.Path:
    """An HF folder: the quickstart's tokenizer, two random layers."""
    folder = tmp_path_factory.mktemp("model")
    files = folder / "files"
    shutil.copytree(
        configs_dir / "quickstart_policy", files, ignore=shutil.ignore_patterns("*.safetensors")
    )
    path = files / "config.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 64}
    raw = (
        json.loads(path.read_text()) | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}
    )
    raw.pop("layer_types", None)
    path.write_text(json.dumps(raw))
    params = jax.tree.map(lambda x: x * 3, init_params(decoder_config(raw), jax.random.key(0)))
    export(params, files, folder / "hf")
    return folder / "hf"


def recipe(model: pathlib.Path, output: pathlib.Path, **changes) -> dict:
    """A run of four steps, two updates each, a checkpoint after every step."""
    raw = {
        "name": "tiny",
        "output": str(output),
        "model": {"source": str(model), "remat": "none"},
        "data": {"synthetic_size": 64, "eval_limit": 8, "brief_prompt": True},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 24},
        "optimizer": {"learning_rate": 1e-3},
        "mesh": {"data": 1, "fsdp": 1 if len(jax.devices()) == 1 else -1},
        "train": {
            "steps": STEPS,
            "prompts_per_update": 2,
            "eval_every": 2,
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
        },
        "sft": {"batch_size": 4},
    }
    for section, values in changes.items():
        raw[section] = raw[section] | values if isinstance(values, dict) else values
    return raw


def environment() -> dict[str, str]:
    """One device: the runs are started as a user would."""
    return os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": str(pathlib.Path(cli.__file__).parent.parent),
    }


def start(command: str, raw: dict, folder: pathlib.Path) -> subprocess.Popen:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    words = [sys.executable, "-m", "rest_jax", command, str(path)]
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


def lines(run: pathlib.Path) -> list[dict]:
    """Metrics without the clock."""
    found = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def state(run: pathlib.Path):
    """Everything the newest checkpoint holds."""
    config = config_lib.load([run / "config.yaml"])
    loaded = load_policy(config.model, config_lib.MeshConfig(fsdp=-1))
    tx = make_optimizer(config.optimizer, STEPS * 2)
    _, abstract, _ = init_state(loaded, tx, Schedule(config.weights, config.curriculum, STEPS), 0)
    with Checkpoints(run, 9) as checkpoints:
        return checkpoints.restore(abstract)


def same(a, b) -> None:
    def leaf(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(leaf, a[0], b[0])
    assert a[1:] == b[1:]


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start("train", recipe(model, folder), folder))
    return folder / "tiny"


def test_a_run_leaves_what_it_says(unbroken):
    found = lines(unbroken)
    assert [line["step"] for line in found] == [0, 1, 2, 2, 3, 4, 4]
    steps = [line for line in found if "update/loss" in line]
    assert len(steps) == STEPS
    assert all(line["rollout/logp_mismatch"] < 1e-3 for line in steps)
    assert [line["curriculum/nu"] for line in steps] == pytest.approx([0, 0.25, 0.5, 0.75])
    for region in ("tag", "think", "other"):
        assert f"region/{region}/weight_share" in steps[0]
    samples = read_lines(unbroken / "samples.jsonl")
    assert all({"split", "id", "response", "reward"} <= sample.keys() for sample in samples)
    assert {sample["split"] for sample in samples} == {"train", "eval"}
    assert (unbroken / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("moment", [1, 3])
def test_killed_and_restarted_is_the_unbroken_run(model, unbroken, tmp_path, moment):
    raw = recipe(model, tmp_path)
    process = start("train", raw, tmp_path)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("update/loss") >= moment):
        assert process.poll() is None and time.monotonic() < deadline, (
            process.stdout and process.stdout.read()
        )
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with metrics.open("a") as file:
        file.write('{"step": 3, "half of a li')  # what a kill within a write leaves
    finish(start("train", raw, tmp_path))
    assert lines(tmp_path / "tiny") == lines(unbroken)
    same(state(tmp_path / "tiny"), state(unbroken))


def test_sigterm_saves_and_ends_well(model, unbroken, tmp_path):
    raw = recipe(model, tmp_path, train={"checkpoint_every": 100})
    process = start("train", raw, tmp_path)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while not (metrics.is_file() and "update/loss" in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved at step" in finish(process)
    finish(start("train", raw, tmp_path))
    assert lines(tmp_path / "tiny") == lines(unbroken)


def test_nan_stops_the_run_and_saves_its_batch(model, tmp_path, capsys):
    path = tmp_path / "nan.yaml"
    changes = {"optimizer": {"learning_rate": 1e38, "max_grad_norm": None}}
    path.write_text(yaml.safe_dump(recipe(model, tmp_path, **changes)))
    assert cli.main(["train", str(path), "mesh.fsdp=1", "mesh.data=-1", "rollout.prompts_per_step=8",
                     "train.prompts_per_update=8"]) == 1  # fmt: skip
    assert "not finite" in capsys.readouterr().err
    (batch,) = (tmp_path / "tiny").glob("nan_step_*.npz")
    assert {"prompt", "responses", "logp", "region", "reward"} <= set(np.load(batch))


def test_a_folder_of_another_config_is_refused(model, unbroken, capsys):
    path = unbroken.parent / "other.yaml"
    path.write_text(
        yaml.safe_dump(recipe(model, unbroken.parent, optimizer={"learning_rate": 2e-3}))
    )
    before = sorted(p.name for p in unbroken.iterdir())
    arguments = [
        "mesh.fsdp=1",
        "mesh.data=-1",
        "rollout.prompts_per_step=8",
        "train.prompts_per_update=8",
    ]
    assert cli.main(["train", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert "optimizer.learning_rate: 0.001 there, 0.002 now" in error and error.count("\n") == 1
    assert sorted(p.name for p in unbroken.iterdir()) == before


@pytest.mark.parametrize(
    "override, said",
    [
        ("rollout.prompts_per_step=6", "8"),
        ("data.max_prompt_tokens=5", "data.max_prompt_tokens 5"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("rollout.temprature=1", "nearest: temperature"),
        ("mesh.tensor=3", "3"),
        ("data.synthetic_size=4", "4 prompts, fewer than"),
        ("data.eval=nowhere.parquet", "nowhere.parquet"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, tmp_path, capsys, override, said):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe(model, tmp_path / "out")))
    assert (
        cli.main(
            [
                "train",
                str(path),
                "train.prompts_per_update=null",
                "rollout.prompts_per_step=8",
                override,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_supervised_run_starts_reinforcement(model, tmp_path):
    raw = recipe(model, tmp_path, name="gold", sft={"batch_size": 8, "tool_call_weight": 2.0})
    raw["data"] |= {"train": "synthetic:demonstrations"}
    finish(start("sft", raw, tmp_path))
    losses = [line["update/loss"] for line in lines(tmp_path / "gold") if "update/loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    finish(start("train", recipe(tmp_path / "gold", tmp_path, train={"steps": 1}), tmp_path))
    assert lines(tmp_path / "tiny")[-1]["step"] == 1
