"""What is measured of the kernels, at tiny sizes."""

import json

import numpy as np
import pytest

from benchmarks import kernels

SMALL = ["--heads", "4", "2", "16", "--rows", "1", "--group", "2", "--repeats", "1"]
SIZES = ["--prompt-tokens", "40", "--response-tokens", "9"]


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel_is_compared_and_timed(capsys, dtype):
    names = ["triton", "blocks"]
    assert kernels.main([*SMALL, *SIZES, "--dtype", dtype, "--kernels", *names]) == 0
    found = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [record["kernel"] for record in found] == names
    for record in found:
        apart = [record[name] for name in ("out", "d_q", "d_k", "d_v")]
        assert max(apart) < (1e-6 if dtype == "float32" else 1e-2)
        assert min(record["forward_ms"], record["both_tflops"]) > 0


def test_a_wrong_kernel_is_seen():
    args = kernels.parse([*SMALL, *SIZES])
    apart = kernels.differences(
        lambda q, k, v, layout: 1.01 * kernels.KERNELS["blocks"](q, k, v, layout), args
    )
    assert min(apart.values()) > 5e-3


def test_pairs_are_those_of_the_mask():
    groups = ((3, (2, 1)), (1, (1,)))
    layout = kernels.group_row(groups, 10)
    position = np.asarray(kernels.query_positions(layout.until)[0])
    time = np.arange(10)
    seen = (time <= position[:, None]) & (position[:, None] < np.asarray(layout.until[0]))
    assert layout.pairs == seen.sum() == (6 + 2 * 3 + 3 + 3 + 1) + (1 + 2)


def test_heads_that_do_not_divide_are_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--heads", "4", "3", "16"])
    assert stopped.value.code == 2
    assert "--heads 4 3" in capsys.readouterr().err
