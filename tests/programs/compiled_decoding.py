"""compiled_decoding.py TOPOLOGY: attention of new tokens to a paged cache for four chips of it, in the shapes of several models.

Prints, as JSON, the pages that a visit of each kernel of a compiled program reads, and how many gathers of floats XLA makes.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig
from rest_jax.distributed import BATCH_AXES, activate, make_mesh
from rest_jax.models.attention import attend_cache
from rest_jax.models.cache import DecodeLayout, LayerCache, PagedKeys, PageTable, Pool
from rest_jax.models.paged_attention import list_visits
from rest_jax.planning import hlo, topology
from rest_jax.planning.work import is_kernel, kernel_bytes

devices = topology.devices(topology.parse(sys.argv[1]))
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices[:4])
W, LAYERS, PAGES, SIZE = 2, 4, 100, 64
# attention heads, kv heads, width of a head, slots, prompts, responses of one, dtype
SHAPES = {
    "Qwen3-1.7B": (16, 8, 128, 64, 32, 8, jnp.bfloat16),
    "Qwen3-8B": (32, 8, 128, 256, 64, 4, jnp.bfloat16),
    "Llama-3.2-1B": (32, 8, 64, 64, 16, 5, jnp.bfloat16),
    "one kv head a chip": (14, 2, 64, 16, 16, 1, jnp.bfloat16),
    "in float32": (16, 8, 128, 8, 8, 3, jnp.float32),
}


def array(dtype, *shape, axes=(BATCH_AXES,)):
    """Abstract, split over these axes."""
    where = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def attend(q, own, layer, tables, recent_rows, slots, pool, recent):
    """Of one layer, as `decode` has it."""
    prompts, responses = tables
    keys = PagedKeys(list_visits(prompts), list_visits(responses, recent_rows))
    layout = DecodeLayout(keys, jnp.int32(0), *slots)
    return attend_cache(q, own, layout, LayerCache(pool, layer, *recent))


def measure(heads, kv_heads, width, slots, prompts, group, dtype):
    """What the compiled program has."""
    by_head = functools.partial(array, dtype, axes=(BATCH_AXES, None, "tensor"))
    pages = functools.partial(array, dtype, axes=(None, BATCH_AXES, None, "tensor"))
    number = functools.partial(array, jnp.int32)
    tables = [PageTable(*(number(W, n, 8),) * 3) for n in (prompts, slots)]
    given = (
        by_head(W, slots, heads, width),
        (by_head(W, slots, kv_heads, width),) * 2,
        array(jnp.int32, axes=()),
        tables,
        (number(W, slots),) * 2,
        (number(W, slots), number(W, slots), number(W, prompts, group)),
        Pool(*(pages(LAYERS, W, PAGES, kv_heads, SIZE, width),) * 2),
        (pages(LAYERS, W, slots, kv_heads, SIZE, width),) * 2,
    )
    with activate(mesh):
        text = jax.jit(attend).lower(*given).compile().as_text()
    used = [use.instruction for use in hlo.uses(hlo.parse(text))]
    page = 2 * kv_heads // 2 * SIZE * width * jnp.dtype(dtype).itemsize
    found = [kernel_bytes(one) / page for one in used if is_kernel(one)]
    floats = [one for one in used if one.opcode == "gather" and "f" in one.outputs[0].dtype]
    return {"pages": found, "gathers": len(floats)}


print(json.dumps({name: measure(*shape) for name, shape in SHAPES.items()}))
