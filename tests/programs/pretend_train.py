"""Leaves the folder of a finished run, with made-up metrics: `train|sft FILES... key=value`.

Each start adds a line to <output>/../trained.txt. A run named by FAIL_AT fails. WEIGHTS is the digest of what every run begins
and ends with.
"""

import json
import os
import pathlib
import sys

from rest_jax import config as config_lib

REGIONS = ("tag", "scaffold", "name", "param", "think", "response", "other")


def main() -> None:
    command, *words = sys.argv[1:]
    config = config_lib.load([w for w in words if "=" not in w], [w for w in words if "=" in w])
    with (pathlib.Path(config.output).parent / "trained.txt").open("a") as file:
        file.write(f"{command}:{config.name}\n")
    if config.name == os.environ.get("FAIL_AT"):
        sys.exit("rest-jax: error: it broke")
    finish(config, 0.5)


def finish(config: config_lib.Config, exact: float) -> None:
    """The folder of a run whose final exact rate is `exact`."""
    config.folder.mkdir(parents=True)
    (config.folder / "config.yaml").write_text(config_lib.dump(config))
    steps = config.train.steps or 0
    lines = [{"step": 0, **held(0.4)}, *({"step": s, **trained(s)} for s in range(1, steps + 1))]
    lines.append({"step": steps, **held(exact)})
    weights = os.environ.get("WEIGHTS", "a1")
    digests = [{"step": 0, "launch": {"made_of": {"weights": weights}}}, {"step": steps, "params": weights}]  # fmt: skip
    for file, content in (("metrics.jsonl", lines), ("digests.jsonl", digests)):
        (config.folder / file).write_text("".join(json.dumps(line) + "\n" for line in content))


def held(exact: float) -> dict[str, float]:
    names = ("accuracy", "format", "spurious", "reward", "response_tokens")
    return {"eval/exact": exact, **{f"eval/{name}": 0.5 for name in names}}


def trained(step: int) -> dict[str, float]:
    kinds = {
        "weight_share": 1 / 7,
        "entropy": 0.1,
        "change_positive": 0.01,
        "change_negative": -0.02,
    }
    regions = {f"region/{r}/{kind}": value for r in REGIONS for kind, value in kinds.items()}
    return regions | {
        "reward/mean": 0.1 * step, "reward/exact": 0.05 * step, "rollout/tokens": 100,
        "rollout/response_tokens": 25, "rollout/entropy": 0.2, "update/grad_noise": 0.9,
        "update/effective_tokens": 0.5, "time/step": 9.0,
    }  # fmt: skip


if __name__ == "__main__":
    main()
