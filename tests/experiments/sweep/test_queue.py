"""The study as a queue: every slot once, the trials of dead workers again with what they had, no two for one pair."""

import collections
import concurrent.futures
import os
import subprocess
import sys
import threading
import time

import optuna
import pytest

from rest_jax.experiments.sweep import points, queue, study

GRID = {
    "curriculum.alpha_format": {"choices": [0.1, 0.2, 0.3]},
    "curriculum.alpha_think": {"choices": [0.5, 0.6]},
}
RANGE = {"curriculum.alpha_format": {"low": 0.0, "high": 1.0}}


@pytest.fixture(params=["journal", "database"])
def storage(request, tmp_path) -> str:
    place = tmp_path / "store"
    return str(place) if request.param == "journal" else f"sqlite:///{place}"


def take_all(space, shared, storage) -> list[tuple[int, dict]]:
    """What one worker takes until nothing is left."""
    opened, taken = study.open_study(space, shared, storage), []
    while (found := queue.take(opened, space)) is not None:
        trial, frozen = found
        slot = frozen.user_attrs[queue.SLOT]
        opened.sampler = study.make_sampler(space, slot)
        taken.append((slot, points.suggest(space, trial)))
        end(opened, trial)
    return taken


def end(opened, trial, value=1.0):
    trial.set_user_attr(queue.ENDED, {"state": "complete", "reason": "done"})
    opened.tell(trial, value)


def test_many_workers_share_out_a_grid(make, storage):
    space, shared = make(sampler="grid", parameters=GRID)
    study.open_study(space, shared, storage)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [pool.submit(take_all, space, shared, storage) for _ in range(3)]
        taken = [pair for future in found for pair in future.result()]
    assert sorted(slot for slot, _ in taken) == list(range(6))
    assert dict(taken) == dict(enumerate(space.grid()))


def test_workers_that_start_together_make_one_database(make, tmp_path):
    space, shared = make(sampler="grid", parameters=GRID)
    together = threading.Barrier(4)

    def begin() -> str:
        together.wait()
        return study.open_study(space, shared, f"sqlite:///{tmp_path / 'store'}").study_name

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        begun = [pool.submit(begin) for _ in range(4)]
        assert [future.result() for future in begun] == ["some"] * 4


def test_draws_do_not_depend_on_who_makes_them(make, tmp_path):
    space, shared = make(sampler="random", trials=4, parameters=RANGE)
    alone = take_all(space, shared, str(tmp_path / "one"))
    opened = [study.open_study(space, shared, str(tmp_path / "two")) for _ in range(2)]
    drawn = []
    for turn in (0, 1, 1, 0):  # two workers, trials of both running at once
        trial, frozen = queue.take(opened[turn], space)
        opened[turn].sampler = study.make_sampler(space, frozen.user_attrs[queue.SLOT])
        drawn.append((frozen.user_attrs[queue.SLOT], points.suggest(space, trial)))
    assert drawn == alone
    assert len({point["curriculum.alpha_format"] for _, point in drawn}) == 4


def test_a_lost_trial_is_taken_again_with_all_it_had(make, storage):
    halving = {"successive_halving": {"min_steps": 2}}
    space, shared = make(sampler="tpe", trials=1, parameters=RANGE, pruner=halving)
    opened = study.open_study(space, shared, storage)
    trial, _ = queue.take(opened, space)
    point = points.suggest(space, trial)
    queue.beat(trial, time.time())
    trial.report(0.5, 2)
    assert not trial.should_prune()
    assert queue.take(opened, space) is None  # it runs
    assert queue.release_stale(opened, 60, {}) == []
    assert queue.release_stale(opened, 60, {}, now=time.time() + 61) == [0]
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        queue.beat(trial, time.time())  # should it live after all, it learns of it
    again, seen = queue.take(opened, space)
    assert points.suggest(space, again) == point
    assert seen.user_attrs[queue.ATTEMPT] == 1 and seen.intermediate_values == {2: 0.5}
    assert seen.system_attrs["completed_rung_0"] == 0.5  # not judged twice there
    end(opened, again)
    assert queue.take(opened, space) is None
    newest = queue.current(opened.get_trials())
    assert [t.number for t in newest.values()] == [again.number]


def test_a_dead_process_of_this_machine_is_known_at_once(make, storage):
    space, shared = make(sampler="grid", parameters=GRID)
    opened = study.open_study(space, shared, storage)
    live, _ = queue.take(opened, space)
    queue.beat(live, time.time())
    dead, frozen = queue.take(opened, space)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name = queue.worker_name().rpartition(":")[0]
    dead.set_user_attr(
        queue.BEAT, {"time": time.time(), "worker": f"{name}:{gone.pid}", "seconds": 1}
    )
    elsewhere, _ = queue.take(opened, space)
    other = {"time": time.time(), "worker": f"{name}-else:{gone.pid}", "seconds": 1}
    elsewhere.set_user_attr(queue.BEAT, other)
    assert queue.worker_name().endswith(f":{os.getpid()}")
    assert queue.release_stale(opened, 60, {}) == [frozen.user_attrs[queue.SLOT]]


def test_before_its_first_beat_a_trial_is_timed_by_each_worker(make, storage, monkeypatch):
    """Optuna's own dates are local times of the machine that took the trial."""
    space, shared = make(sampler="grid", parameters=GRID)
    opened, silent = study.open_study(space, shared, storage), {}
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    time.tzset()
    try:
        trial, _ = queue.take(opened, space)
    finally:
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
    try:
        assert queue.release_stale(opened, 60, silent) == []
        time.sleep(0.1)
        assert queue.release_stale(opened, 0.05, {}) == []  # a worker that has just come
        assert queue.release_stale(opened, 0.05, silent) == [0]
    finally:
        monkeypatch.undo()
        time.tzset()
    trial, _ = queue.take(opened, space)
    queue.release_stale(opened, 60, silent)
    queue.beat(trial, time.time())
    time.sleep(0.1)
    later, _ = queue.take(opened, space)
    queue.beat(later, time.time())
    assert queue.release_stale(opened, 60, silent) == []


def test_attempts_are_bounded(make, tmp_path):
    space, shared = make(sampler="grid", trials=1, attempts=3, parameters=GRID)
    opened = study.open_study(space, shared, str(tmp_path / "journal"))
    for _ in range(3):
        trial, _ = queue.take(opened, space)
        assert queue.fail(opened, trial.number) and not queue.fail(opened, trial.number)
    assert queue.take(opened, space) is None


def test_being_told_to_stop_is_no_loss(make, tmp_path):
    """A sweep on machines that are often taken away goes on for ever."""
    space, shared = make(sampler="grid", trials=1, attempts=2, parameters=GRID)
    opened = study.open_study(space, shared, str(tmp_path / "journal"))
    for _ in range(5):
        trial, _ = queue.take(opened, space)
        trial.set_user_attr(queue.ENDED, {"state": "stopped", "reason": "stopped and saved"})
        queue.fail(opened, trial.number)
    for _ in range(2):
        queue.fail(opened, queue.take(opened, space)[0].number)
    assert queue.take(opened, space) is None


def test_of_two_entries_for_one_pair_the_first_counts(make, tmp_path):
    """As two workers leave them that saw the same free slot at the same moment."""
    space, shared = make(sampler="grid", trials=2, parameters=GRID)
    opened = study.open_study(space, shared, str(tmp_path / "journal"))
    waiting = optuna.trial.TrialState.WAITING
    for _ in range(2):
        attrs = {queue.SLOT: 0, queue.ATTEMPT: 0}
        fixed = {"fixed_params": space.grid()[0]}
        opened.add_trial(optuna.create_trial(state=waiting, user_attrs=attrs, system_attrs=fixed))
    slots = collections.Counter()
    while (found := queue.take(opened, space)) is not None:
        slots[found[1].user_attrs[queue.SLOT]] += 1
        end(opened, found[0])
    assert slots == {0: 1, 1: 1}
    assert [t.number for t in queue.current(opened.get_trials()).values()] == [0, 2]


def test_lost_trials_do_not_count_in_a_rung(make, tmp_path):
    """Successive halving by hand: with the lost copies of the best counted, the second best would be pruned."""
    halving = {"successive_halving": {"min_steps": 1, "reduction_factor": 2}}
    values = dict(sampler="random", trials=9, parameters=RANGE, pruner=halving)
    space, shared = make(**values)
    opened = study.open_study(space, shared, str(tmp_path / "journal"))
    verdicts = []
    for value, is_lost in ((3.0, True), (3.0, False), (1.0, False), (0.5, False), (2.0, False)):
        trial, frozen = queue.take(opened, space)
        points.suggest(space, trial)
        if 1 not in frozen.intermediate_values:
            trial.report(value, 1)
            verdicts.append(trial.should_prune())
        queue.fail(opened, trial.number) if is_lost else end(opened, trial, value)
    # competing at the rung: 3 | 3 1 | 3 1 .5 | 3 1 .5 2: the best 1, 1, 1, 2 of them go on
    assert verdicts == [False, True, True, False]
