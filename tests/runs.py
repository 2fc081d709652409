"""Small runs for the tests: their config, starting the program as a user would, and what it left behind."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np
import yaml

import rest_jax
from rest_jax import cli
from rest_jax import config as config_lib
from rest_jax.files import Location, as_path
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.step import abstract_state
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.load import load_trained
from rest_jax.run.metrics import read_lines

STEPS = 4
ROOT = pathlib.Path(rest_jax.__file__).parent.parent
PROGRAMS = pathlib.Path(__file__).parent / "programs"


def recipe(model: Location, output: Location, **changes) -> dict:
    """A run of four steps, two updates each, a checkpoint after every step."""
    raw = {
        "name": "tiny",
        "output": str(output),
        "model": {"source": str(model), "remat": "none"},
        "data": {"synthetic_size": 64, "eval_limit": 8, "brief_prompt": True},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 24},
        # so that completions of a random policy, none of which has the format, differ in their reward
        "reward": {"length_weight": 1.0, "length_target_tokens": 24},
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
        raw[section] = raw.get(section, {}) | values if isinstance(values, dict) else values
    return raw


def environment() -> dict[str, str]:
    """One device and no PyTorch: the runs are started as a user would."""
    return os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{PROGRAMS / 'site'}",
        "PYTHONFAULTHANDLER": "1",
    }


def write_config(raw: dict, folder: pathlib.Path) -> str:
    """The path of its file in that folder."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


# One prompt each of the eight devices of the tests.
WIDE = (
    "mesh.fsdp=1", "mesh.data=-1", "rollout.prompts_per_step=8", "train.prompts_per_update=4",
    "sft.batch_size=8",
)  # fmt: skip


def launch(raw: dict, *words: str, command: str = "train") -> int:
    """`rest-jax COMMAND` in this process, over its eight devices; the exit code."""
    output = pathlib.Path(raw["output"])
    output.mkdir(exist_ok=True)
    given = {word.partition("=")[0] for word in words}
    wide = [word for word in WIDE if word.partition("=")[0] not in given]
    return cli.main([command, write_config(raw, output), *wide, *words])


def start(
    command: str, raw: dict, folder: pathlib.Path, *options: str, program: str | None = None
) -> subprocess.Popen:
    """`rest-jax COMMAND` on a config; `program`: a file of tests/programs that takes the place of the command line."""
    path = write_config(raw, folder)
    words = ["-m", "rest_jax"] if program is None else [str(PROGRAMS / program)]
    return subprocess.Popen(
        [sys.executable, *words, command, path, *options],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_command(*words: str) -> subprocess.Popen:
    """`rest-jax WORDS`."""
    return subprocess.Popen(
        [sys.executable, "-m", "rest_jax", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_processes(
    words: list[str],
    count: int,
    devices: int = 1,
    programs: dict[int, list[str]] | None = None,
    program: Sequence[str] = ("-m", "rest_jax"),
) -> list[subprocess.Popen]:
    """`rest-jax WORDS --distributed I/COUNT@..`, in every process with so many devices; `programs`: other words of some;
    `program`: what takes the place of the command line.
    """
    address = f"127.0.0.1:{free_port()}"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return [
        subprocess.Popen(
            [
                sys.executable,
                *program,
                *(programs or {}).get(i, words),
                "--distributed",
                f"{i}/{count}@{address}",
            ],
            env=environment() | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """The output of a program that ends with this exit code."""
    try:
        out, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # its threads say where they are
        out, _ = process.communicate()
    assert process.returncode == code, out
    return out


def run_together(program: str, *words: str, options: Sequence[str] = ()) -> list[list[str]]:
    """The lines that each of two processes of a file of tests/programs prints: PROGRAM WORDS ADDRESS INDEX OPTIONS."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAMS / program), *words, address, str(index), *options],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    return [finish(process).splitlines() for process in started]


def lines(run: Location) -> list[dict]:
    """Metrics without the clock."""
    return [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in read_lines(as_path(run) / "metrics.jsonl")
    ]


def state(run: Location):
    """Everything the newest checkpoint holds."""
    run = as_path(run)
    config = config_lib.load([run / "config.yaml"])
    mesh = {"mesh": config_lib.MeshConfig(fsdp=-1)}
    policy = load_trained(config.model_copy(update=mesh))
    tx = make_optimizer(config.optimizer, STEPS * 2)
    schedule = Schedule.of(config, STEPS)
    abstract, _ = abstract_state(policy, tx, schedule)
    with Checkpoints(run, 9) as checkpoints:
        return checkpoints.restore(abstract)


def assert_same(a, b) -> None:
    """Two results of `state` are equal bit for bit."""

    def leaf(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(leaf, a[0], b[0])
    assert a[1:] == b[1:]
