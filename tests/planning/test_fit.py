"""The search for the smallest change, with a compiler that knows the memory of a config by a formula."""

import pytest

from rest_jax.config import Config, ConfigError
from rest_jax.errors import UserError
from rest_jax.planning import fit

GB = 10**9


def config(**sections) -> Config:
    base = {"name": "x", "model": {"source": "none"}, "mesh": {"fsdp": 8}}
    return Config.model_validate(base | sections)


class FakeCompiler:
    """Weights 16 GB over tensor in the rollout; caches by decode slots; temporaries by tokens of a micro-batch."""

    def __init__(self, weights: int = 16 * GB, slot: int = GB // 8, token: int = GB // 1024):
        self.weights, self.slot, self.token, self.asked = weights, slot, token, []

    def __call__(self, config: Config) -> fit.Needs:
        self.asked.append(config)
        if config.mesh.tensor > 4:
            raise UserError("heads 4 do not divide")
        rollout = self.weights // config.mesh.tensor
        cache = self.slot * config.rollout.decode_slots
        group = 4096  # the least a micro-batch can hold
        temporaries = self.token * max(group, config.train.max_tokens_per_microbatch or 65_536)
        return {
            "decode": {"rollout weights": rollout, "cache": cache, "total": rollout + cache},
            "update": {
                "parameters": 4 * GB,
                "temporaries": temporaries,
                "total": 4 * GB + temporaries,
            },
        }


def search(compiler: FakeCompiler, limit: float, start: Config) -> fit.Fit | None:
    return fit.smallest_change(start, compiler(start), limit, compiler)


def test_what_fits_is_left_as_it_is():
    found = search(FakeCompiler(), 40 * GB, config())
    assert found is not None and found.changes == ()


def test_fewer_decode_slots_as_few_as_needed():
    """128 slots need 16 + 16 GB: half of them fit 25 GB, and no other key is touched."""
    found = search(FakeCompiler(), 25 * GB, config())
    assert found is not None and found.changes == ("rollout.decode_slots=64",)
    assert fit.largest(found.needs)[1] <= 25 * GB


def test_slots_that_cannot_be_enough_are_not_tried():
    """Weights alone are over 12 GB: the rollout needs more tensor devices first."""
    compiler = FakeCompiler()
    found = search(compiler, 12 * GB, config())
    assert found is not None
    assert found.changes[:2] == ("mesh.tensor=2", "mesh.fsdp=4")
    assert found.config.mesh.tensor * found.config.mesh.fsdp == 8


def test_smaller_microbatches_for_the_update():
    found = search(FakeCompiler(weights=GB, slot=0), 13 * GB, config())
    assert found is not None and found.changes == ("train.max_tokens_per_microbatch=8192",)


def test_a_change_that_lowers_nothing_is_not_kept():
    """One group needs 4,096 tokens whatever the limit: more tensor devices do not help this compiler either."""
    compiler = FakeCompiler(weights=GB, slot=0)
    assert search(compiler, 7 * GB, config(train={"max_tokens_per_microbatch": 4096})) is None
    assert {c.train.max_tokens_per_microbatch for c in compiler.asked} == {4096, 2048}


def test_keeping_less_comes_before_smaller_microbatches():
    needs = {"temporaries": 8, "total": 10}
    tried = list(fit.candidates(config(model={"source": "a", "remat": "dots"}), "update", needs, 6))
    assert tried[:2] == [{"model.remat": "block"}, {"train.max_tokens_per_microbatch": 8192}]


@pytest.mark.parametrize("program", ["decode", "update", "apply"])
@pytest.mark.parametrize(
    "mesh",
    [{"tensor": -1}, {"expert": -1}, {"data": -1}, {"tensor": -1, "data": 4}, {"fsdp": -1}],
    ids=str,
)
def test_what_is_left_of_the_devices_is_left_on_one_axis(mesh, program):
    """How many -1 is, the devices decide: no change is computed from it, and none has it twice."""
    start = config(mesh={"fsdp": 2, **mesh})
    changes = list(fit.candidates(start, program, {"temporaries": 8, "total": 10}, 6))
    assert all(fit.with_values(start, change) for change in changes)


def test_one_data_part_leaves_the_rest_to_the_axis_that_has_it():
    for mesh, change in (({"tensor": -1, "fsdp": 2}, {}), ({}, {"mesh.fsdp": -1})):
        changes = fit.candidates(config(mesh=mesh), "update", {"total": 10}, 6)
        assert {"mesh.data": 1, **change} in changes


def test_a_value_that_cannot_be_is_one_line():
    with pytest.raises(ConfigError, match="config x: mesh: mesh sizes"):
        fit.with_values(config(), {"mesh.tensor": -2})


def test_nothing_helps_is_said():
    assert search(FakeCompiler(weights=900 * GB), 12 * GB, config()) is None
