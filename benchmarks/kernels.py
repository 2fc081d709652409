"""Attention of packed rows on this device: how exact each kernel is, and how long it takes.

    JAX_PLATFORMS=cuda python -m benchmarks.kernels [--kernels triton blocks] [--heads 16 8 128] [--dtype bfloat16]

A row has one group: a prompt and `group` responses behind it, as an update has them. One JSON line a kernel: the largest
difference of the result and of the three gradients from those of plain softmax attention in float64 on the host (a row with
prompts and responses of uneven lengths, and padding), over the largest entry; then milliseconds of a forward pass, and of one
with its gradients, medians of `--repeats`, and the TFLOP/s that the pairs of query and key which see each other make of them.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.process import Parser, positive, start
from benchmarks.rollout import add_dtype
from rest_jax.models.attention import KERNELS
from rest_jax.models.cache import RowLayout
from rest_jax.models.score_blocks import query_positions

DESCRIPTION = (
    "Attention of packed rows on this device: how exact each kernel is, and how long it takes."
)
UNEVEN = (203, (37, 1, 90, 64)), (65, (130, 2)), (31, (5,))  # prompt and responses of each group


def group_row(groups: Any, length: int) -> RowLayout:
    """`until` of one row: a key of a prompt is seen to the end of its group, one of a response to that of the response."""
    until, at, pairs = np.zeros(length, np.int32), 0, 0
    for prompt, responses in groups:
        until[at : at + prompt] = at + prompt + sum(responses)
        at += prompt
        pairs += prompt * (prompt + 1) // 2
        for response in responses:
            until[at : at + response] = at + response
            at += response
            pairs += response * prompt + response * (response + 1) // 2
    return RowLayout(jnp.asarray(until)[None], pairs)


def exact(q: Any, k: Any, v: Any, d_out: Any, layout: RowLayout) -> list[Any]:
    """Result and gradients by the definition, float64. q `[K R T H]`, the others `[K T H]` and like q."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    until = np.asarray(layout.until[0])
    position = np.asarray(query_positions(layout.until)[0])
    time_ = np.arange(len(until))
    seen = (time_ <= position[:, None]) & (position[:, None] < until)
    score = np.where(seen, np.einsum("krth,ksh->krts", q, k), -np.inf)
    peak = np.max(score, axis=-1, keepdims=True)
    weight = np.exp(score - np.where(np.isfinite(peak), peak, 0))
    total = weight.sum(-1, keepdims=True)
    weight /= np.where(total > 0, total, 1)
    out = np.einsum("krts,ksh->krth", weight, v)
    d_weight = np.einsum("krth,ksh->krts", d_out, v)
    d_score = weight * (d_weight - (d_out * out).sum(-1, keepdims=True))
    d_q = np.einsum("krts,ksh->krth", d_score, k)
    d_k = np.einsum("krts,krth->ksh", d_score, q)
    return [out, d_q, d_k, np.einsum("krts,krth->ksh", weight, d_out)]


def arrays(args: argparse.Namespace, length: int, rows: int) -> list[jax.Array]:
    """q, k, v and the gradient of the result, random."""
    heads, kv_heads, width = args.heads
    keys = jax.random.split(jax.random.key(0), 4)
    of_q = (rows, kv_heads, heads // kv_heads, length, width)
    shapes = of_q, (rows, kv_heads, length, width), (rows, kv_heads, length, width), of_q
    made = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    made[0] *= width**-0.5
    return [x.astype(args.dtype) for x in made]


def differences(kernel: Any, args: argparse.Namespace) -> dict[str, float]:
    """From the definition, over the largest entry."""
    length = sum(prompt + sum(responses) for prompt, responses in UNEVEN) + 40
    layout, inputs = group_row(UNEVEN, length), arrays(args, length, 1)
    out, gradient = jax.jit(
        lambda q, k, v, layout: jax.vjp(lambda *x: kernel(*x, layout), q, k, v)
    )(*inputs[:3], layout)
    found = out, *gradient(inputs[3])
    wanted = exact(*(np.asarray(x[0], np.float32) for x in inputs), layout)
    names = "out", "d_q", "d_k", "d_v"
    return {
        name: float(np.abs(np.asarray(x[0], np.float64) - y).max() / np.abs(y).max())
        for name, x, y in zip(names, found, wanted, strict=True)
    }


def seconds(function: Any, inputs: Any, repeats: int) -> float:
    """Median of a call, without what a single call costs to start: ten are queued at once."""
    jax.block_until_ready(function(*inputs))
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(10):
            out = function(*inputs)
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - begin) / 10)
    return statistics.median(taken)


def measure(kernel: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Of rows with one group each."""
    group = args.prompt_tokens, (args.response_tokens,) * args.group
    length = args.prompt_tokens + args.group * args.response_tokens
    one = group_row([group], length)
    layout = RowLayout(jnp.repeat(one.until, args.rows, axis=0), one.pairs)
    *inputs, d_out = arrays(args, length, args.rows)

    @jax.jit
    def forward(q, k, v, layout):
        return kernel(q, k, v, layout)

    @jax.jit
    def both(q, k, v, layout):
        out, gradient = jax.vjp(lambda *x: kernel(*x, layout), q, k, v)
        return out, gradient(d_out)

    heads, _, width = args.heads
    flops = 4 * one.pairs * args.rows * heads * width
    alone, whole = (seconds(x, (*inputs, layout), args.repeats) for x in (forward, both))
    return {
        "forward_ms": 1e3 * alone,
        "forward_tflops": flops / alone / 1e12,
        "both_ms": 1e3 * whole,
        "both_tflops": 3.5 * flops / whole / 1e12,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked arguments."""
    parser = Parser(prog="python -m benchmarks.kernels", description=DESCRIPTION)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["triton", "blocks"])
    add_dtype(parser)
    text = "query heads, kv heads, width of a head"
    parser.add_argument("--heads", nargs=3, type=positive, default=(16, 8, 128), help=text)
    parser.add_argument("--rows", type=positive, default=4)
    parser.add_argument("--group", type=positive, default=8, help="responses to a prompt")
    parser.add_argument("--prompt-tokens", type=positive, default=1024)
    parser.add_argument("--response-tokens", type=positive, default=256)
    parser.add_argument("--repeats", type=positive, default=5)
    args = parser.parse_args(argv)
    heads, kv_heads, _ = args.heads
    if heads % kv_heads:
        parser.error(f"--heads {heads} {kv_heads}: {heads} heads do not divide among {kv_heads}")
    return args


def main(argv: list[str] | None = None) -> int:
    """0; 2 for bad arguments."""
    args = parse(argv)
    for name in args.kernels:
        found = {"kernel": name, "device": jax.devices()[0].device_kind, "dtype": args.dtype}
        kernel = KERNELS[name]
        found |= {**differences(kernel, args), **measure(kernel, args)}
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    start()
    sys.exit(main())
