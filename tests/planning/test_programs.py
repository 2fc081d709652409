"""The programs of a run on devices that need not be here: sizes by name, the shapes of micro-batches, who owns what memory."""

import json

import jax
import pytest

from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.models.presets import preset
from rest_jax.planning import programs
from rest_jax.planning.programs import Lengths
from rest_jax.train import step_config
from tests.conftest import REPOSITORY


def setup(**sections) -> programs.Setup:
    """The quickstart's policy on data 2 x fsdp 2 x tensor 2; 32 prompts a step, two updates, 8 groups a shard."""
    base = {
        "name": "x",
        "model": {"source": "configs/quickstart_policy", "remat": "none"},
        "data": {"max_prompt_tokens": 96},
        "rollout": {"prompts_per_step": 32, "group_size": 4, "max_response_tokens": 64},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "train": {"prompts_per_update": 16, "max_tokens_per_microbatch": 1500},
    }
    config = Config.model_validate(base | sections)
    return programs.abstract_setup(config, jax.devices(), step_config)


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
    assert programs.model_config(source) == preset(name)


def test_a_folder_or_its_config_json_will_do(tmp_path):
    folder = REPOSITORY / "configs/quickstart_policy"
    alone = tmp_path / "config.json"
    alone.write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    assert programs.model_config(str(alone)) == programs.model_config(str(folder))


def test_an_unknown_model_is_one_line_with_the_known_ones():
    with pytest.raises(UserError, match=r"model.source org/none: .*known: .*qwen3-8b"):
        programs.model_config("org/none")


def test_a_mesh_that_the_devices_do_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"mesh .*: 6 does not divide the 8 devices"):
        setup(mesh={"data": 3, "fsdp": -1, "tensor": 2})


def test_micro_batches_are_those_of_the_packing():
    """Groups of 96 + 4 x 64 positions: 4 of them are 1,408, within 1,500; a shard has 4 in an update."""
    (micro,) = programs.micro_batches(setup(), Lengths(96, 64))
    assert (micro.pick.shape, micro.widths) == ((4, 4), (96, 64))


def test_the_fullest_micro_batch_may_hold_shorter_groups():
    """3 groups of 96 + 4 x 64 would fit 1,100 positions, but rows are powers of two: 704. Four of 64 + 4 x 48 are 1,024."""
    made = setup(train={"prompts_per_update": 16, "max_tokens_per_microbatch": 1100})
    assert programs.fullest(made, Lengths(96, 64)) == Lengths(64, 48)
    assert programs.fullest(setup(), Lengths(96, 64)) == Lengths(96, 64)


def test_memory_is_that_of_one_device():
    found = programs.update_programs(setup(), Lengths(96, 64))["update"]
    sizes = {name: programs.device_bytes(tree) for name, tree in found.arguments.items()}
    params = jax.tree.leaves(found.arguments["parameters"])
    whole = sum(4 * x.size for x in params)
    # fsdp 2 x tensor 2 split the matrices; norms are on every device
    assert whole / 4 < sizes["parameters"] < 1.05 * whole / 4
    assert sizes["gradient"] == sizes["parameters"]
    moments = programs.device_bytes(found.resident["optimiser"])
    assert 2 * sizes["parameters"] <= moments < 2 * sizes["parameters"] + 64


def test_a_kl_term_keeps_a_reference_on_the_devices():
    made = programs.update_programs(setup(loss={"kl_coefficient": 0.1}), Lengths(96, 64))
    assert "reference" in made["update"].resident and "reference" in made["apply"].resident
    assert "reference" not in programs.update_programs(setup(), Lengths(96, 64))["update"].resident
