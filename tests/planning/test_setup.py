"""Sizes by name, the lengths that a plan is for, the shapes of micro-batches, on devices that need not be here."""

import json

import pytest

from rest_jax.errors import UserError
from rest_jax.models.presets import preset
from rest_jax.planning.programs import device_bytes, train_state
from rest_jax.planning.setup import (
    Lengths,
    all_groups,
    longest,
    longest_rows,
    micro_batches,
    model_config,
    rows_at,
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


def test_rows_are_those_of_the_packing():
    """Groups of 95 + 4 x 64 = 351 positions, four a shard in an update, eight in a pass over all; 1,500 hold four."""
    lengths = Lengths(96, 64)
    (update,), forward = micro_batches(setup(), lengths), all_groups(setup(), lengths)
    assert len(update.rows) == 4 and update.row_length == 1408 and len(forward) == 2
    pairs = 4 * (95 * 96 // 2 + 4 * (64 * 95 + 64 * 65 // 2))
    found = rows_at(setup(), lengths)
    assert [(row.length, row.pairs) for row in found] == [(1408, pairs)] * 2
    # 1,024 of the positions predict, 256 at once; of the 22 blocks of 64 queries one sees one to three blocks of its group
    assert found.update.trips["vocabulary"] == 4 and 3 < found.update.trips["attention"] < 4


def test_the_longest_rows_are_within_the_limit_and_no_longer_than_all_groups():
    """Whatever the lengths of the groups are."""
    made = setup(train={"prompts_per_update": 16, "max_tokens_per_microbatch": 1100})
    assert [row.length for row in longest_rows(made)] == [1024, 1024]
    assert [row.length for row in longest_rows(setup())] == [1408, 1408]
    free = setup(train={"prompts_per_update": 16, "max_tokens_per_microbatch": None})
    assert [row.length for row in longest_rows(free)] == [1408, 2816]
    noise = setup(train={"prompts_per_update": 16, "measure_noise": True})
    assert longest_rows(noise).update.length == 352


def test_a_supervised_record_is_a_group_of_one_and_bounded_in_all():
    made = setup("sft")
    assert longest(made.config, supervised=True) == Lengths(80, 80)
    assert longest(made.config, supervised=False) == Lengths(96, 64)
    # 8 records a shard of 79 + 80 positions
    assert [m.row_length for m in micro_batches(made, Lengths(80, 80))] == [1280]
    # prompts of 80 and responses of 160 may meet in a row: 8 x 239 positions are more than 1,500
    assert longest_rows(made).update.length == 1408


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
