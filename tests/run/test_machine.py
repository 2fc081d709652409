"""Setting up XLA: the environment before jax starts, the cache at work, what the user set wins."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

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
