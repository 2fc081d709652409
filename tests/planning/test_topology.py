"""Names of hardware that is not here, and what is said when they are wrong or their compiler is missing."""

import pathlib

import pytest

from rest_jax.errors import UserError
from rest_jax.planning import topology


@pytest.mark.parametrize(
    ("name", "size", "platform"),
    [
        ("v5e:4x4", 16, "tpu"),
        ("V5P:2x2x4", 16, "tpu"),
        ("v6e:4x8", 32, "tpu"),
        ("2xv5e:4x4", 32, "tpu"),
        ("3XV5P:2x2x4", 48, "tpu"),
        ("h100:8", 8, "gpu"),
        ("h100:4x8", 32, "gpu"),
        ("cpu:8", 8, "cpu"),
    ],
)
def test_a_name_says_how_many_devices_of_which_kind(name, size, platform):
    found = topology.parse(name)
    assert (found.size, found.chip.platform, found.name) == (size, platform, name.lower())


@pytest.mark.parametrize(
    "name",
    ["v5p", "v5p:2x2", "v5e:2x2x4", "v9:2x2", "h100:2x2x2", "v5e:0x4", "8", "v5e:4x4x2", "0xv5e:4x4", "2xh100:8",
     "2xcpu:4", "v5e:0x4", "cpu:0", "xv5e:4x4", "v5e:４x４"],
)  # fmt: skip
def test_a_wrong_name_is_one_line_with_the_forms(name):
    with pytest.raises(UserError, match=f"--topology {name}: .*v5p:2x2x4") as caught:
        topology.parse(name)
    assert "\n" not in str(caught.value)


def test_more_devices_than_there_are(capsys):
    for name in ("cpu:99999999999", "h100:9999x8"):
        with pytest.raises(UserError, match=f"--topology {name}: more than 65,536 devices"):
            topology.parse(name)


def test_slices_are_a_part_of_the_name_where_there_are_several():
    assert topology.parse("2xv5e:4x4").slices == 2
    assert topology.parse("1xv5e:4x4") == topology.parse("v5e:4x4")


def test_a_missing_compiler_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r'libtpu.*is missing; pip install "rest-jax\[tpu\]"'):
        topology.check_compiler(topology.parse("v5e:4x4"))
    with pytest.raises(UserError, match=r"rest-jax\[cuda\]"):
        topology.check_compiler(topology.parse("h100:8"))


def test_the_process_that_compiles_touches_no_device_and_keeps_the_users_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    found = topology.child_environment(topology.parse("v5e:2x2"), pathlib.Path("/dump"))
    assert found["JAX_PLATFORMS"] == "cpu" and "--mine=1" in found["XLA_FLAGS"].split()
    assert "--xla_dump_to=/dump" in found["XLA_FLAGS"].split()
    flags = topology.child_environment(topology.parse("cpu:8"), pathlib.Path("/dump"))["XLA_FLAGS"]
    assert "--xla_force_host_platform_device_count=8" in flags.split()


@pytest.mark.parametrize("name", topology.CHIPS)
def test_clocks_are_those_of_the_published_peaks(name):
    """TPUs: multiply-adds a cycle of all matrix units; a typing error of a clock would scale every estimate."""
    chip = topology.CHIPS[name]
    units = {"v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    peaks = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
    if chip.clock:
        assert 2 * units[name] * chip.clock == pytest.approx(peaks[name], rel=0.01)
    assert chip.memory < 100 * 2**30 and chip.memory_bandwidth > 8e11
    assert chip.network < chip.link / 5  # between slices and nodes it is slower
