"""The published models: sizes against the counts of parameters that their cards and checkpoints give."""

import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.models.hf.table import table
from rest_jax.models.presets import PRESETS, preset

EXACT = {  # of the checkpoints, millions
    "Qwen/Qwen3-0.6B": 596.049920,
    "Qwen/Qwen3-8B": 8190.735360,
    "Qwen/Qwen3-30B-A3B": 30532.122624,
    "Qwen/Qwen3-235B-A22B": 235093.634560,
    "Qwen/Qwen2.5-0.5B-Instruct": 494.032768,
    "Qwen/Qwen2.5-72B-Instruct": 72706.203648,
    "meta-llama/Llama-3.2-1B-Instruct": 1235.814400,
    "meta-llama/Llama-3.1-8B-Instruct": 8030.261248,
    "meta-llama/Llama-3.1-70B-Instruct": 70553.706496,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134.515008,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1711.376384,
}
NON_EMBEDDING = {  # of the model cards, billions
    "Qwen/Qwen3-0.6B": 0.44,
    "Qwen/Qwen3-1.7B": 1.4,
    "Qwen/Qwen3-4B-Instruct-2507": 3.6,
    "Qwen/Qwen3-8B": 6.95,
    "Qwen/Qwen3-14B": 13.2,
    "Qwen/Qwen3-32B": 31.2,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 29.9,
    "Qwen/Qwen3-235B-A22B": 234,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.31,
    "Qwen/Qwen2.5-3B-Instruct": 2.77,
    "Qwen/Qwen2.5-7B-Instruct": 6.53,
}
ACTIVE = {"Qwen/Qwen3-30B-A3B": 3.3, "Qwen/Qwen3-235B-A22B": 22}  # of the model cards, billions


def sizes(name: str) -> dict[str, int]:
    return {".".join(spec.path): int(np.prod(spec.shape)) for spec in table(preset(name))}


@pytest.mark.parametrize(("name", "millions"), EXACT.items())
def test_all_parameters(name, millions):
    assert sum(sizes(name).values()) / 1e6 == pytest.approx(millions, abs=1e-9)


@pytest.mark.parametrize(("name", "billions"), NON_EMBEDDING.items())
def test_parameters_without_embeddings(name, billions):
    rest = sum(size for path, size in sizes(name).items() if path not in ("embed", "head"))
    assert rest / 1e9 == pytest.approx(billions, rel=1.5e-2)


@pytest.mark.parametrize(("name", "billions"), ACTIVE.items())
def test_parameters_of_a_token(name, billions):
    cfg = preset(name)
    share = cfg.experts_per_token / cfg.n_experts
    active = sum(
        size * (share if spec.experts else 1)
        for spec, size in zip(table(cfg), sizes(name).values(), strict=True)
    )
    assert active / 1e9 == pytest.approx(billions, rel=2e-2)


def test_later_releases_differ_in_their_positions_alone():
    base, later = preset("Qwen/Qwen3-4B"), preset("Qwen/Qwen3-4B-Instruct-2507")
    assert (base.max_positions, later.max_positions) == (40_960, 262_144)
    assert base.rope_theta < later.rope_theta
    assert sizes("Qwen/Qwen3-4B") == sizes("Qwen/Qwen3-4B-Instruct-2507")


def test_an_unknown_name_is_one_line():
    assert len(PRESETS) == 28
    with pytest.raises(UserError, match=r"Qwen3-8b: no preset .*nearest: Qwen/Qwen3-8B"):
        preset("Qwen/Qwen3-8b")
