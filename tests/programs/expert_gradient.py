"""expert_gradient.py: compiles the gradient of a layer of experts for a v5p slice; what XLA made of it, as JSON on stdout.

`flops` of a device with rows spread evenly over the experts, `exact` those of the experts that its tokens have (forward pass,
once more in the backward pass, and twice that for the gradients), `gathers`: how many matrices are gathered, and `sums`: [kind,
dtype] of every collective that adds up gradients of matrices. Gathered rows are computed in two parts.
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig
from rest_jax.distributed import activate, batch_sharding, make_mesh, place
from rest_jax.models import moe
from rest_jax.models.config import DecoderConfig
from rest_jax.models.moe import ExpertWeights, Routing, mix_experts
from rest_jax.planning import hlo
from rest_jax.planning.measure import Sizes, measure

TOKENS, EXPERTS, CHOSEN, D, F = 512, 16, 2, 256, 128
moe._ROWS = TOKENS * CHOSEN
cfg = DecoderConfig(
    "qwen3_moe",
    64,
    D,
    1,
    4,
    4,
    64,
    F,
    n_experts=EXPERTS,
    experts_per_token=CHOSEN,
    dtype="bfloat16",
)
devices = topologies.get_topology_desc("v5p:2x2x2", "tpu").devices
mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2), list(devices))


def total(x, weight, experts, chosen):
    valid = jnp.ones(x.shape[:2], bool)
    y = mix_experts(x, Routing(chosen, weight, weight, chosen), valid, experts, cfg)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))


def abstract(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


batch = mesh.size, TOKENS
rows = batch_sharding(mesh)
wide, narrow = (
    NamedSharding(mesh, PartitionSpec("expert", *axes)) for axes in (("fsdp",), ("tensor", "fsdp"))
)
placed = ExpertWeights(wide, wide, narrow)
wide, narrow = abstract("float32", EXPERTS, D, F), abstract("float32", EXPERTS, F, D)
experts = place(ExpertWeights(wide, wide, narrow), placed)
x = place(abstract("bfloat16", *batch, D), rows)
weight, chosen = (place(abstract(d, *batch, CHOSEN), rows) for d in ("float32", "int32"))
with activate(mesh):
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)), out_shardings=(rows, rows, placed))
    text = gradient.lower(x, weight, experts, chosen).compile().as_text()

module = hlo.parse(text)
work = measure(module, Sizes(0, EXPERTS)).once
sums, gathers = [], 0
for use in hlo.uses(module):
    kind = use.instruction.opcode.removesuffix("-start")
    matrices = [a for a in use.instruction.outputs if len(a.shape) == 3 and F in a.shape]
    if kind in ("all-reduce", "reduce-scatter"):
        sums += [[kind, a.dtype] for a in matrices]
    gathers += len(matrices) if kind == "all-gather" else 0
flops, exact = sum(part.flops for part in work.values()), 4 * 2 * 3 * TOKENS * CHOSEN * D * F
print(json.dumps({"flops": flops, "exact": exact, "gathers": gathers, "sums": sums}))
