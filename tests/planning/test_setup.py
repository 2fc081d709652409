"""Sizes by name, the lengths that a plan is for, the shapes of micro-batches, on devices that need not be here."""

import json

import pytest

from rest_jax.errors import UserError
from rest_jax.models.presets import preset
from rest_jax.planning.programs import device_bytes, train_state
from rest_jax.planning.setup import (
    Lengths,
    all_groups,
    fullest,
    longest,
    micro_batches,
    model_config,
)
from tests.conftest import REPOSITORY
from tests.planning.setups import setup


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("qwen3-4b-2507", "Qwen/Qwen3-4B-Instruct-2507"),
        ("Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
    ],
)
def test_a_published_model_is_known_by_its_name_without_its_weights(source, name):
    assert model_config(source) == preset(name)


def test_a_folder_or_its_config_json_will_do(tmp_path):
    folder = REPOSITORY / "configs/quickstart_policy"
    alone = tmp_path / "config.json"
    alone.write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    assert model_config(str(alone)) == model_config(str(folder))


def test_an_unknown_model_is_one_line_with_the_known_ones():
    with pytest.raises(UserError, match=r"model.source org/none: .*known: .*qwen3-8b"):
        model_config("org/none")


def test_a_mesh_that_the_devices_do_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"mesh .*: 6 does not divide the 8 devices"):
        setup(mesh={"data": 3, "fsdp": -1, "tensor": 2})


def test_micro_batches_are_those_of_the_packing():
    """Groups of 96 + 4 x 64 positions: 4 of them are 1,408, within 1,500; a shard has 4 in an update."""
    (micro,) = micro_batches(setup(), Lengths(96, 64))
    assert (micro.pick.shape, micro.widths) == ((4, 4), (96, 64))


def test_the_fullest_micro_batch_may_hold_shorter_groups():
    """3 groups of 96 + 4 x 64 would fit 1,100 positions, but rows are powers of two: 704. Four of 64 + 4 x 48 are 1,024."""
    made = setup(train={"prompts_per_update": 16, "max_tokens_per_microbatch": 1100})
    assert fullest(made, groups=4) == Lengths(64, 48)
    assert fullest(setup(), groups=4) == Lengths(96, 64)
    assert fullest(setup(), groups=1) == Lengths(96, 64)


def test_log_probs_are_taken_of_all_groups_of_a_step():
    """8 groups a shard of 352 positions; 1,500 hold 4 of them."""
    assert [m.pick.shape for m in all_groups(setup(), Lengths(96, 64))] == [(4, 4), (4, 4)]


def test_a_supervised_record_is_a_group_of_one_and_bounded_in_all():
    made = setup("sft")
    assert longest(made.config, supervised=True) == Lengths(80, 80)
    assert longest(made.config, supervised=False) == Lengths(96, 64)
    # 8 records a shard of 96 + 96 positions; 1,500 hold 7: 4, since rows are powers of two
    assert [m.pick.shape for m in micro_batches(made, Lengths(80, 80))] == [(4, 4), (4, 4)]
    # prompts of 96 and responses of 160 may meet in a micro-batch: 4 x 256 positions are less than 8 x 160 or 8 x 176
    assert fullest(made, groups=8) == Lengths(48, 128)


def test_a_supervised_batch_must_divide_over_the_data_shards():
    with pytest.raises(UserError, match=r"sft.batch_size 30 does not divide over 4 data shards"):
        setup("sft", sft={"batch_size": 30})


def test_moments_in_host_memory_are_not_on_the_device():
    on_device, on_host = (
        device_bytes(train_state(setup(optimizer={"moments": moments}))[0].opt_state)
        for moments in ("device", "host")
    )
    parameters = device_bytes(train_state(setup())[0].params)
    assert on_device == pytest.approx(2 * parameters, rel=0.01)
    assert on_host < 100  # counts
