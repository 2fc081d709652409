"""The command `rest-jax sweep CONFIG SPACE.yaml`: checks everything, then works, starts workers, or shows results."""

import pathlib
from collections.abc import Sequence

from rest_jax.errors import RunStopped
from rest_jax.experiments.sweep import points, process, results
from rest_jax.experiments.sweep import space as space_lib
from rest_jax.experiments.sweep import study as study_lib
from rest_jax.experiments.sweep.worker import Worker, work


def run(
    config: pathlib.Path,
    space: pathlib.Path,
    overrides: Sequence[str] = (),
    *,
    based_on: str | None = None,
    storage: str | None = None,
    trials: int | None = None,
    workers: int = 1,
    stale: float = 120.0,
    only_results: bool = False,
    quiet: bool = False,
) -> int:
    """Works until no trial is left to take, or this worker (each of `workers`) has done `trials`; 0, also after SIGTERM.

    UserError before anything is started for a space, config or storage that cannot be used; RunStopped when every trial
    of the sweep has failed.
    """
    wanted = space_lib.load(space)
    shared = points.base(wanted, config, overrides, based_on)
    folder = study_lib.sweep_folder(wanted, shared)
    if only_results:
        print(results.write(study_lib.load_study(wanted, shared, storage), wanted, folder))
        return 0
    points.check(wanted, shared)
    halving = None if wanted.pruner is None else wanted.pruner.successive_halving
    if halving is not None and shared.train.steps and halving.min_steps >= shared.train.steps:
        print(
            f"note: successive_halving judges from step {halving.min_steps} on, a trial has {shared.train.steps}: "
            "nothing will be pruned",
            flush=True,
        )
    study = study_lib.open_study(wanted, shared, storage)
    if workers > 1:
        words = [str(config), str(space), *overrides, "--stale", str(round(stale)), "--quiet"]
        for option, value in (("--base", based_on), ("--storage", storage), ("--trials", trials)):
            words += [] if value is None else [option, str(value)]
        code = process.local_workers(workers, words)
    else:
        work(Worker(wanted, shared, study, stale), trials)
        code = 0
    if not quiet:
        print(results.write(study, wanted, folder), flush=True)
    # To Optuna a trial that was stopped has failed as well; a row knows that it will be taken again.
    found = results.rows(study.get_trials(deepcopy=False), wanted)
    if len(found) >= wanted.size() and all(row.state == "failed" for row in found):
        raise RunStopped(
            f"sweep {wanted.name}: all {len(found)} trials failed; the first: {found[0].reason}"
        )
    return code
