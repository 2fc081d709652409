"""Collectives of compiled text: their groups, and what a device sends."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.planning import hlo
from rest_jax.planning.collectives import replica_groups
from rest_jax.planning.measure import Sizes, measure
from tests import tiny
from tests.planning.compiling import compiled


def test_collectives_of_a_sharded_product():
    """A sum over 4 devices of float32 [16, 8] each: twice three quarters of it is sent."""
    mesh = tiny.mesh(fsdp=4)
    at = [
        NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        NamedSharding(mesh, PartitionSpec("fsdp")),
    ]
    everywhere = NamedSharding(mesh, PartitionSpec())
    module = compiled(jnp.matmul, (16, 32), (32, 8), in_shardings=at, out_shardings=everywhere)
    (one,) = measure(module, Sizes(0), hosts=np.array([0, 0, 1, 1])).collectives
    assert (one.kind, one.group, one.nbytes) == ("all-reduce", 4, 2 * 3 * 16 * 8 * 4 // 4)
    assert one.crosses and one.place == "once"


@pytest.mark.parametrize(
    ("transfer", "kind", "sent"),
    [
        ("ALL_REDUCE", "all-reduce", 2 * 2 / 3),
        ("ALL_GATHER", "all-gather", 2 / 3),
        ("REDUCE_SCATTER", "reduce-scatter", 2),
        ("ALL_TO_ALL", "all-to-all", 2 / 3),
        ("ONE_TO_ONE", "collective-permute", 1),
    ],
)
@pytest.mark.parametrize("between", ["", "  %t = f32[64]{0} tanh(%x), backend_config={}\n"])
def test_what_slices_exchange_is_a_collective_that_crosses(transfer, kind, sent, between):
    """As libtpu writes it for 3 slices: a send and a recv of its runtime, whose channels others have, too."""
    attributes = (
        "channel_id=1, is_host_transfer=true, frontend_attributes={"
        f'_xla_megascale_target="{{1,2,3}}x{{0:3}}",_xla_megascale_transfer_type="{transfer}"}}'
    )
    text = (
        "ENTRY %main (x: f32[64]) -> f32[96] {\n  %x = f32[64]{0} parameter(0)\n  %a = token[] after-all()\n"
        "  %g = f32[96]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}\n"
        f"  %s = (f32[96]{{0}}, u32[], token[]) send(%x, %a), {attributes}\n"
        f"  %r = (f32[96]{{0}}, u32[], token[]) recv(%a), {attributes}\n{between}"
        "  %e = token[] send-done(%s), channel_id=1, is_host_transfer=true\n"
        "  %d = (f32[96]{0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true\n"
        "  ROOT %o = f32[96]{0} get-tuple-element(%d), index=0\n}\n"
    )
    inside, outside = measure(hlo.parse(text), Sizes(0)).collectives
    assert (inside.kind, inside.group, inside.crosses) == ("all-gather", 4, False)
    assert (outside.kind, outside.group, outside.count) == (kind, 3, 1)
    assert outside.crosses and outside.overlaps == bool(between)
    assert outside.nbytes == 4 * 96 * sent


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        (
            "replica_groups=mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'a'}",
            [[0, 1, 2], [3, 4, 5]],
        ),
        (
            "replica_groups=mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'b'}",
            [[0, 3], [1, 4], [2, 5]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ('x={_xla_megascale_target="{1,2,3}x{0:3}"}', [[1, 2, 3]]),
        ("x={_xla_megascale_target={{100000,200000},{100001,200001}}}", [[100000, 200000]]),
        ("channel_id=1", []),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    assert replica_groups(text).tolist() == groups


def test_an_unknown_form_of_groups_is_an_error():
    with pytest.raises(ValueError, match=r"not known.*ring"):
        replica_groups("all-reduce(%x), replica_groups=ring[4], to_apply=%add")
    assert replica_groups("all-reduce(%x), replica_groups={}, to_apply=%add").size == 0


def test_libtpu_writes_a_scattered_sum_as_a_fusion_with_slices():
    """A device sends (n - 1) / n of what is summed, not twice that; it waits for it."""
    text = (
        "%all-reduce-scatter.1 (i: f32[8,4]) -> f32[2,4] {\n"
        "  %i = f32[8,4]{1,0} parameter(0)\n  %zero = u32[] constant(0)\n"
        "  %r = f32[8,4]{1,0} all-reduce(%i), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add\n"
        "  ROOT %s = f32[2,4]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={2,4}\n}\n"
        "ENTRY %main (p: f32[8,4]) -> f32[2,4] {\n  %p = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %f = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    )
    (found,) = measure(hlo.parse(text), Sizes(1)).collectives
    assert (found.kind, found.count, found.nbytes) == ("reduce-scatter", 1, 96)
    assert not found.overlaps
