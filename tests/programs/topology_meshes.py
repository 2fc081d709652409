"""topology_meshes.py NAME[*SLICES] ...: the meshes of hardware that is not here, as JSON on stdout.

For each topology, and for each of `SIZES`, a record: its name, the sizes asked for, and either `refused` (the message) or
`mesh` (sizes by axis) with the process and the slice of every device in the order of the mesh. `h100:NxM` is N nodes of M GPUs.
"""

import json
import sys

from jax.experimental import topologies

from rest_jax.config import MeshConfig
from rest_jax.distributed import make_mesh
from rest_jax.errors import UserError
from rest_jax.planning import topology

SIZES = [{}, {"tensor": 2}, {"tensor": 4}, {"tensor": 8}, {"data": 2}, {"data": 4, "tensor": 2}]


def devices_of(name: str) -> list:
    """The devices of a topology; of TPU slices as many as are asked for."""
    name, _, slices = name.partition("*")
    if name.startswith("h100"):
        return topology.devices(topology.parse(name))
    options = {"num_slices": int(slices)} if slices else {}
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


def describe(name: str, sizes: dict[str, int], devices: list) -> dict:
    """The record of one mesh."""
    found = {"topology": name, "sizes": sizes, "devices": len(devices)}
    try:
        mesh = make_mesh(MeshConfig(**sizes), devices)
    except UserError as error:
        return found | {"refused": str(error)}
    order = list(mesh.devices.flat)
    return found | {
        "mesh": dict(mesh.shape),
        "processes": [device.process_index for device in order],
        "slices": [getattr(device, "slice_index", None) or 0 for device in order],
        "coords": [list(getattr(device, "coords", ())) for device in order],
    }


records = []
for word in sys.argv[1:]:
    here = devices_of(word)
    records += [describe(word, sizes, here) for sizes in SIZES]
print(json.dumps(records))
