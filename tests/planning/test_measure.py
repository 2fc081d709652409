"""Sums over compiled text: FLOPs, bytes, cycles and collectives times the trips of their loops, against hand counts."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from rest_jax.planning import hlo
from rest_jax.planning.measure import KERNEL_RATE, Rates, Sizes, Work, measure, part_of
from tests.planning.compiling import compiled, flops

TEXTS = pathlib.Path(__file__).parent / "texts"
# A device of v5e:2x2 computes x = tanh(x w_l) with l of 7, x bf16 [512, 1024] split over 4 devices, w f32 [7, 1024, 1024] split
# in its contracted dimension, then x = x w_0 while mean(x) > 0.
TPU = (TEXTS / "v5e_scan_and_while.hlo").read_text()
PRODUCT = 2 * 128 * 1024 * 1024


def test_a_loop_counts_as_often_as_it_runs():
    """XLA's own count takes the body once."""

    def f(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert flops(compiled(f, (5, 64, 64), (32, 64))) == 5 * 2 * 32 * 64 * 64


def test_loops_inside_loops_multiply():
    def f(w, x):
        def twice(x, w):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ w), x), None

        return jax.lax.scan(twice, x, w)[0]

    assert flops(compiled(f, (5, 64, 64), (32, 64))) == 15 * 2 * 32 * 64 * 64


def test_tpu_text_flops_cycles_and_loops_of_unknown_length():
    module = hlo.parse(TPU)
    trips = {
        use.instruction.name: hlo.loop_trips(module, use.instruction)
        for use in hlo.uses(module)
        if use.instruction.opcode == "while"
    }
    assert sorted(trips.values(), key=str) == [7, None]
    measured = measure(module, Sizes(7))
    once, each = (sum(parts.values(), Work()) for parts in (measured.once, measured.each))
    assert once.flops == 7 * PRODUCT and each.flops == PRODUCT
    assert once.cycles == 7 * (5206 + 5703) + 4044 + 55368 + 6400
    assert each.cycles == 5703 + 3511
    # float32 weights in the main memory, once; what lies on the chip (space 1) costs no traffic
    assert 4 * 7 * 256 * 1024 < once.nbytes < 2 * 4 * 7 * 256 * 1024


def test_a_pallas_kernel_counts_what_it_says_of_itself():
    """libtpu has no cycles for it. Its bytes are those of its arrays in the main memory."""
    estimate = '"cost_estimate":{"flops":"%d","transcendentals":"7","bytes_accessed":"9"}'
    line = (
        "  %%%s = bf16[8,64]{1,0:T(8,128)} custom-call(%%x, %%y), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attention/pallas_call"}, '
        'backend_config={"custom_call_config":{"body":"T0",' + estimate + "}}"
    )
    text = "\n".join(
        [
            "HloModule jit_f",
            "",
            "ENTRY %main (x: bf16[8,64], y: bf16[8,64]) -> bf16[8,64] {",
            "  %x = bf16[8,64]{1,0} parameter(0)",
            "  %y = bf16[8,64]{1,0:S(1)} parameter(1)",
            line % ("long", 4_000_000),
            line % ("short", 1),
            "}",
        ]
    )
    nbytes = 2 * 2 * 8 * 64  # x and the output
    found = measure(hlo.parse(text), Sizes(0), Rates(flops=1e6, memory=nbytes / 3)).once
    assert found["attention"].flops == 4_000_001 and found["attention"].cycles == 0
    assert found["attention"].kernels == pytest.approx(4 / KERNEL_RATE + 3)
    assert measure(hlo.parse(text), Sizes(0)).once["attention"].kernels == 0


def test_a_kernel_of_triton_counts_what_its_name_says():
    """Its call has no cost estimate. On GPUs everything is taken to run at the peak."""
    line = (
        '  ROOT %k = bf16[8,64]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(f)/attention/forward_kernel_2000000_flops/pallas_call"}, '
        'backend_config={name = "forward_kernel", num_warps = 8 : i32}'
    )
    x = "  %x = bf16[8,64]{1,0} parameter(0)"
    text = "\n".join(["ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {", x, line, "}"])
    work = measure(hlo.parse(text), Sizes(0), Rates(flops=1e6, memory=1e9)).once["attention"]
    assert (work.flops, work.nbytes, work.limit) == (2e6, 2 * 2 * 8 * 64, 2)


def test_a_kernel_counts_as_often_as_it_visits_something():
    """What it says of itself is that of one visit; it does not read its operands whole."""
    line = (
        "  %%%s = bf16[8,64]{1,0} custom-call(%%x), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attention/%s/pallas_call"}, '
        'backend_config={"custom_call_config":{"body":"T0","cost_estimate":'
        '{"flops":"1000","transcendentals":"7","bytes_accessed":"300"}}}'
    )
    text = "\n".join(
        [
            "ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {",
            "  %x = bf16[8,64]{1,0} parameter(0)",
            line % ("a", "prompt_pages"),
            line % ("b", "response_pages"),
            line % ("c", "other_pages"),
            "}",
        ]
    )
    module, rates = hlo.parse(text), Rates(flops=1e6, memory=1e3)
    plain = measure(module, Sizes(1), rates).once["attention"]
    assert (plain.flops, plain.nbytes) == (3000, 3 * 2 * 2 * 8 * 64)
    trips = {"prompt_pages": 40, "response_pages": 2.5}
    work = measure(module, Sizes(1, trips=trips), rates).once["attention"]
    assert work.flops == (40 + 2.5 + 1) * 1000
    assert work.nbytes == (40 + 2.5) * 300 + 2 * 2 * 8 * 64
    assert work.kernels == pytest.approx(work.nbytes / 1e3)


def test_tpu_text_collectives():
    found = {c.place: c for c in measure(hlo.parse(TPU), Sizes(7)).collectives if c.nbytes > 100}
    gathered = 2 * 1024 * 1024 * 3 // 4
    layers, tokens = found["layer loop"], found["token loop"]
    assert (layers.kind, layers.group, layers.count, layers.nbytes) == (
        "all-gather",
        4,
        7,
        7 * gathered,
    )
    assert (tokens.kind, tokens.count, tokens.nbytes) == ("all-gather", 1, gathered)
    assert not layers.crosses and not layers.overlaps


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "jit(add)/transpose(jvp(trunk))/Decoder/blocks/while/body/attention/dot_general",
            "attention",
        ),
        ("jit(add)/vocabulary/while/body/dot_general", "vocabulary"),
        ("jit(decode)/decode/while/body/trunk/Decoder/blocks/mlp/dot_general", "mlp"),
        ("jit(decode)/decode/while/body/draw/sort", "draw"),
        ("jit(f)/add", "other"),
    ],
)
def test_parts_are_those_of_the_model(name, part):
    assert part_of(name) == part


def _kernel(out: str, *operands: str) -> hlo.Module:
    """A program of one of libtpu's kernels."""
    defined = "".join(f"  %p{i} = {a} parameter({i})\n" for i, a in enumerate(operands))
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    call = f'  ROOT %k = {out} custom-call({names}), custom_call_target="tpu_custom_call"\n'
    return hlo.parse(f"ENTRY %main (p: s32[]) -> f32[] {{\n{defined}{call}}}\n")


def test_a_kernel_that_multiplies_groups_of_rows_counts_the_rows_that_are_there():
    """4 of 16 experts are on this device: a quarter of the rows, if they are spread evenly. A kernel has a share of the peak."""
    rates = Rates(flops=1e6, memory=1e12)
    rows, inner, outer = "bf16[512,32]{1,0}", "bf16[4,32,64]{2,1,0}", "bf16[512,64]{1,0}"
    expected = 2 * 512 * 32 * 64 / 4
    for module in (
        _kernel(outer, "s32[5]{0}", rows, inner),
        _kernel(inner, "s32[5]{0}", rows, outer),
    ):
        (work,) = measure(module, Sizes(1, experts=16), rates).once.values()
        assert work.flops == expected
        assert work.limit == pytest.approx(expected / 1e6)
        assert work.kernels == pytest.approx(work.limit / KERNEL_RATE)
    other = _kernel("s32[5]{0}", "s32[4]{0}")
    (work,) = measure(other, Sizes(1, experts=16), rates).once.values()
    assert work.flops == 0


def test_sums_of_a_shard_map_share_a_channel_and_are_all_counted():
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        "  %a = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add\n"
        "  ROOT %b = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%add\n}\n"
    )
    (found,) = measure(hlo.parse(text), Sizes(1)).collectives
    assert (found.count, found.nbytes) == (2, 2 * 32)


def test_a_permute_sends_what_it_was_given():
    """Its start gives the operand, the result and two numbers of the runtime."""
    text = (
        "ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {\n  %p = bf16[4,8]{1,0} parameter(0)\n"
        "  %s = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=1, "
        "source_target_pairs={{0,1},{1,0}}\n"
        "  ROOT %d = bf16[4,8]{1,0} collective-permute-done(%s)\n}\n"
    )
    (found,) = measure(hlo.parse(text), Sizes(1)).collectives
    assert (found.kind, found.count, found.nbytes) == ("collective-permute", 1, 64)
