"""The lines before a run: what is held and what is written, from shapes alone."""

import pytest

from rest_jax.planning import banner
from rest_jax.planning.programs import device_bytes, train_state
from tests.planning import setups

DATA = [("train", "64 records"), ("steps", "3 steps")]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_it_says_where_what_and_how_much(command, tmp_path):
    setup = setups.setup(command, output=str(tmp_path / "not" / "yet"))
    shown = dict(banner.banner(setup, DATA))
    assert list(shown) == ["run", "devices", "mesh", "model", "memory", "train", "steps", "writes"]
    assert shown["devices"] == "8 x cpu"
    assert "data 2 x fsdp 2 x expert 1 x tensor 2: 4 data shard(s)" in shown["mesh"]
    assert (
        "configs/quickstart_policy: qwen3, 1.0 M parameters, computes in float32" in shown["model"]
    )
    state = train_state(setup)[0]
    assert f"parameters {banner._size(device_bytes(state.params))}" in shown["memory"]
    assert f"optimiser {banner._size(device_bytes(state.opt_state))}" in shown["memory"]
    assert "KV cache (" in shown["memory"] and "the host has" in shown["memory"]
    assert f"{tmp_path}/not/yet/x: " in shown["writes"] and "free)" in shown["writes"]


def test_a_run_with_lora_says_what_it_trains_and_that_the_base_is_there():
    setup = setups.setup("sft", lora={"rank": 2, "targets": "q"}, data={"eval": None})
    shown = dict(banner.banner(setup, DATA))
    assert "1.0 M parameters, LoRA of rank 2 on q (0.00 M trained), computes" in shown["model"]
    base = banner._size(device_bytes(setup.policy.params))
    own = banner._size(device_bytes(setup.policy.adapters))
    assert f"base {base}, " in shown["memory"] and f"parameters {own}; " in shown["memory"]
    assert "a checkpoint (" in shown["writes"]


def test_the_total_is_compared_with_what_the_device_has(monkeypatch):
    monkeypatch.setattr(banner, "memory_limit", lambda mesh: 3 * 2**29)
    assert " of 1.5 GiB: " in dict(banner.banner(setups.setup(), DATA))["memory"]


def test_moments_on_hosts_take_no_memory_of_devices_and_trackers_are_named():
    optimizer = {"moments": "host"}
    train = {"prompts_per_update": 16, "tensorboard": True, "wandb_project": "tools"}
    shown = dict(banner.banner(setups.setup(optimizer=optimizer, train=train), DATA))
    assert "; on hosts: optimiser " in shown["memory"]
    assert shown["writes"].endswith("; TensorBoard; Weights & Biases")


def test_the_copy_of_the_state_of_several_updates_is_named():
    train = {"prompts_per_update": 1}
    shown = dict(banner.banner(setups.setup(train=train), DATA))
    assert "; on hosts: copy of the state that a step begins with " in shown["memory"]


@pytest.mark.parametrize(
    ("size", "text"), [(100, "0.1 KiB"), (2**20, "1.0 MiB"), (5 * 2**29, "2.5 GiB"), (2**52, "4,096.0 TiB")]
)  # fmt: skip
def test_sizes_are_readable(size, text):
    assert banner._size(size) == text
