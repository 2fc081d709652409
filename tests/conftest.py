"""What every test finds: 8 CPU devices, a compilation cache that outlives the run, shape checks, the real data.

The environment is set before anything imports jax. jaxtyping and beartype check the annotations of the function modules
named below; record modules (flax.struct) stay out, since tree operations rightly fill records with other things
than arrays.
"""

import os
import pathlib

_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path("~/.cache/rest_jax/xla").expanduser()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import jaxtyping
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

CHECKED_MODULES = [
    "rest_jax.rl.masked",
    "rest_jax.models.attention",
    "rest_jax.models.layouts",
    "rest_jax.models.rope",
    "rest_jax.rl.advantages",
    "rest_jax.rl.curriculum",
    "rest_jax.rl.logprobs",
    "rest_jax.rl.loss",
    "rest_jax.rl.packing",
    "rest_jax.rl.regions",
    "rest_jax.rl.weights",
    "rest_jax.rollout.sampling",
]
jaxtyping.install_import_hook(CHECKED_MODULES, "beartype.beartype")

# The same examples on every run: a failure is a change of the code, not luck.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--data-dir",
        default=os.environ.get("REST_JAX_DATA", str(REPOSITORY.parent / "shared" / "data")),
        help="folder with rlla/ and api_bank/ (default: $REST_JAX_DATA, else ../shared/data)",
    )


@pytest.fixture(scope="session")
def data_dir(request) -> pathlib.Path:
    """The folder with the real records; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(request.config.getoption("--data-dir"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set REST_JAX_DATA or --data-dir")
    return folder


@pytest.fixture
def tmp_run(tmp_path) -> pathlib.Path:
    """An empty folder for a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def configs_dir() -> pathlib.Path:
    """The shipped configs."""
    return REPOSITORY / "configs"
