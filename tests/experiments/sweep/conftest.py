"""A base config and spaces for the tests of sweeps."""

import pathlib

import pytest
import yaml

from rest_jax import config as config_lib
from rest_jax.experiments.sweep import points, space

OVERRIDES = {"train.steps": 8, "train.eval_every": 2, "train.checkpoint_every": 3}


@pytest.fixture
def recipe(tmp_path) -> pathlib.Path:
    """A config file whose runs go to tmp_path/runs."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: base\noutput: {tmp_path / 'runs'}\nmodel:\n  source: nowhere\n")
    return path


@pytest.fixture
def write_space(tmp_path):
    """Writes a space file; returns its path."""

    def write(**values) -> pathlib.Path:
        path = tmp_path / f"{values.get('name', 'some')}.yaml"
        path.write_text(
            yaml.safe_dump({"name": "some", "overrides": OVERRIDES} | values, sort_keys=False)
        )
        return path

    return write


@pytest.fixture
def make(recipe, write_space):
    """(space, shared config) from the values of a space file."""

    def build(**values) -> tuple[space.Space, config_lib.Config]:
        found = space.load(write_space(**values))
        return found, points.base(found, recipe)

    return build
