"""Two steps of every builtin method, but for those of one rule, at a tiny size, in one process with one device.

    python tests/programs/golden_steps.py OUT            the runs, in OUT/<method>/
    python tests/programs/golden_steps.py OUT --update   the same, then writes tests/golden/methods.json from them

Most of the time is tracing and compiling. All methods sample alike, so the engine of the first serves the others, and so does
an update those with the same loss; prompts and completions are of one padded size and few; XLA does not optimise; data and
tokenizer are read once; no checkpoint is written and no picture drawn.
"""

import functools
import json
import os
import pathlib
import sys

import yaml

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # One device. No numbers of one kind of CPU: YNN and oneDNN choose their kernels by what it can do (AMX, say).
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type="
    )
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

from rest_jax import config, sft, train
from rest_jax.data import cache
from rest_jax.rl import optimizer, step, supervised
from rest_jax.rollout import cast as casting
from rest_jax.rollout import scheduler
from rest_jax.run import load
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.metrics import read_lines

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "methods.json"
FILES = sorted((GOLDEN.parents[2] / "configs" / "method").glob("*.yaml"))


def is_related(path: pathlib.Path) -> bool:
    """Whether it is GRPO but for one rule, whose own test has its numbers (tests/rl/rules): such a method has no golden steps."""
    values = yaml.safe_load(path.read_text())
    weights, loss = values.get("weights", {}), values.get("loss", {})
    rules = {name for kind in ("weight", "advantage", "loss") for name in config.rule_names(kind)}
    named = {weights.get("rule"), loss.get("advantage"), loss.get("policy")}
    return bool(named & (rules - {"grpo", "dr_grpo", "clip"})) or "clip_high" in loss


METHODS = [path.stem for path in FILES if not is_related(path)]
SUPERVISED = ("sft", "tsft", "rsft")
SMALL = [
    "seed=3",  # no group of equal rewards in either step
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "rollout.max_response_tokens=64",
    "data.max_prompt_tokens=128",
    "data.synthetic_size=64",
    "data.eval=null",
    "sft.batch_size=4",
    "train.steps=2",
    "train.checkpoint_every=2",
]


def share_programs() -> None:
    """Makes equal samplers share one engine, and equal losses one update, as jax's cache on disk would, without tracing them
    again.
    """
    scheduler.make_engine = functools.cache(scheduler.make_engine)
    train.make_optimizer = sft.make_optimizer = functools.cache(optimizer.make_optimizer)
    make, made = step.make_update, {}

    def make_update(spec, state_shardings):
        loss = spec.loss_fn
        key = loss.func, *loss.keywords.items(), spec.tx, spec.mesh, spec.noise_groups
        if key not in made:
            made[key] = make(spec, state_shardings)
        return made[key]

    step.make_update = supervised.make_update = make_update
    cast, casts = casting.rollout_cast, {}

    def rollout_cast(policy):
        key = policy.config, policy.rollout_mesh
        if key not in casts:
            casts[key] = cast(policy)
        return casts[key]

    train.rollout_cast = rollout_cast


def share_data() -> None:
    """Makes the methods share prompts and tokenizer, whose settings are the same."""
    load.Tokenizer.load = functools.cache(load.Tokenizer.load)
    read, found = cache._load, {}

    def load_once(config, source, keep, max_tokens):
        key = config.data, source.encoder.supervised, max_tokens
        if key not in found:
            found[key] = read(config, source, keep, max_tokens)
        return found[key]

    cache._load = load_once


def train_method(method: str, output: pathlib.Path) -> None:
    """One run."""
    words = [*SMALL, f"name={method}", f"output={output}"]
    if method in SUPERVISED:
        sft.finetune(config.load(["scale/tiny_sft", f"method/{method}"], words))
    else:
        train.train(config.load(["scale/tiny", f"method/{method}"], words))


def golden_lines(run: pathlib.Path) -> list[dict[str, float]]:
    """The metrics of a run without its clocks."""
    found = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def rounded(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Eight digits, which is what float32 holds."""
    return [{name: float(f"{value:.8g}") for name, value in line.items()} for line in lines]


def main(output: pathlib.Path, update: bool) -> None:
    """Every method, then the golden file if it is to be updated."""
    share_programs()
    share_data()
    Checkpoints.save = lambda *_: None
    train.print_closing_table = sft.print_closing_table = lambda folder: None  # draws
    for method in METHODS:
        train_method(method, output)
    if update:
        lines = {method: rounded(golden_lines(output / method)) for method in METHODS}
        GOLDEN.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), "--update" in sys.argv[2:])
