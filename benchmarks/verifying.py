"""What reading a checkpoint against its manifest costs beside writing it.

    python -m benchmarks.verifying [--megabytes 960] [--repeats 5] [--folder FOLDER]

A train state of so many bytes (float32 parameters in 20 matrices and AdamW's two moments of them) is saved as a run saves it and
verified as a resumption verifies it (sizes and CRC-32), then as `rest-jax inspect --verify` and audits do (SHA-256). One JSON
line: medians over the saves of wall-clock and CPU seconds, and the ratios of verifying to writing. The files were just written:
they lie in the page cache, so that the disk counts for the writing alone.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.process import Parser, positive, start

DESCRIPTION = "What reading a checkpoint against its manifest costs beside writing it."
_MATRICES = 20


def make_state(megabytes: int) -> Any:
    """A train state of about so many 10^6 bytes, random."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rest_jax.types import CurriculumState, TrainState

    rng = np.random.default_rng(0)
    width = max(1, int((megabytes * 1e6 / (3 * _MATRICES * 4)) ** 0.5))

    def tree() -> dict[str, jax.Array]:
        values = (rng.standard_normal((width, width), np.float32) for _ in range(_MATRICES))
        return {f"w{i}": jnp.asarray(x) for i, x in enumerate(values)}

    row, zero = jnp.zeros(8), jnp.float32(0)
    of_regions = dict.fromkeys(("entropy", "gini", "base_count", "count", "weight"), row)
    curriculum = CurriculumState(
        step=jnp.int32(0), nu=zero, seen=row.astype(jnp.int32), format_score=zero, **of_regions
    )
    moments = {"mu": tree(), "nu": tree()}
    return TrainState(jnp.int32(0), tree(), moments, jax.random.key(0), curriculum)


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds, of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Saves, each of which is verified twice."""
    from rest_jax.run import checkpoint
    from rest_jax.run.checkpoint import Checkpoints

    state = make_state(args.megabytes)
    taken: dict[str, list[tuple[float, float]]] = {"write": [], "verify": [], "thorough": []}
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        Checkpoints(pathlib.Path(folder) / "run", keep=1) as checkpoints,
    ):

        def save() -> None:
            checkpoints.save(step, state, {})
            checkpoints.wait()

        for step in range(1, args.repeats + 1):
            taken["write"].append(timed(save))
            place = checkpoints.folder / str(step)
            taken["verify"].append(timed(lambda place=place: checkpoint.verify(place)))
            thorough = timed(lambda place=place: checkpoint.verify(place, thorough=True))
            taken["thorough"].append(thorough)
        size = sum(
            path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file()
        )
    line: dict[str, Any] = {
        "benchmark": "verifying",
        "megabytes": size / 1e6,
        "saves": args.repeats,
    }
    for i, clock in enumerate(("s", "cpu_s")):
        medians = {name: statistics.median(x[i] for x in times) for name, times in taken.items()}
        line |= {f"{name}_{clock}": value for name, value in medians.items()}
        line[f"verify_over_write_{clock}"] = medians["verify"] / medians["write"]
        line[f"thorough_over_write_{clock}"] = medians["thorough"] / medians["write"]
    return line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked arguments."""
    parser = Parser(prog="python -m benchmarks.verifying", description=DESCRIPTION)
    parser.add_argument("--megabytes", type=positive, default=960, help="of the train state")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--folder", type=pathlib.Path, help="a folder on the disk that is meant")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    args = parse(argv)
    start()
    print(json.dumps(measure(args)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
