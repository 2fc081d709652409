"""Audits copies of a run, each with one change of what it recorded, in one process: RUN FOLDER TAMPERED UNTOUCHED.

A line of JSON a copy: {"kind", "step", "changed", "result", "differences"}; kind "none" is an untouched one.
"""

import contextlib
import io
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from rest_jax.run import environment

environment.configure()  # as the command line, or equal bits could not be expected

from rest_jax import config
from rest_jax.audit import Repeaters, examine
from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.rollout.tokens import read_record, write_record
from rest_jax.run.metrics import CONFIG_FILE, DIGESTS_FILE, METRICS_FILE, SAMPLES_FILE, TOKENS_FILE
from rest_jax.run.record import read_recorded

Line = dict[str, Any]
SCORES = ("reward", "correctness_part", "accuracy")


def a_reward(line: Line, rng: np.random.Generator) -> str:
    name = str(rng.choice(SCORES))
    line[name] = float(np.nextafter(line[name], np.inf))
    return name


def a_metric(line: Line, rng: np.random.Generator) -> str:
    name = str(rng.choice([name for name in line if name != "step" and "time/" not in name]))
    value = line[name]
    line[name] = value + 1 if isinstance(value, int) else float(np.nextafter(value, np.inf))
    return name


def of_a_completion(change: Callable[[Line, np.random.Generator], str]) -> Callable[..., str]:
    """A change of one of the completions that the token viewer shows."""

    def of_line(line: Line, rng: np.random.Generator) -> str:
        record = read_record(line)
        prompt = record["prompts"][rng.integers(len(record["prompts"]))]
        name = change(prompt["completions"][rng.integers(len(prompt["completions"]))], rng)
        line |= write_record(record)
        return name

    return of_line


def a_token(completion: Line, rng: np.random.Generator) -> str:
    at = int(rng.integers(len(completion["tokens"]["id"])))
    completion["tokens"]["id"][at] += 1
    return f"id {at}"


def a_weight(completion: Line, rng: np.random.Generator) -> str:
    at = int(rng.integers(len(completion["tokens"]["weight"])))
    completion["tokens"]["weight"][at] += 0.001
    return f"weight {at}"


def a_score(completion: Line, rng: np.random.Generator) -> str:
    return a_reward(completion["score"], rng)


def a_digest(line: Line, rng: np.random.Generator) -> str:
    name = str(rng.choice([name for name in line if name != "step"]))
    at = int(rng.integers(len(line[name])))
    digit = "0123456789abcdef"["123456789abcdef0".index(line[name][at])]
    line[name] = line[name][:at] + digit + line[name][at + 1 :]
    return name


# The kinds in turn, and the file of each.
KINDS = {
    "reward": (SAMPLES_FILE, a_reward),
    "token": (TOKENS_FILE, of_a_completion(a_token)),
    "metric": (METRICS_FILE, a_metric),
    "weight": (TOKENS_FILE, of_a_completion(a_weight)),
    "config": (CONFIG_FILE, None),
    "score": (TOKENS_FILE, of_a_completion(a_score)),
    "digest": (DIGESTS_FILE, a_digest),
}


def tamper(path: pathlib.Path, change: Any, step: int, rng: np.random.Generator) -> str:
    """Changes one value of a line of that step, or of the config."""
    if path.name == CONFIG_FILE:
        tree = config.load([path]).model_dump(mode="json")
        section = str(rng.choice([name for name, x in tree.items() if isinstance(x, dict)]))
        numbers = [name for name, x in tree[section].items() if type(x) in (int, float, bool)]
        name = str(rng.choice(numbers)) if numbers else ""
        if not name:
            tree["seed"] += 1
        elif isinstance(tree[section][name], bool):
            tree[section][name] = not tree[section][name]
        else:
            tree[section][name] += 2.0**-30 if isinstance(tree[section][name], float) else 1
        path.write_text(json.dumps(tree))
        return f"{section}.{name}" if name else "seed"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    chosen = [line for line in lines if line["step"] == step and "launch" not in line]
    name = change(chosen[rng.integers(len(chosen))], rng)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


def main(run: pathlib.Path, folder: pathlib.Path, tampered: int, untouched: int) -> None:
    rng, repeaters = np.random.default_rng(0), Repeaters()
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(tampered)] + ["none"] * untouched
    run, folder = run.resolve(), folder.resolve()
    last = read_recorded(as_path(run)).last
    for number, kind in enumerate(kinds):
        copy = folder / str(number)
        copy.mkdir()
        for path in run.iterdir():
            if path.suffix in (".jsonl", ".yaml"):
                shutil.copy(path, copy)
        (copy / "checkpoints").symlink_to(run / "checkpoints")
        # The first step takes the starting weights, of which a process has one copy.
        step, changed = int(rng.integers(2, last + 1)), ""
        if kind != "none":
            file, change = KINDS[kind]
            changed = tamper(copy / file, change, step, rng)
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                found = examine(read_recorded(as_path(copy)), 1, 0, [step], repeaters)
            except UserError as error:  # a value that no config may have: exit code 2
                found = {"result": "failed", "steps": [], "findings": [str(error)]}
        said = [text for one in found["steps"] for text in one["differences"]]
        line = {"kind": kind, "step": step, "changed": changed, "result": found["result"]}
        print(json.dumps(line | {"differences": said + found["findings"]}), flush=True)
        shutil.rmtree(copy)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]), *map(int, sys.argv[3:]))
