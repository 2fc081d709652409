"""The recipes for real machines: each names hardware that there is and divides over it; two are compiled for it."""

import importlib.util
import re

import pytest

from rest_jax import config
from rest_jax.planning import plan, topology
from tests.conftest import REPOSITORY


def recipes() -> dict[str, str]:
    """Name -> topology, as `make aot` has them."""
    text = (REPOSITORY / "Makefile").read_text().replace("\\\n", " ")
    found = " ".join(re.findall(r"^(?:TPU|GPU)_PLANS := (.*)$", text, re.MULTILINE))
    return dict(word.split("=") for word in found.split())


def loaded(name: str) -> config.Config:
    return config.load([f"scale/{name}", "method/rest"])


def test_every_recipe_with_a_topology_is_planned():
    named = {
        path.stem
        for path in (REPOSITORY / "configs" / "scale").glob("*.yaml")
        if "of `rest-jax plan`" in path.read_text()
    }
    assert named == recipes().keys() and len(named) > 7


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_divides_over_its_hardware(name):
    made, where = loaded(name), topology.parse(recipes()[name])
    mesh = made.mesh
    fixed = (mesh.data or 1) * mesh.tensor * mesh.expert
    assert mesh.fsdp == -1 and where.size % fixed == 0
    shards = where.size // mesh.tensor
    assert made.train.prompts_per_update % shards == 0
    assert f"{where.name} of" in (REPOSITORY / f"configs/scale/{name}.yaml").read_text()


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["qwen3_1p7b_v5e16", "qwen3_8b_v5p32"])
def test_a_recipe_fits_the_hardware_that_it_is_for(name):
    made = plan.make_plan(loaded(name), plan.Options(recipes()[name]))
    assert made["fits"], made["memory"]["programs"]
    assert 0 < made["step"]["update_mfu"] < 1
