"""The quickstart: convert the builtin tiny policy, train it with ResT, export it, reload the export, say what improved.

`quickstart(overrides, fresh)` trains the method `rest` on the scale `tiny`; the run is runs/<name>/, its export
runs/<name>-exported/, which is written anew. Interrupted, the same command resumes.
"""

import pathlib
import shutil
import time
from collections.abc import Sequence

from rest_jax import config as config_lib
from rest_jax import train
from rest_jax.config import Config
from rest_jax.evaluation.heldout import Evaluator, evaluations, held_out
from rest_jax.files import local_path
from rest_jax.run.load import convert, export, load_policy
from rest_jax.run.lock import check_free
from rest_jax.texts import print_text


def quickstart(overrides: Sequence[str] = (), fresh: bool = False) -> int:
    """Carries out the stages; 0, or the exit code of a training that was told to stop.

    `overrides` ("key=value") change the config; `fresh` forgets an earlier run. UserError when another process trains in its
    folder.
    """
    started = time.monotonic()
    config = load_config(overrides)
    folder = local_path("output", config.folder)
    source = config_lib.locate(config.model.source)
    converted, exported = folder / "converted", folder.with_name(f"{folder.name}-exported")
    if fresh:
        check_free(config.folder)
        shutil.rmtree(converted, ignore_errors=True)
    if not converted.is_dir():
        convert(source, converted)
    print_text(f"[1/4] converted {source} to {converted}")
    print_text("[2/4] training with ResT")
    if code := train.train(_with_source(config, converted), restart=fresh):
        return code  # the same command resumes
    lines = evaluations(folder)
    shutil.rmtree(exported, ignore_errors=True)
    export(str(folder), exported)
    print_text(f"[3/4] exported to {exported}")
    reloaded = _with_source(config, exported)
    policy = load_policy(reloaded.model, reloaded.mesh)
    data = held_out(reloaded, policy, keep=True)
    assert data is not None
    rates, _ = Evaluator(reloaded, policy, data)(policy.params)
    print_text(f"[4/4] reloaded {exported} and evaluated it")
    first, last, again = (f"{found['eval/exact']:.1%}" for found in (lines[0], lines[-1], rates))
    print_text(
        f"\nExact calls on tools whose pair of verb and thing is in no training prompt: {first} -> {last} "
        f"(the reloaded export: {again}) in {(time.monotonic() - started) / 60:.1f} minutes.\n"
        f"Completions: {folder / 'samples.jsonl'}\n"
        f"Policy, as a Hugging Face folder (transformers loads it with PyTorch): {exported}\n"
        f"It answers OpenAI's protocol: rest-jax serve {exported}"
    )
    return 0


def load_config(overrides: Sequence[str]) -> Config:
    """The config of the quickstart; a run with another seed has a folder of its own."""
    config = config_lib.load(["scale/tiny", "method/rest"], ["name=quickstart", *overrides])
    if config.seed and not any(word.startswith("name=") for word in overrides):
        config = config.model_copy(update={"name": f"{config.name}-seed{config.seed}"})
    return config


def _with_source(config: Config, source: pathlib.Path) -> Config:
    model = config.model.model_copy(update={"source": str(source)})
    return config.model_copy(update={"model": model})
