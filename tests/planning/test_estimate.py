"""Seconds out of cycles, rates and bytes, against hand counts."""

import pytest

from rest_jax.planning import estimate
from rest_jax.planning.collectives import Collective
from rest_jax.planning.estimate import Calls
from rest_jax.planning.measure import Measured, Work
from rest_jax.planning.topology import Chip

TPU = Chip("tpu", 1, 1e9, clock=2e9, link=1e8)
GPU = Chip("gpu", 1, 1e9, link=1e8, network=1e7)


def gather(nbytes: int, place: str = "layer loop", crosses: bool = False, overlaps: bool = False):
    return Collective("all-gather", place, "mlp", 4, crosses, overlaps, 1, nbytes)


def test_cycles_over_the_clock_and_exposed_collectives_beside_them():
    measured = Measured({"mlp": Work(cycles=4e9)}, {}, (gather(int(3e8)),))
    call, token = estimate.cost(measured, TPU)
    assert call == pytest.approx({"mlp": 2.0, "collectives": 3.0}) and token == {}


def test_kernels_take_their_own_time_beside_the_cycles():
    measured = Measured({"attention": Work(cycles=4e9, limit=1.0, kernels=0.5)}, {}, ())
    assert estimate.cost(measured, TPU).call == pytest.approx({"attention": 2.5})
    assert estimate.cost(measured, GPU).call == pytest.approx({"attention": 1.0})


def test_what_overlaps_counts_as_far_as_it_outlasts_the_computation():
    work = {"mlp": Work(cycles=4e9)}
    short, long = (Measured(work, {}, (gather(n, overlaps=True),)) for n in (int(1e8), int(5e8)))
    assert estimate.cost(short, TPU).call == pytest.approx({"mlp": 2.0})
    assert estimate.cost(long, TPU).call == pytest.approx({"mlp": 2.0, "collectives": 3.0})


def test_between_hosts_a_gpu_has_its_network():
    collectives = (gather(int(1e8), crosses=True), gather(int(1e8)))
    measured = Measured({"mlp": Work(limit=0.5)}, {}, collectives)
    assert estimate.cost(measured, GPU).call == pytest.approx({"mlp": 0.5, "collectives": 11.0})


def test_a_token_loop_is_paid_for_each_token():
    measured = Measured(
        {"other": Work(cycles=2e9)},
        {"mlp": Work(cycles=4e9)},
        (gather(int(1e8), place="token loop"),),
    )
    costs = {"decode": estimate.cost(measured, TPU)}
    parts = estimate.step_seconds(costs, {"decode": Calls(3, tokens=10)})
    assert parts["decode"] == pytest.approx({"other": 3.0, "mlp": 20.0, "collectives": 10.0})
