"""The peers' scripts, as modules."""

import importlib.util
import pathlib
import types
from collections.abc import Callable

import pytest

PEERS = pathlib.Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def load_peer() -> Callable[[str], types.ModuleType]:
    def load(name: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
