"""The quickstart's policy on eight devices, for the tests of plans."""

import jax

from rest_jax.config import Config
from rest_jax.planning.setup import Setup, abstract_setup
from rest_jax.train import step_config


def setup(command: str = "train", **sections) -> Setup:
    """The quickstart's policy on data 2 x fsdp 2 x tensor 2; 32 prompts a step, two updates, 8 groups a shard."""
    base = {
        "name": "x",
        "model": {"source": "configs/quickstart_policy", "remat": "none"},
        "data": {"max_prompt_tokens": 96},
        "rollout": {"prompts_per_step": 32, "group_size": 4, "max_response_tokens": 64},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "train": {"prompts_per_update": 16, "max_tokens_per_microbatch": 1500},
        "sft": {"batch_size": 32, "max_tokens": 160},
    }
    config = Config.model_validate(base | sections)
    return abstract_setup(config, jax.devices(), step_config if command == "train" else None)
