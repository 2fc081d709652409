"""Setting up XLA: the environment before jax starts, the cache at work, what the user set wins. The table of peaks."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from rest_jax.config import MeshConfig
from rest_jax.distributed import activate, make_mesh
from rest_jax.run import machine

FLAGS = [f"--{name}={value}" for name, value in machine.CPU_XLA_FLAGS.items()]
SHOW = """
import json, os, sys
from rest_jax.run import machine
machine.configure(*sys.argv[1:])
assert "jax" not in sys.modules
print(json.dumps(dict(os.environ)))
"""
COMPILE = """
import json, sys
from rest_jax.run import machine
if "late" in sys.argv:
    import jax
    jax.jit(lambda x: x + 1)(1.0)  # jax has made up its mind about the cache by now
machine.configure()
import jax
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name.split("/")[-1]))
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((4, 4))).block_until_ready()
config = jax.config
print(json.dumps([seen.count("cache_hits"), seen.count("cache_misses"), config.jax_compilation_cache_dir,
                  config.jax_persistent_cache_min_compile_time_secs]))
"""


def fresh(code: str, home: pathlib.Path, *arguments: str, **environment: str):
    """What `code` prints, as JSON, and its stderr: a process with nothing set but `home` and `environment`."""
    root = pathlib.Path(machine.__file__).parent.parent.parent
    base = {"HOME": str(home), "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=base | {"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


# The environment


def test_defaults_go_into_the_environment_before_jax(tmp_path):
    found, warned = fresh(SHOW, tmp_path)
    folder = tmp_path / ".cache" / "rest_jax" / "xla"
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(folder) and folder.is_dir()
    assert float(found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) == 0.05
    assert found.get("XLA_FLAGS", "") == machine._xla_flags("")
    assert not warned


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {"XDG_CACHE_HOME": "xdg"}, "xdg/rest_jax/xla"),
        ((), {"XDG_CACHE_HOME": "xdg", "REST_JAX_CACHE": "own"}, "own"),
        (("argument",), {"REST_JAX_CACHE": "off"}, "argument"),
        (("off",), {"JAX_COMPILATION_CACHE_DIR": "users"}, "users"),
        ((), {"REST_JAX_CACHE": "off"}, None),
        (("off",), {"REST_JAX_CACHE": "own"}, None),
        ((), {"REST_JAX_CACHE": "gs://bucket/xla"}, "gs://bucket/xla"),
    ],
)
def test_which_cache_folder(tmp_path, arguments, environment, expected):
    def place(text):
        return text if text == "off" or "://" in text else str(tmp_path / text)

    environment = {name: place(value) for name, value in environment.items()}
    found, warned = fresh(SHOW, tmp_path, *map(place, arguments), **environment)
    assert found.get("JAX_COMPILATION_CACHE_DIR") == (expected and place(expected))
    assert ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" in found) == (expected is not None)
    assert not warned


def test_a_folder_that_cannot_be_made_is_a_warning_and_no_cache(tmp_path):
    home = tmp_path / "home"
    home.write_text("a file, so that nothing can be made in it, not even by root")
    found, warned = fresh(SHOW, home)
    assert "JAX_COMPILATION_CACHE_DIR" not in found
    assert (
        len(warned.splitlines()) == 1 and "no compilation cache" in warned and str(home) in warned
    )


def test_what_the_user_set_is_kept(tmp_path):
    own = {"XLA_FLAGS": "--xla_cpu_prefer_vector_width=128 --xla_cpu_enable_fast_math=false"}
    own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "7"
    found, _ = fresh(SHOW, tmp_path, **own)
    assert found["XLA_FLAGS"].startswith(own["XLA_FLAGS"])
    assert found["XLA_FLAGS"].count("xla_cpu_prefer_vector_width") == 1
    assert found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "7"


# The flags


@pytest.fixture
def able(monkeypatch):
    """A machine on which the whole table applies."""
    monkeypatch.setattr(machine, "_jaxlib_version", lambda: machine.CHECKED_JAXLIB + "99")
    monkeypatch.setattr(machine, "_cpu_features", lambda: {"avx512f"})
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ("", " ".join(FLAGS)),
        ("--xla_dump_to=x", " ".join(["--xla_dump_to=x", *FLAGS])),
        ("--xla_cpu_prefer_vector_width=256", "--xla_cpu_prefer_vector_width=256"),
        (" --xla_cpu_prefer_vector_width 256", " --xla_cpu_prefer_vector_width 256"),
        ("flags.txt", "flags.txt"),  # XLA reads flags from a file of that name
    ],
)
def test_flags_are_added_to_those_present(able, present, expected):
    assert machine._xla_flags(present) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_jaxlib_version", "0.11.0"),
        ("_jaxlib_version", ""),
        ("_cpu_features", {"avx2", "avx512"}),
        ("_cpu_features", set()),
    ],
)
def test_flags_wait_for_a_checked_jaxlib_and_a_cpu_that_has_them(able, name, value):
    able.setattr(machine, name, lambda: value)
    assert machine._xla_flags("--xla_dump_to=x") == "--xla_dump_to=x"


def test_no_flags_where_libtpu_reads_them_too(able):
    able.setattr(machine.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert machine._xla_flags("") == ""


def test_xla_knows_every_flag_of_the_table(tmp_path):
    """XLA aborts on an unknown flag, so a process that ends well has accepted them."""
    if not machine._jaxlib_version().startswith(machine.CHECKED_JAXLIB):
        pytest.skip("the table is not for this jaxlib")
    code = "import jax; print(int(jax.jit(lambda x: x + 1)(1)))"
    assert fresh(code, tmp_path, XLA_FLAGS=" ".join(FLAGS))[0] == 2


# The cache at work


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    hits, misses, _, _ = fresh(COMPILE, tmp_path, **quick)[0]
    assert hits == 0 < misses
    again = fresh(COMPILE, tmp_path, **quick)[0]
    assert again[:2] == [misses, 0]


def test_after_jax_is_imported_the_config_is_set_and_used(tmp_path):
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = fresh(COMPILE, tmp_path, "late", **quick)[0]
    hits, misses, folder, least = fresh(COMPILE, tmp_path, "late")[0]
    assert first[0] == 0 < first[1] and [hits, misses] == [first[1], 0]
    assert folder == str(tmp_path / ".cache" / "rest_jax" / "xla") and least == 0.05


# The peaks


def fake(kind: str, platform: str = "gpu", process: int = 0):
    return types.SimpleNamespace(device_kind=kind, platform=platform, process_index=process)


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, None),
        ("TPU v4 lite", None, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v5e", 197e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v5p", 459e12, None),
        ("TPU v6 lite", 918e12, None),
        ("TPU7x", 1153.5e12, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", None, None),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362.05e12, 91.6e12),
        ("NVIDIA L40", None, None),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_by_device_kind_and_dtype(kind, bfloat16, float32):
    assert machine.peak_flops(fake(kind), jnp.bfloat16) == bfloat16
    assert machine.peak_flops(fake(kind), "float32") == float32
    assert machine.peak_flops(fake(kind), jnp.int8) is None


def test_a_mesh_is_the_sum_of_its_devices_and_unknown_if_one_is():
    cards = [fake("NVIDIA L4")] * 3 + [fake("NVIDIA H200")]
    assert machine.mesh_peak_flops(cards, jnp.bfloat16) == 3 * 121e12 + 989.5e12
    assert machine.mesh_peak_flops([*cards, fake("NVIDIA X1")], jnp.bfloat16) is None


def test_cpu_devices_count_once_a_process(monkeypatch):
    monkeypatch.setattr(machine, "measured_cpu_peak", lambda: 5.0)
    devices = [fake("cpu", "cpu", process) for process in (0, 0, 0, 1, 1)]
    assert machine.mesh_peak_flops(devices[:3], jnp.float32) == 5.0
    assert machine.mesh_peak_flops(devices, jnp.float32) == 10.0


def test_the_cpu_peak_is_measured_once_and_also_inside_a_mesh():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.devices())
    with activate(mesh):
        peak = machine.measured_cpu_peak(0.01)
    assert 1e8 < peak < 1e15
    assert machine.measured_cpu_peak(0.01) == peak
    assert machine.mesh_peak_flops(mesh.devices.flat, jnp.float32) == machine.measured_cpu_peak()
