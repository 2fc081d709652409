"""Setting up XLA: the environment before jax starts, the cache at work, what the user set wins; signals within a block."""

import json
import os
import pathlib
import platform
import pwd
import re
import signal
import subprocess
import sys

import pytest

from rest_jax.cache_folder import user_cache
from rest_jax.errors import UserError
from rest_jax.run import environment

PROGRAMS = pathlib.Path(__file__).parent.parent / "programs"
FLAG = f"--{environment.VECTOR_WIDTH}=512"


def run_program(name: str, home: pathlib.Path, **variables: str):
    """What a program prints, as JSON, and its stderr: a process with nothing set but `home` and `variables`."""
    base = {"HOME": str(home), "PYTHONPATH": str(PROGRAMS.parent.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / name)],
        env=base | {"PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


# The environment


def test_defaults(tmp_path):
    found, warned = run_program("show_environment.py", tmp_path)
    folder = tmp_path / ".cache" / "rest_jax" / "xla"
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(folder) and folder.is_dir()
    assert float(found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) == 0.05
    assert found.get("XLA_FLAGS", "") == environment.xla_flags("")
    assert 0 < int(found[environment.HOST_LIMIT]) << 30 <= environment.host_memory()
    assert not warned


def test_flags_of_libtpu_and_what_the_user_says_of_them(tmp_path):
    """libtpu aborts the process on a flag that it does not know; `rest-jax plan` compiles with the same."""
    (name,) = environment.LIBTPU_FLAGS
    found, _ = run_program("show_environment.py", tmp_path)
    assert found["LIBTPU_INIT_ARGS"] == f"--{name}=1000000"
    assert environment.libtpu_flags("--other=1") == f"--other=1 --{name}=1000000"
    assert environment.libtpu_flags(f"--{name}=3") == f"--{name}=3"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/rest_jax/xla"),
        ({"XDG_CACHE_HOME": "xdg", "REST_JAX_CACHE": "own"}, "own"),
        ({"REST_JAX_CACHE": "off", "JAX_COMPILATION_CACHE_DIR": "users"}, "users"),
        ({"REST_JAX_CACHE": "off"}, None),
        ({"REST_JAX_CACHE": "gs://bucket/xla"}, "gs://bucket/xla"),
    ],
)
def test_which_cache_folder(tmp_path, monkeypatch, variables, expected):
    def place(text):
        return text if text == "off" or "://" in text else str(tmp_path / text)

    monkeypatch.setattr(os, "environ", {name: place(value) for name, value in variables.items()})
    environment.configure()
    assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == (expected and place(expected))
    set_too = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" in os.environ
    assert set_too == (expected is not None)


def test_a_folder_that_cannot_be_made_is_a_warning_and_no_cache(tmp_path):
    home = tmp_path / "home"
    home.write_text("a file, so that nothing can be made in it, not even by root")
    found, warned = run_program("show_environment.py", home)
    assert "JAX_COMPILATION_CACHE_DIR" not in found
    assert len(warned.splitlines()) == 1
    assert "no compilation cache" in warned and str(home) in warned


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch):
    def nobody(_):
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="no home folder; set XDG_CACHE_HOME"):
        user_cache()


def test_what_the_user_set_is_kept(tmp_path):
    own = {"XLA_FLAGS": "--xla_cpu_prefer_vector_width=128 --xla_cpu_enable_fast_math=false"}
    own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "7"
    found, _ = run_program("show_environment.py", tmp_path, **own)
    assert {name: found[name] for name in own} == own


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are those of glibc")
@pytest.mark.parametrize(
    ("variables", "most"),
    [({}, environment.ARENAS), ({"MALLOC_ARENA_MAX": "1"}, 1), ({"MALLOC_ARENA_MAX": "6"}, 6),
     ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, 2)],
)  # fmt: skip
def test_threads_share_a_few_arenas(tmp_path, variables, most):
    """However many cores there are: by itself it is eight to each."""
    _, said = run_program("count_arenas.py", tmp_path, **variables)
    found = len(re.findall(r"^Arena \d+:", said, re.MULTILINE))
    assert 1 <= found <= most and (most == 1 or found > 1)


def test_commands_within_the_tests_change_nothing():
    """Else what is compiled behind them has other keys in the cache, as XLA_FLAGS is part of them."""
    before = dict(os.environ)
    environment.configure()
    assert dict(os.environ) == before


# The flag


@pytest.fixture
def able(monkeypatch, tmp_path):
    """A machine on which the flag applies."""
    monkeypatch.setattr(environment, "_CPU_INFO", tmp_path / "cpuinfo")
    environment._CPU_INFO.write_text("processor : 0\nflags : fpu avx2 avx512f\n")
    version = environment.CHECKED_JAXLIB + "99"
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ("", FLAG),
        ("--xla_dump_to=x", f"--xla_dump_to=x {FLAG}"),
        ("--xla_cpu_prefer_vector_width=256", "--xla_cpu_prefer_vector_width=256"),
        (" --xla_cpu_prefer_vector_width 256", " --xla_cpu_prefer_vector_width 256"),
        ("flags.txt", "flags.txt"),  # XLA reads flags from a file of that name
    ],
)
def test_the_flag_is_added_to_those_present(able, present, expected):
    assert environment.xla_flags(present) == expected


def test_the_flag_waits_for_a_checked_jaxlib(able):
    able.setattr(environment.importlib.metadata, "version", lambda name: "0.11.0")
    assert environment.xla_flags("--xla_dump_to=x") == "--xla_dump_to=x"


@pytest.mark.parametrize("said", ["flags : avx2 avx512\n", None])
def test_the_flag_waits_for_a_cpu_that_has_such_vectors(able, said):
    environment._CPU_INFO.write_text(said) if said else environment._CPU_INFO.unlink()
    assert environment.xla_flags("--xla_dump_to=x") == "--xla_dump_to=x"


def test_no_flag_where_libtpu_reads_it_too(able):
    able.setattr(environment.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert environment.xla_flags("") == ""


def test_xla_knows_the_flag(tmp_path):
    """XLA aborts on an unknown flag, so a process that ends well has accepted it."""
    if not environment.importlib.metadata.version("jaxlib").startswith(environment.CHECKED_JAXLIB):
        pytest.skip("the flag is not for this jaxlib")
    run_program("compile_once.py", tmp_path, XLA_FLAGS=FLAG)


# The cache at work


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    (hits, misses), _ = run_program("compile_once.py", tmp_path, **quick)
    assert hits == 0 < misses
    again, _ = run_program("compile_once.py", tmp_path, **quick)
    assert again == [misses, 0]


def test_transformers_is_quiet_about_pytorch(tmp_path):
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    found, _ = run_program("show_environment.py", tmp_path)
    _, said = run_program("transformers_without_torch.py", tmp_path, **{name: found[name]})
    assert said == ""
    assert "PyTorch was not found" in run_program("transformers_without_torch.py", tmp_path)[1]


# Signals


def test_a_handler_for_a_block_even_when_it_raises():
    def raise_(number, frame):
        raise KeyError(number)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), environment.handled(raise_, signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
