"""The hardware that a plan is for: names such as `v5p:2x2x4`, what is published of the chips, their devices in jax.

jax compiles for devices that are not here, given the compiler of the platform: libtpu for TPUs, the CUDA plugin for GPUs.
`2xv5p:2x2x4` is two such slices, which the data centre network connects.
`child_environment` is what the process needs that does so; `devices` are those of the topology, within that process.
`cpu:8` is this machine's processor as 8 devices: it has memory and traffic, but no published speed.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from typing import Any

from rest_jax.errors import UserError
from rest_jax.run.environment import LIBTPU_VARIABLE, host_memory, libtpu_flags

GIB = 2**30
FORMS = (
    "v5e:4x4, v5p:2x2x4, v6e:4x4 (chips along the torus), 2xv5e:4x4 (slices x slice), h100:8, h100:4x8 "
    "(nodes x GPUs), cpu:8"
)
_TARGETS = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device. Rates are in bytes a second, of one device; None: unknown."""

    platform: str  # "tpu", "gpu" or "cpu"
    memory: int  # bytes that programs may use
    memory_bandwidth: float | None = None
    clock: float | None = None  # Hz of libtpu's estimated cycles
    link: float | None = (
        None  # between neighbours, both directions: what a ring over one axis moves
    )
    network: float | None = None  # between the slices of TPUs, the nodes of GPUs; one direction


# Memory: what XLA lets a program have ("of 15.75G hbm"), less than is built in. Bandwidth of it: the pages of v5e, v5p and v6e
# in docs.cloud.google.com/tpu/docs, and NVIDIA's H100 SXM datasheet. Clocks: those at which the multiply-adds of all matrix units
# give the published peak. Links: of one torus axis, both directions (jax-ml.github.io/scaling-book/tpus); NVLink 4, one
# direction. Networks: a chip's share of the data centre network by the same pages of Google's, 6.4 Tb/s (v5e) and 25.6 Tb/s
# (v6e) a pod of 256 chips, 50 Gb/s a chip (v5p); one 400 Gb/s adapter a GPU.
CHIPS = {
    "v5e": Chip("tpu", int(15.75 * GIB), 819e9, clock=1.5e9, link=90e9, network=3.125e9),
    "v5p": Chip("tpu", int(95.74 * GIB), 2765e9, clock=1.75e9, link=180e9, network=6.25e9),
    "v6e": Chip("tpu", int(31.25 * GIB), 1640e9, clock=1.75e9, link=180e9, network=12.5e9),
    "h100": Chip("gpu", int(79.1 * GIB), 3350e9, link=450e9, network=50e9),
}
_MOST = 2**16  # devices; XLA cannot count, or takes hours for, far more than there are


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of one kind: of a TPU slice along each axis of the torus, of GPUs and CPUs hosts x devices."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of one slice
    chip: Chip
    slices: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.slices * math.prod(self.shape)

    @property
    def nodes(self) -> int:
        """Machines whose GPUs are connected with each other; 1 on other hardware."""
        return self.shape[0] if self.chip.platform == "gpu" and len(self.shape) == 2 else 1


def parse(name: str) -> Topology:
    """The topology of a name such as `v5p:2x2x4` or `2xv5e:4x4`; UserError names the forms there are."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name.strip().lower(), re.ASCII)
    if not found:
        raise UserError(f"--topology {name}: not a topology; write it as {FORMS}")
    slices, kind, dims = int(found[1] or 1), found[2], found[3]
    shape = tuple(map(int, dims.split("x")))
    if kind not in CHIPS and kind != "cpu":
        raise UserError(f"--topology {name}: unknown hardware {kind}; write it as {FORMS}")
    chip = CHIPS[kind] if kind != "cpu" else Chip("cpu", host_memory() // (math.prod(shape) or 1))
    dimensions = {"v5p": (3,), "v5e": (2,), "v6e": (2,), "cpu": (1,)}.get(kind, (1, 2))
    if len(shape) not in dimensions or 0 in (slices, *shape):
        size = dims if slices else "of 0 slices"
        raise UserError(f"--topology {name}: {kind} has no shape {size}; write it as {FORMS}")
    if slices * math.prod(shape) > _MOST:
        raise UserError(f"--topology {name}: more than {_MOST:,} devices; name a smaller one")
    if slices > 1 and chip.platform != "tpu":
        raise UserError(f"--topology {name}: only TPUs come in slices; write it as {FORMS}")
    before = f"{slices}x" if slices > 1 else ""
    return Topology(f"{before}{kind}:{dims}", kind, shape, chip, slices)


def check_compiler(topology: Topology) -> None:
    """UserError with what to install, unless the compiler of the platform is here."""
    module, extra = {
        "tpu": ("libtpu", "tpu"),
        "gpu": ("jax_cuda12_plugin", "cuda"),
        "cpu": ("jaxlib", ""),
    }[topology.chip.platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f'--topology {topology.name}: {module}, which compiles for it, is missing; pip install "rest-jax[{extra}]" '
            "(no such device is needed)"
        )


def child_environment(topology: Topology, dump: pathlib.Path) -> dict[str, str]:
    """Variables of a process that compiles for `topology`; XLA writes the text of compiled programs to `dump`."""
    count = topology.size if topology.chip.platform == "cpu" else 1
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={count}",
        f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=^$",
    ]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        LIBTPU_VARIABLE: libtpu_flags(os.environ.get(LIBTPU_VARIABLE, "")),
        "XLA_FLAGS": " ".join(flags).strip(),
        # It would keep every executable, 100 times the text that a plan is made of.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def devices(topology: Topology) -> list[Any]:
    """The devices of the topology. UserError for a shape that is not made."""
    import jax
    from jax.experimental import topologies

    if topology.chip.platform == "cpu":
        return jax.devices()[: topology.size]
    shape = "x".join(map(str, topology.shape))
    try:
        if topology.chip.platform == "tpu":
            found = topologies.get_topology_desc(
                f"{topology.kind}:{shape}", "tpu", num_slices=topology.slices
            )
        else:
            target = (_TARGETS / f"{topology.kind}.txtpb").read_text()
            hosts = shape if len(topology.shape) == 2 else f"1x{shape}"
            found = topologies.get_topology_desc(
                topology.kind, "cuda", target_config=target, topology=f"1x{hosts}"
            )
    except Exception as error:  # of the compiler's own kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--topology {topology.name}: {reason}") from error
    return list(found.devices)
