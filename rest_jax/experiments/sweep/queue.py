"""An Optuna study as a queue of trials for many workers: which one is next, and what becomes of those of dead workers.

A sweep of n trials has the slots 0 .. n - 1, and a slot has attempts: 0, and one more each time its worker was lost.
Every Optuna trial carries its (slot, attempt) from its creation on. Two workers may create the same pair at once; the
trial with the lowest number is the one that counts, and Optuna hands out numbers in one order for all. So no lock is
needed, and a worker may die at any moment: whatever it left is either whole or stale.

A worker writes a beat to its trial every few seconds. A running trial without a beat for `stale` seconds is failed,
as Optuna does itself for databases, but not for journal files; its next attempt has the same values, the same
evaluations and the same run folder, where it goes on from the newest checkpoint. Before its first beat a trial bears no
time that other machines could read (Optuna's are local and name no zone): each worker times how long it has seen it so.
"""

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rest_jax.experiments.sweep.space import Space

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

SLOT, ATTEMPT = "slot", "attempt"
BEAT = "beat"  # {"time": Unix seconds, "worker": whoever runs it, "seconds": spent on this attempt}
ENDED = "ended"  # {"state": complete | pruned | failed | invalid | stopped, "reason": in words}, written just before it ends
LOSSES = (
    "losses"  # earlier attempts that were lost, those not counted whose worker was told to stop
)
FOLDER = "folder"


def current(trials: Iterable["FrozenTrial"]) -> dict[int, "FrozenTrial"]:
    """slot -> its newest attempt."""
    found: dict[int, FrozenTrial] = {}
    for trial in _holders(trials).values():
        slot = trial.user_attrs[SLOT]
        if slot not in found or found[slot].user_attrs[ATTEMPT] < trial.user_attrs[ATTEMPT]:
            found[slot] = trial
    return dict(sorted(found.items()))


def counts(trial: "FrozenTrial", trials: Iterable["FrozenTrial"]) -> bool:
    """Whether it is the trial of its pair, and not the second of two workers who wanted the same."""
    pair = _pair(trial)
    return pair is not None and _holders(trials)[pair].number == trial.number


def lost(trial: "FrozenTrial") -> bool:
    """Whether its worker died, or was told to stop, before the trial was done."""
    if trial.state.name != "FAIL":
        return False
    return trial.user_attrs.get(ENDED, {}).get("state") != "failed"


def losses(trial: "FrozenTrial") -> int:
    """How often the workers of this slot died. Being told to stop (pre-empted, say) is no death."""
    stopped = trial.user_attrs.get(ENDED, {}).get("state") == "stopped"
    return trial.user_attrs.get(LOSSES, 0) + (lost(trial) and not stopped)


def attempts_seconds(trials: Iterable["FrozenTrial"]) -> dict[int, float]:
    """slot -> seconds spent on it by all its attempts."""
    spent: dict[int, float] = {}
    for trial in _holders(trials).values():
        slot = trial.user_attrs[SLOT]
        spent[slot] = spent.get(slot, 0.0) + trial.user_attrs.get(BEAT, {}).get("seconds", 0.0)
    return spent


def take(study: "optuna.Study", space: Space) -> "tuple[Trial, FrozenTrial] | None":
    """A trial that is now this worker's, to write to and as it was; None when there is none to take at present."""
    while True:
        trials = study.get_trials(deepcopy=False)
        if not any(trial.state.name == "WAITING" for trial in trials):
            entry = _next(trials, space)
            if entry is None:
                return None
            study.add_trial(entry)
        asked = study.ask()
        trials = study.get_trials(deepcopy=False)
        (mine,) = (trial for trial in trials if trial.number == asked.number)
        if counts(mine, trials):
            return asked, mine
        fail(study, asked.number)


def release_stale(
    study: "optuna.Study", stale: float, silent: dict[int, float], now: float | None = None
) -> list[int]:
    """Fails the running trials of workers that are gone; the slots that are free again.

    `silent` is the caller's own, from one call to the next: trial number -> when it was first seen running without any
    beat, in seconds of the monotonic clock.
    """
    now = time.time() if now is None else now
    freed = []
    for trial in study.get_trials(deepcopy=False):
        if (
            trial.state.name == "RUNNING"
            and _is_stale(trial, stale, silent, now)
            and fail(study, trial.number)
        ):
            freed += [trial.user_attrs[SLOT]] if SLOT in trial.user_attrs else []
    return freed


def fail(study: "optuna.Study", number: int) -> bool:
    """Fails a running trial; False when another worker ended it first."""
    import optuna

    try:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return False
    return True


def beat(trial: "Trial", started: float) -> None:
    """Says that the trial's worker lives. UpdateFinishedTrialError when others took it for dead."""
    now = time.time()
    trial.set_user_attr(BEAT, {"time": now, "worker": worker_name(), "seconds": now - started})


def worker_name() -> str:
    """host:place:process; the place is that of `_place`."""
    return f"{socket.gethostname()}:{_place()}:{os.getpid()}"


def _is_stale(trial: "FrozenTrial", stale: float, silent: dict[int, float], now: float) -> bool:
    last = trial.user_attrs.get(BEAT)
    if last is None:
        clock = time.monotonic()
        return clock - silent.setdefault(trial.number, clock) > stale
    host, _, process = last["worker"].rpartition(":")
    here = worker_name().rpartition(":")[0]
    # A process of this very machine is looked up: a worker that starts again does not wait for its own beat to age.
    if host == here and _place() and not _alive(int(process)):
        return True
    return now - last["time"] > stale


def _place() -> str:
    """Where a process number means one process: this boot and this process namespace; "" where that is not known."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return ""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"  # dead, its parent has not looked yet
    return True


def _holders(trials: Iterable["FrozenTrial"]) -> dict[tuple[int, int], "FrozenTrial"]:
    found: dict[tuple[int, int], FrozenTrial] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        pair = _pair(trial)
        if pair is not None:
            found.setdefault(pair, trial)
    return found


def _pair(trial: "FrozenTrial") -> tuple[int, int] | None:
    attrs: Mapping[str, Any] = trial.user_attrs
    return (attrs[SLOT], attrs[ATTEMPT]) if SLOT in attrs and ATTEMPT in attrs else None


def _next(trials: list["FrozenTrial"], space: Space) -> "FrozenTrial | None":
    """The entry to queue: the next attempt of a lost slot, else the first slot that has none."""
    newest = current(trials)
    for slot, trial in newest.items():
        if lost(trial) and slot < space.size() and losses(trial) < space.attempts:
            return _again(trial)
    slot = next((slot for slot in range(space.size()) if slot not in newest), None)
    return None if slot is None else _first(slot, space)


def _first(slot: int, space: Space) -> "FrozenTrial":
    import optuna

    # Optuna's grid sampler goes by trial numbers, which further attempts use up too, so the point is fixed here.
    fixed: dict[str, Any] = {"fixed_params": space.grid()[slot]} if space.sampler == "grid" else {}
    return optuna.create_trial(
        state=optuna.trial.TrialState.WAITING,
        user_attrs={SLOT: slot, ATTEMPT: 0},
        system_attrs=fixed,
    )


def _again(trial: "FrozenTrial") -> "FrozenTrial":
    import optuna

    attrs = {SLOT: trial.user_attrs[SLOT], ATTEMPT: trial.user_attrs[ATTEMPT] + 1}
    attrs[LOSSES] = losses(trial)
    return optuna.create_trial(
        state=optuna.trial.TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=attrs,
        system_attrs=trial.system_attrs,  # the rungs it has passed, the point of a grid
        intermediate_values=trial.intermediate_values,
    )
