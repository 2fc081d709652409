"""Shipped recipes: found by name from anywhere, never instead of the user's own files; every one of them loads."""

import importlib
import os
import pathlib
import re

import pytest

import rest_jax
from rest_jax import builtin, config
from rest_jax.errors import UserError

PACKAGE = pathlib.Path(rest_jax.__file__).parent


def test_every_recipe_loads_and_is_named_after_its_file():
    assert builtin.names()
    for name in builtin.names():
        loaded = config.load(builtin.find_config(name))
        assert config.validate(loaded.model_dump(mode="json")) == loaded, name


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "configs/{}", "configs/{}.yaml"])
def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    name = builtin.names()[0]
    assert builtin.find_config(form.format(name)) == builtin.folder() / f"{name}.yaml"


def test_own_files_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"configs/{builtin.names()[0]}.yaml"
    os.makedirs("configs")
    pathlib.Path(name).write_text("name: mine")
    assert builtin.find_config(name) == pathlib.Path(name)
    assert builtin.locate(name) == name


def test_model_paths_are_located_and_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"configs/{builtin.names()[0]}.yaml"  # any shipped file stands for a model folder
    assert pathlib.Path(builtin.locate(name)).is_file()
    for source in ("org/model", "configs/absent", "/configs/x", "models/x"):
        assert builtin.locate(source) == source
    raw = {"name": "a", "model": {"source": name, "tokenizer": "org/model"}}
    resolved = config.resolve(config.validate(raw))
    assert resolved.model.source == builtin.locate(name) and resolved.model.tokenizer == "org/model"


def test_nothing_outside_the_folder_is_found():
    with pytest.raises(UserError):
        builtin.find_config("/quickstart")


def test_every_folder_of_code_is_a_package():
    """setup.py ships packages only: a folder without __init__.py would be missing from the wheel."""
    for path in PACKAGE.rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path.parent


def test_every_module_imports_and_starts_with_what_it_does():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        if path.stat().st_size and not name.endswith("__main__"):
            assert re.match(r"\w", importlib.import_module(name).__doc__ or ""), name
