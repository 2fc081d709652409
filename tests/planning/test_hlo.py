"""Reading compiled text: FLOPs, bytes, cycles and collectives times the trips of their loops, against hand counts."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.planning import hlo
from tests import tiny

TEXTS = pathlib.Path(__file__).parent / "texts"
# A device of v5e:2x2 computes x = tanh(x w_l) with l of 7, x bf16 [512, 1024] split over 4 devices, w f32 [7, 1024, 1024] split
# in its contracted dimension, then x = x w_0 while mean(x) > 0.
TPU = (TEXTS / "v5e_scan_and_while.hlo").read_text()
PRODUCT = 2 * 128 * 1024 * 1024


def compiled(f, *shapes, **options) -> hlo.Module:
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.parse(jax.jit(f, **options).lower(*arguments).compile().as_text())


def flops(module: hlo.Module) -> float:
    measured = hlo.measure(module, layers=0)
    return sum(work.flops for work in measured.once.values())


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


def test_a_batch_of_products_is_counted_once_for_each():
    module = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (6, 32, 48), (6, 48, 40))
    assert flops(module) == 6 * 2 * 32 * 48 * 40


def test_a_slice_is_read_as_a_slice():
    """Layer i of stacked weights: the bytes of one layer, not of all."""
    module = compiled(lambda w, i: w[i.astype(int)] * 2, (50, 64, 64), ())
    (work,) = hlo.measure(module, layers=0).once.values()
    assert work.nbytes < 5 * 4 * 64 * 64


def test_a_slice_inside_two_fusions_is_read_and_changed_as_a_slice():
    """libtpu fuses the slice of a layer's cache into a product, and the write of a token into the stacked cache."""
    text = (
        "%inner (p: f32[36,64,64], i: s32[]) -> f32[64,64] {\n"
        "  %p = f32[36,64,64]{2,1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %z = s32[] constant(0)\n"
        "  %s = f32[1,64,64]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,64,64}\n"
        "  ROOT %b = f32[64,64]{1,0} bitcast(%s)\n}\n"
        "%outer (q: f32[36,64,64], j: s32[], x: f32[8,64]) -> (f32[8,64], f32[36,64,64]) {\n"
        "  %q = f32[36,64,64]{2,1,0} parameter(0)\n  %j = s32[] parameter(1)\n  %x = f32[8,64]{1,0} parameter(2)\n"
        "  %w = f32[64,64]{1,0} fusion(%q, %j), kind=kLoop, calls=%inner\n"
        "  %d = f32[8,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        "  %n = f32[1,8,64]{2,1,0} bitcast(%d)\n  %k = s32[] constant(0)\n"
        "  %u = f32[36,64,64]{2,1,0} dynamic-update-slice(%q, %n, %j, %k, %k)\n"
        "  ROOT %t = (f32[8,64]{1,0}, f32[36,64,64]{2,1,0}) tuple(%d, %u)\n}\n"
        "ENTRY %main (a: f32[36,64,64], l: s32[], y: f32[8,64]) -> (f32[8,64], f32[36,64,64]) {\n"
        "  %a = f32[36,64,64]{2,1,0} parameter(0)\n  %l = s32[] parameter(1)\n  %y = f32[8,64]{1,0} parameter(2)\n"
        "  ROOT %f = (f32[8,64]{1,0}, f32[36,64,64]{2,1,0}) fusion(%a, %l, %y), kind=kOutput, calls=%outer\n}\n"
    )
    (work,) = hlo.measure(hlo.parse(text), layers=36).once.values()
    layer, rows = 4 * 64 * 64, 4 * 8 * 64
    assert work.flops == 2 * 8 * 64 * 64
    assert work.nbytes == layer + 4 + rows + 2 * rows  # read: slice, index, x; written: d twice


def test_tpu_text_flops_cycles_and_loops_of_unknown_length():
    module = hlo.parse(TPU)
    trips = {
        use.instruction.name: hlo.loop_trips(module, use.instruction)
        for use in hlo.uses(module)
        if use.instruction.opcode == "while"
    }
    assert sorted(trips.values(), key=str) == [7, None]
    measured = hlo.measure(module, layers=7)
    once, each = (sum(parts.values(), hlo.Work()) for parts in (measured.once, measured.each))
    assert once.flops == 7 * PRODUCT and each.flops == PRODUCT
    assert once.cycles == 7 * (5206 + 5703) + 4044 + 55368 + 6400
    assert each.cycles == 5703 + 3511
    # float32 weights in the main memory, once; what lies on the chip (space 1) costs no traffic
    assert 4 * 7 * 256 * 1024 < once.nbytes < 2 * 4 * 7 * 256 * 1024


def test_tpu_text_collectives():
    found = {
        c.place: c for c in hlo.measure(hlo.parse(TPU), layers=7).collectives if c.nbytes > 100
    }
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


def test_collectives_of_a_sharded_product():
    """A sum over 4 devices of float32 [16, 8] each: twice three quarters of it is sent."""
    mesh = tiny.mesh(fsdp=4)
    at = [
        NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        NamedSharding(mesh, PartitionSpec("fsdp")),
    ]
    everywhere = NamedSharding(mesh, PartitionSpec())
    module = compiled(jnp.matmul, (16, 32), (32, 8), in_shardings=at, out_shardings=everywhere)
    (one,) = hlo.measure(module, 0, hosts=np.array([0, 0, 1, 1])).collectives
    assert (one.kind, one.group, one.nbytes) == ("all-reduce", 4, 2 * 3 * 16 * 8 * 4 // 4)
    assert one.crosses and one.place == "once"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("channel_id=1", []),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    assert hlo.replica_groups(text).tolist() == groups


def test_a_batch_of_products_written_as_a_convolution():
    """As TPUs do: of a window of 16 positions that is dilated by 16, one meets the input for each output."""
    text = (
        "ENTRY %main (a: bf16[16,8,32], b: bf16[16,32,64]) -> bf16[16,8,64] {\n"
        "  %a = bf16[16,8,32]{2,1,0} parameter(0)\n  %b = bf16[16,32,64]{2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[16,8,64]{2,1,0} convolution(%a, %b), "
        "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf\n}\n"
    )
    assert flops(hlo.parse(text)) == 16 * 2 * 8 * 32 * 64


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
    assert hlo.part_of(name) == part


def _kernel(out: str, *operands: str) -> hlo.Module:
    """A program of one of libtpu's kernels."""
    defined = "".join(f"  %p{i} = {a} parameter({i})\n" for i, a in enumerate(operands))
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    call = f'  ROOT %k = {out} custom-call({names}), custom_call_target="tpu_custom_call"\n'
    return hlo.parse(f"ENTRY %main (p: s32[]) -> f32[] {{\n{defined}{call}}}\n")


def test_a_kernel_that_multiplies_groups_of_rows_counts_the_rows_that_are_there():
    """4 of 16 experts are on this device: a quarter of the rows, if they are spread evenly. A kernel has the peak's time."""
    rates = hlo.Rates(flops=1e6, memory=1e12, clock=1e3)
    rows, inner, outer = "bf16[512,32]{1,0}", "bf16[4,32,64]{2,1,0}", "bf16[512,64]{1,0}"
    expected = 2 * 512 * 32 * 64 / 4
    for module in (
        _kernel(outer, "s32[5]{0}", rows, inner),
        _kernel(inner, "s32[5]{0}", rows, outer),
    ):
        (work,) = hlo.measure(module, layers=1, rates=rates, experts=16).once.values()
        assert work.flops == expected
        assert work.limit == pytest.approx(expected / 1e6)
        assert work.cycles == pytest.approx(work.limit * 1e3)
    other = _kernel("s32[5]{0}", "s32[4]{0}")
    (work,) = hlo.measure(other, layers=1, rates=rates, experts=16).once.values()
    assert work.flops == 0


def test_sums_of_a_shard_map_share_a_channel_and_are_all_counted():
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        "  %a = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add\n"
        "  ROOT %b = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%add\n}\n"
    )
    (found,) = hlo.measure(hlo.parse(text), layers=1).collectives
    assert (found.count, found.nbytes) == (2, 2 * 32)


def test_a_permute_sends_what_it_was_given():
    """Its start gives the operand, the result and two numbers of the runtime."""
    text = (
        "ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {\n  %p = bf16[4,8]{1,0} parameter(0)\n"
        "  %s = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=1, "
        "source_target_pairs={{0,1},{1,0}}\n"
        "  ROOT %d = bf16[4,8]{1,0} collective-permute-done(%s)\n}\n"
    )
    (found,) = hlo.measure(hlo.parse(text), layers=1).collectives
    assert (found.kind, found.count, found.nbytes) == ("collective-permute", 1, 64)
