"""What the kernels ask of Triton; what they compute is in `test_attention.py`."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from rest_jax.models.cache import RowLayout
from rest_jax.models.triton_attention import _make_case, triton_attention


def gradients(width, dtype):
    """(function, abstract arrays) of the gradients of two rows of 300 positions, 3 heads to each of 2 kv heads."""

    def total(q, k, v, until):
        return jnp.sum(triton_attention(q, k, v, RowLayout(until, 100)).astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((2, *n, 300, width), dtype) for n in [(2, 3), (2,)])
    return jax.grad(total, (0, 1, 2)), (q, k, k, jax.ShapeDtypeStruct((2, 300), jnp.int32))


def precisions(jaxpr):
    """Of all matrix products."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for inner in jaxprs_in_params(eqn.params):
            yield from precisions(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [24, 128])
def test_kernels_are_lowered_for_gpus(width, dtype):
    """Where there is none: Triton refuses arrays that are no power of two and operations that it does not have."""
    function, arrays = gradients(width, jnp.dtype(dtype))
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @(\S+)\(", text) == ["__gpu$xla.gpu.triton"] * 3


def test_float32_is_multiplied_in_float32():
    """By default a GPU rounds it to TF32."""
    function, arrays = gradients(64, jnp.float32)
    found = list(precisions(jax.make_jaxpr(function)(*arrays).jaxpr))
    # of three kernels, compiled and interpreted
    assert found == [(jax.lax.Precision.HIGHEST,) * 2] * 2 * (2 + 3 + 4)


@pytest.mark.parametrize("time", [1, 100, 300, 4096])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_blocks_fit_into_a_gpu(width, itemsize, time):
    """Two of a program's own, and two pairs of those that it loops over, in 99 KB of shared memory; one pair forward, where a
    program has one of its own.
    """
    case = _make_case(time, width, itemsize, 1)
    assert min(case.own, case.step, case.gradient_step) >= 16
    assert case.own % case.step == case.own % case.gradient_step == 0
    assert (case.own + 4 * case.step) * width * itemsize <= 98 * 2**10
    assert (2 * case.own + 4 * case.gradient_step) * width * itemsize <= 98 * 2**10
