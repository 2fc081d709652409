"""The tokenizer of the policies that the tests serve."""

import pytest

from rest_jax.models.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(configs_dir) -> Tokenizer:
    return Tokenizer.load(configs_dir / "quickstart_policy")
