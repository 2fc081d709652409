"""What every test finds: 8 CPU devices, a compilation cache that outlives the run, shape checks, the real data.

The environment is set before anything imports jax. jaxtyping and beartype check the annotations of the function modules
named below; record modules (flax.struct) stay out, since tree operations rightly fill records with other things
than arrays.
"""

import gc
import json
import logging
import os
import pathlib
import resource
import shutil
import signal

from rest_jax.run import environment

_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path("~/.cache/rest_jax/xla").expanduser()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As the program does, so that a command that a test calls here changes nothing: XLA_FLAGS is part of the keys of the cache.
environment.configure()
# A shell's background job ignores Ctrl-C, and what it starts would do so too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jaxtyping
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

CHECKED_MODULES = [
    "rest_jax.rl.masked",
    "rest_jax.models.attention",
    "rest_jax.models.block_attention",
    "rest_jax.models.flash_attention",
    "rest_jax.models.moe",
    "rest_jax.models.paged_attention",
    "rest_jax.models.rope",
    "rest_jax.models.score_blocks",
    "rest_jax.models.triton_attention",
    "rest_jax.rl.balance",
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


def pytest_collection_finish():
    """Python's collector took a tenth of the time: it need not look at modules and tests again and again, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Lets go of compiled programs before a process has as many memory maps as Linux allows it: then it is killed."""
    yield
    maps, most = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")
    if most.is_file() and len(maps.read_text().splitlines()) > int(most.read_text()) // 2:
        import jax

        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--data-dir",
        default=os.environ.get("REST_JAX_DATA", str(REPOSITORY.parent / "shared" / "data")),
        help="folder with rlla/ and api_bank/ (default: $REST_JAX_DATA, else one beside the checkout)",
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


@pytest.fixture
def memory_store(monkeypatch):
    """The URL of an empty bucket whose objects are in the memory of this process (fsspec's memory store)."""
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Memory(MemoryFileSystem):
        protocol = "s3"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("s3://"))

    # epath keeps the file system of a scheme
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setitem(_registry, "s3", Memory)
    yield "s3://bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope="session")
def s3_server():
    """The URL of an empty bucket on an S3 server of this machine, for this process and those it starts."""
    for package in ("moto", "flask_cors", "s3fs"):
        pytest.importorskip(package, reason=f"{package} is missing: requirements-dev.txt")
    import boto3
    from etils.epath import backend
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "key")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="bucket")
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="session")
def gs_server():
    """The URL of an empty bucket on a server of this machine that speaks Google Cloud Storage's protocol."""
    for package in ("gcp_storage_emulator", "gcsfs"):
        pytest.importorskip(package, reason=f"{package} is missing: requirements-dev.txt")
    import socket

    from etils.epath import backend
    from gcp_storage_emulator.server import create_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield "gs://bucket"
    server.stop()


@pytest.fixture(scope="session")
def configs_dir() -> pathlib.Path:
    """The builtin configs."""
    return REPOSITORY / "configs"


@pytest.fixture
def limit_files():
    """Sets the size, in bytes, at which a file of this process is refused to grow: as a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def model(tmp_path_factory, configs_dir) -> pathlib.Path:
    """An HF folder: the quickstart's tokenizer, two random layers."""
    return _random_model(tmp_path_factory.mktemp("model"), configs_dir, {})


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory, configs_dir) -> dict:
    """family -> the quickstart's tokenizer with a chat template that writes what the family's published one writes."""
    return _with_templates(REPOSITORY / "tests/data/chat_templates", tmp_path_factory, configs_dir)


@pytest.fixture(scope="session")
def published(tmp_path_factory, configs_dir) -> dict:
    """The same with the published ones that lie in the folder of REST_JAX_CHAT_TEMPLATES."""
    folder = os.environ.get("REST_JAX_CHAT_TEMPLATES")
    if folder is None:
        pytest.skip("set REST_JAX_CHAT_TEMPLATES to a folder of published chat templates")
    return _with_templates(pathlib.Path(folder), tmp_path_factory, configs_dir)


def _with_templates(templates: pathlib.Path, tmp_path_factory, configs_dir: pathlib.Path) -> dict:
    from rest_jax.models.tokenizer import Tokenizer

    made = {}
    for path in templates.glob("*.jinja"):
        folder = tmp_path_factory.mktemp("family") / path.stem
        ignore = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(configs_dir / "quickstart_policy", folder, ignore=ignore)
        shutil.copy(path, folder / "chat_template.jinja")
        made[path.stem] = Tokenizer.load(folder)
    return made


@pytest.fixture(scope="session")
def expert_model(tmp_path_factory, configs_dir) -> pathlib.Path:
    """The same with four experts a layer, of which a token has two."""
    experts = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    return _random_model(tmp_path_factory.mktemp("expert_model"), configs_dir, experts)


def _random_model(folder: pathlib.Path, configs_dir: pathlib.Path, changes: dict) -> pathlib.Path:
    import jax

    from rest_jax.models.decoder import init_params
    from rest_jax.models.hf.config import decoder_config
    from rest_jax.models.hf.write import export

    files = folder / "files"
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(configs_dir / "quickstart_policy", files, ignore=ignore)
    path = files / "config.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    raw = json.loads(path.read_text()) | sizes | heads | changes
    raw.pop("layer_types", None)
    path.write_text(json.dumps(raw))
    params = jax.tree.map(lambda x: x * 3, init_params(decoder_config(raw), jax.random.key(0)))
    export(params, files, folder / "hf")
    return folder / "hf"
