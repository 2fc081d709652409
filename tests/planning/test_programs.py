"""The programs of a run on devices that need not be here: which there are, who owns what memory."""

import contextlib
import logging
import re

import jax
import jax.numpy as jnp
import pytest
import yaml

from rest_jax import cli, sft, train
from rest_jax.distributed import activate
from rest_jax.planning import programs
from rest_jax.planning.setup import Lengths, rows_at
from tests.conftest import REPOSITORY
from tests.planning.setups import setup
from tests.runs import recipe


def test_memory_is_that_of_one_device():
    found = programs.update_programs(setup(), rows_at(setup(), Lengths(96, 64)))["update"]
    sizes = {name: programs.device_bytes(tree) for name, tree in found.arguments.items()}
    params = jax.tree.leaves(found.arguments["parameters"])
    whole = sum(4 * x.size for x in params)
    # fsdp 2 x tensor 2 split the matrices; norms are on every device
    assert whole / 4 < sizes["parameters"] < 1.05 * whole / 4
    assert sizes["gradient"] == sizes["parameters"]
    moments = programs.device_bytes(found.resident["optimiser"])
    assert 2 * sizes["parameters"] <= moments < 2 * sizes["parameters"] + 64


def test_a_kl_term_keeps_a_reference_on_the_devices():
    rows = rows_at(setup(), Lengths(96, 64))
    made = programs.update_programs(setup(loss={"kl_coefficient": 0.1}), rows)
    assert "reference" in made["update"].resident and "reference" in made["apply"].resident
    assert "reference" not in programs.update_programs(setup(), rows)["update"].resident


def test_with_lora_gradient_and_moments_are_those_of_the_adapters():
    made = setup(lora={"rank": 2}, loss={"kl_coefficient": 0.1})
    found = programs.update_programs(made, rows_at(made, Lengths(96, 64)))
    update, base = found["update"], setup().policy.params
    assert jax.tree.map(lambda x: x.shape, update.arguments["base"]) == jax.tree.map(
        lambda x: x.shape, base
    )
    own, gradient = (programs.device_bytes(update.arguments[k]) for k in ("parameters", "gradient"))
    moments = programs.device_bytes(update.resident["optimiser"])
    assert own == gradient < 0.1 * programs.device_bytes(base)
    assert 2 * own <= moments < 2 * own + 64
    # the base is the reference of a KL term
    assert "reference" not in update.resident and "reference logprobs" in found
    assert "base" in found["apply"].resident and "base" in found["prepare"].resident
    # but for adapters that it begins with
    begun = setup(lora={"rank": 2, "adapter": "there"}, loss={"kl_coefficient": 0.1})
    found = programs.update_programs(begun, rows_at(begun, Lengths(96, 64)))
    assert programs.device_bytes(found["update"].resident["reference"]) == own
    narrow = setup(lora={"rank": 2, "base_dtype": "bfloat16"}).policy.params
    assert 0.5 <= programs.device_bytes(narrow) / programs.device_bytes(base) < 0.51


@pytest.mark.slow
def test_what_a_config_switches_on_is_planned():
    sampled = {"cast", "prefill", "decode"}
    update = {"prepare", "update", "apply"}
    held_out = {"evaluation prefill", "evaluation"}

    def planned(command: str = "train", **sections):
        return programs.memory_programs(setup(command, **sections), Lengths(96, 64)).keys()

    none = {"max_prompt_tokens": 96, "eval": None}
    assert planned(data=none) == sampled | update
    asked = {"prompts_per_step": 32, "max_response_tokens": 64, "recompute_logprobs": True}
    logprobs = {"logprobs", "reference logprobs"}
    everything = planned(rollout=asked, loss={"kl_coefficient": 0.1})
    assert everything == sampled | update | held_out | logprobs
    assert planned("sft") == update | held_out | {"fullest update", "cast"}


# Programs of a run that are not planned: what they hold is no more than what they return, or is gone before the first step.
UNPLANNED = {
    "_arrange_all",
    "_fresh_adapters",
    "_fresh_state",
    "_sums_rounded",
    "empty_state",
    "sums_of_bits",
    "zero_gradient",
}
RUNS = {
    "asynchronous": ("train", {"rollout": {"staleness": 1, "recompute_logprobs": True, "tis_cap": 2.0},
                               "loss": {"entropy_coefficient": 0.1}}),
    "reference and experts": ("train", {"rollout": {"replay_routing": True, "recompute_logprobs": True},
                                        "loss": {"kl_coefficient": 0.1}}),
    "supervised": ("sft", {}),
    "adapters": ("train", {"lora": {"rank": 4}, "rollout": {"recompute_logprobs": True},
                           "loss": {"kl_coefficient": 0.1}}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_programs_of_a_plan_are_those_that_a_run_compiles(name, request, tmp_path, monkeypatch):
    command, changes = RUNS[name]
    model = request.getfixturevalue("expert_model" if "experts" in name else "model")
    raw = recipe(
        model,
        tmp_path,
        mesh={"data": 1, "fsdp": 2, "tensor": 4},
        # caches grow, and a data shard has two micro-batches of one group
        rollout={"group_size": 2, "max_response_tokens": 96} | changes.pop("rollout", {}),
        train={"steps": 1, "prompts_per_update": None, "max_tokens_per_microbatch": 32},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw | changes))
    checked = []
    module = {"train": train, "sft": sft}[command]
    monkeypatch.setattr(module, "check_memory", lambda make, mesh: checked.append((make, mesh)))
    with compiled_functions() as ran:
        assert cli.main([command, str(tmp_path / "run.yaml")]) == 0
    ((make, mesh),) = checked
    with activate(mesh):
        texts = [program.lower().as_text() for program in make().values()]
    planned = [re.search(r"module @jit_(\w+)", text)[1] for text in dict.fromkeys(texts)]
    texts = (file.read_text() for file in (REPOSITORY / "rest_jax").rglob("*.py"))
    package = "".join(text for text in texts if "import jax" in text)
    # jax's own operations, of counts here, may have the name of a method
    named = {function for function in ran if not hasattr(jnp, function)}
    ours = {function for function in named if f"def {function}(" in package}
    assert ours - UNPLANNED == set(planned)
    assert all(ran.count(function) >= planned.count(function) for function in planned)


@contextlib.contextmanager
def compiled_functions():
    """The names of the functions that jax compiles within the block, as often as it does."""
    found, logger = [], logging.getLogger("jax._src.dispatch")

    class Names(logging.Handler):
        def emit(self, record):
            if said := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
                found.append(said[1])

    jax.clear_caches()  # what an earlier run has compiled counts, too
    handler = Names()
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
