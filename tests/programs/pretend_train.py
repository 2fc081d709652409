"""Leaves the folder of a finished run, with made-up metrics: `train|sft FILES... key=value`.

Each start adds a line to <output>/../trained.txt. A run named by FAIL_AT fails.
"""

import os
import pathlib
import sys

from rest_jax import config as config_lib
from tests.experiments.test_compare import finish


def main() -> None:
    command, *words = sys.argv[1:]
    config = config_lib.load([w for w in words if "=" not in w], [w for w in words if "=" in w])
    with (pathlib.Path(config.output).parent / "trained.txt").open("a") as file:
        file.write(f"{command}:{config.name}\n")
    if config.name == os.environ.get("FAIL_AT"):
        sys.exit("rest-jax: error: it broke")
    finish(config, 0.5)


if __name__ == "__main__":
    main()
