"""Scripts of tools/ as modules."""

import importlib.util
import pathlib
from types import ModuleType

import pytest

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pictures() -> ModuleType:
    return load("readme_pictures")


@pytest.fixture(scope="session")
def weight_shares() -> ModuleType:
    return load("weight_shares")
