"""The check of memory at the start of a run: it refuses with numbers, and costs nothing on CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rest_jax.errors import UserError
from rest_jax.planning import memory
from rest_jax.planning.programs import Program
from tests import tiny

X = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def program() -> Program:
    """Doubles 256 KiB, while 1 MiB lies beside it."""
    beside = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    return Program(
        "update",
        lambda: jax.jit(lambda x: 2 * x).lower(X),
        {"parameters": X},
        {"optimiser": beside},
    )


def test_a_program_needs_its_arguments_its_outputs_and_what_lies_beside():
    one = program()
    needed = memory.usage(one, memory.Allocation.of(one.lower().compile()))
    parts = dict(needed.parts)
    assert parts.pop("temporaries", 0) < 2**16
    assert parts == {"parameters": 2**18, "outputs": 2**18, "optimiser": 2**20}


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (22.50G) exceeds available HBM (15.75G).",
    ],
)
def test_what_xla_refuses_is_known_by_what_it_says(said):
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    lowered: Any = Refused()
    assert memory.compile_or_measure(lowered) == int(22.5 * 2**30)
    needed = memory.usage(program(), int(22.5 * 2**30))
    assert needed.total == int(22.5 * 2**30) + 2**20


def test_a_run_that_does_not_fit_is_refused_with_the_numbers_and_the_key(monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda mesh: 2**20)
    with pytest.raises(
        UserError, match=r"update needs 0.00 GiB.*lower train.max_tokens_per_microbatch"
    ):
        memory.check_memory(lambda: {"update": program()}, tiny.mesh())
    monkeypatch.setattr(memory, "memory_limit", lambda mesh: 2**22)
    memory.check_memory(lambda: {"update": program()}, tiny.mesh())


def test_on_cpu_nothing_is_made_for_the_check():
    memory.check_memory(lambda: pytest.fail("made"), tiny.mesh())
