"""Transposed copies."""

import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.models.hf.table import copy_in_order


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_a_copy_in_order_has_the_same_values(axes, dtype):
    x = np.random.default_rng(0).normal(size=(37, 3, 70)).astype(jnp.dtype(dtype)).transpose(axes)
    copied = copy_in_order(x)
    assert copied.flags.c_contiguous and copied.dtype == x.dtype
    np.testing.assert_array_equal(copied, x)


def test_what_is_in_order_is_not_copied():
    x = np.arange(12).reshape(3, 4)
    assert copy_in_order(x) is x
