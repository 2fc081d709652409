"""FLOPs and bytes of the instructions of compiled text, against hand counts."""

import jax.numpy as jnp

from rest_jax.planning import hlo
from rest_jax.planning.measure import Sizes, measure
from tests.planning.compiling import compiled, flops


def test_a_batch_of_products_is_counted_once_for_each():
    module = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (6, 32, 48), (6, 48, 40))
    assert flops(module) == 6 * 2 * 32 * 48 * 40


def test_a_slice_is_read_as_a_slice():
    """Layer i of stacked weights: the bytes of one layer, not of all."""
    module = compiled(lambda w, i: w[i.astype(int)] * 2, (50, 64, 64), ())
    (work,) = measure(module, Sizes(0)).once.values()
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
    (work,) = measure(hlo.parse(text), Sizes(36)).once.values()
    layer, rows = 4 * 64 * 64, 4 * 8 * 64
    assert work.flops == 2 * 8 * 64 * 64
    assert work.nbytes == layer + 4 + rows + 2 * rows  # read: slice, index, x; written: d twice


def test_a_batch_of_products_written_as_a_convolution():
    """As TPUs do: of a window of 16 positions that is dilated by 16, one meets the input for each output."""
    text = (
        "ENTRY %main (a: bf16[16,8,32], b: bf16[16,32,64]) -> bf16[16,8,64] {\n"
        "  %a = bf16[16,8,32]{2,1,0} parameter(0)\n  %b = bf16[16,32,64]{2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[16,8,64]{2,1,0} convolution(%a, %b), "
        "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf\n}\n"
    )
    assert flops(hlo.parse(text)) == 16 * 2 * 8 * 32 * 64
