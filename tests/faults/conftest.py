"""How often a fault is injected: REST_JAX_INSTANTS times, 30 by default, at instants that REST_JAX_SEED (0) decides. What came of
it is printed (`pytest -s`).
"""

import os

import pytest


@pytest.fixture
def instants() -> int:
    return int(os.environ.get("REST_JAX_INSTANTS", "30"))


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("REST_JAX_SEED", "0"))


@pytest.fixture
def report(capsys):
    """Prints a line, also when output is captured."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", flush=True)

    return say
