"""Every name of the table of metrics is written by some run, and none besides: both kinds of run, with everything on."""

import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from rest_jax.run.metrics import METRICS, METRICS_FILE, read_lines

REPOSITORY = pathlib.Path(__file__).parents[2]
REINFORCED = {
    "rollout": {
        "prompts_per_step": 4,
        "group_size": 4,
        "max_response_tokens": 24,
        "recompute_logprobs": True,
        "tis_cap": 2.0,
    },
    "loss": {"kl_coefficient": 0.01, "entropy_coefficient": 0.001},
    "train": {"prompts_per_update": 2, "measure_noise": True, "measure_change": True},
}
# the policy has 1,024 positions
SUPERVISED = {"sft": {"batch_size": 4}, "rollout": {"max_response_tokens": 24}}
EXPERTS = REINFORCED | {
    "rollout": REINFORCED["rollout"] | {"replay_routing": True},
    "loss": {"load_balance_coefficient": 0.001},
}


def names_of(command: str, changes: dict, folder: pathlib.Path, source: pathlib.Path) -> set[str]:
    """The names that a run of two steps, with an evaluation and a checkpoint after each, writes."""
    folder.mkdir()
    raw = {
        "name": command,
        "output": str(folder),
        "model": {"source": str(source), "remat": "none"},
        "data": {"synthetic_size": 64, "eval_limit": 8, "brief_prompt": True},
        **changes,
    }
    raw["train"] = {"steps": 2, "eval_every": 1, "checkpoint_every": 1, **raw.get("train", {})}
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(raw))
    program = [sys.executable, str(REPOSITORY / "tests/programs/with_cpu_peak.py")]
    done = subprocess.run(
        [*program, command, str(path)],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout
    lines = read_lines(folder / command / METRICS_FILE)
    return set().union(*lines) - {"step"}


@pytest.mark.slow
def test_the_table_is_what_runs_write(tmp_path, configs_dir, expert_model):
    source = configs_dir / "quickstart_policy"
    (tmp_path / "mine.py").write_text("def score(*given): return {'a': len(given[1])}")
    plugin = {"reward": {"plugin": f"{tmp_path}/mine.py:score"}}
    written = names_of("train", REINFORCED | plugin, tmp_path / "rl", source)
    parts = {"reward/part/a", "eval/part/a"}
    assert parts < written
    written -= parts
    refilled = {"rollout": REINFORCED["rollout"] | {"dynamic_sampling": 1}}
    refilled["loss"] = {"advantage": "hicra"}
    written |= names_of("train", REINFORCED | refilled, tmp_path / "refilled", source)
    written |= names_of("sft", SUPERVISED, tmp_path / "sft", source)
    written |= names_of("train", EXPERTS, tmp_path / "experts", expert_model)
    # A benchmark needs its data: tests/evaluation/test_heldout.py has these.
    benchmark = {f"eval/api_bank/{name}" for name in ("soft", "strict", "items")}
    assert (METRICS.keys() - written, written - METRICS.keys()) == (benchmark, set())
