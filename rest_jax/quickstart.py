"""The quickstart: convert the shipped tiny policy, train it with ResT, evaluate, export, reload the export, say what improved.

`run(seed, fresh)` trains scale/tiny with method/rest; everything lands in runs/<name>/. Interrupted, the same command goes on.
"""

import pathlib
import shutil
import time

from rest_jax import config as config_lib
from rest_jax import train
from rest_jax.config import Config
from rest_jax.evaluation.heldout import Evaluator, evaluations, held_out
from rest_jax.models.hf import write as hf
from rest_jax.rollout.engine import rollout_cast
from rest_jax.run.folder import MODEL_FOLDER
from rest_jax.run.metrics import summary_table
from rest_jax.run.policy import load_policy

FILES, NAME = ("scale/tiny", "method/rest"), "quickstart"
CONVERTED, EXPORTED = "converted", "exported"
SHOWN = ("eval/exact", "eval/format", "eval/spurious", "eval/accuracy", "eval/reward")


def run(seed: int | None = None, fresh: bool = False) -> int:
    """The five stages. `seed` replaces the recipe's (and names the run after it); `fresh` forgets an earlier run."""
    started = time.monotonic()
    config = recipe(seed)
    folder = config.folder
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    converted = folder / CONVERTED
    source = config.model.source
    if not converted.is_dir():
        hf.convert(source, converted)
    print(f"[1/4] converted {source} to {converted}", flush=True)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"source": str(converted)})}
    )
    print("[2/4] training with ResT", flush=True)
    train.run(config)
    lines = evaluations(folder)
    if lines[-1]["step"] != config.train.steps:
        return 0  # SIGTERM: the same command goes on
    exported = export(config, folder)
    print(f"[3/4] exported to {exported}", flush=True)
    reloaded = evaluate(config, exported)
    print(f"[4/4] reloaded {exported} and evaluated it\n", flush=True)
    print(final_block(lines[0], lines[-1], reloaded, folder, time.monotonic() - started))
    return 0


def recipe(seed: int | None) -> Config:
    """ResT at the smallest scale, with another seed if one is given."""
    overrides = [f"name={NAME}"] if seed is None else [f"seed={seed}", f"name={NAME}-seed{seed}"]
    return config_lib.load(FILES, overrides)


def export(config: Config, folder: pathlib.Path) -> pathlib.Path:
    """The trained policy as an HF folder; an earlier export of the same run is replaced."""
    exported = folder / EXPORTED
    shutil.rmtree(exported, ignore_errors=True)
    model = config.model.model_copy(update={"source": str(folder)})
    policy = load_policy(model, config.mesh)
    hf.export(policy.params, folder / MODEL_FOLDER, exported)
    return exported


def evaluate(config: Config, exported: pathlib.Path) -> dict[str, float]:
    """EvalExample-out rates of the exported folder, loaded like any HF model."""
    policy = load_policy(config.model.model_copy(update={"source": str(exported)}), config.mesh)
    evaluator = Evaluator.of(config, policy, held_out(config, policy))
    assert evaluator is not None  # the recipe has held-out data
    return evaluator(rollout_cast(policy)(policy.params))[0]


def final_block(
    first: dict, last: dict, reloaded: dict, folder: pathlib.Path, seconds: float
) -> str:
    """What improved, in one table and three lines."""
    head = ["held-out tools, greedy", "start", f"step {last['step']}", "change", "export, reloaded"]
    rows = [
        [n.removeprefix("eval/"), first[n], last[n], last[n] - first[n], reloaded[n]] for n in SHOWN
    ]
    points = 100 * (last["eval/exact"] - first["eval/exact"])
    return (
        f"{summary_table([head, *rows])}\n\n"
        f"Exact calls on tools never seen in training: {first['eval/exact']:.1%} -> {last['eval/exact']:.1%} "
        f"({points:+.1f} points) in {seconds / 60:.1f} minutes.\n"
        f"Curves: {folder / 'curves.png'}   Answers: {folder / 'samples.jsonl'}\n"
        f"Policy, ready for transformers: {folder / EXPORTED}"
    )
