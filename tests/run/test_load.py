"""Export from a run: layer by layer from its checkpoint. Runs with LoRA and adapters of peft. Memory of convert and export."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from rest_jax import config as config_lib
from rest_jax.config import Config, MeshConfig, ModelConfig, dump
from rest_jax.errors import UserError
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import apply_routed, logits, with_adapters
from rest_jax.models.hf import peft, store
from rest_jax.models.lora import pair_up
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run import load
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.contents import BASE, MADE_OF, digest_params
from rest_jax.run.folder import MODEL_FOLDER, open_run
from rest_jax.types import TrainState
from tests.runs import PROGRAMS, ROOT, environment

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run folder with one checkpoint, saved from four devices, and its parameters."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(model, folder / MODEL_FOLDER, ignore=shutil.ignore_patterns("*.safetensors"))
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    policy = load.load_policy(ModelConfig(source=str(model)), mesh)
    params = jax.tree.map(lambda x: x + 1 / 3, policy.params)
    with Checkpoints(folder) as checkpoints:
        none = jax.numpy.zeros(())
        checkpoints.save(1, TrainState(none, params, none, none, none), {})
    return folder, jax.tree.map(np.asarray, params)


def test_a_run_is_exported_without_a_policy(run, model, tmp_path, monkeypatch):
    folder, params = run

    def refuse(*_):
        raise AssertionError("the policy was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(load, "load_policy", refuse)
        load.export(str(folder), tmp_path / "out", "float32")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == safetensors.numpy.load_file(model / "model.safetensors").keys()
    policy = load.load_policy(ModelConfig(source=str(tmp_path / "out")), MeshConfig(fsdp=-1))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), policy.params, params
    )


@pytest.mark.parametrize("kind", ["a folder", "a hub id"])
def test_a_run_is_exported_with_the_tokenizer_of_its_training(model, tmp_path, kind):
    source, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(model, source)
    shutil.copytree(model, other, ignore=shutil.ignore_patterns("*.safetensors"))
    template = (other / "chat_template.jinja").read_text() + "{# other #}"
    (other / "chat_template.jinja").write_text(template)
    (other / "generation_config.json").write_text('{"_from": "another model"}')
    words = [f"model.source={source}", f"model.tokenizer={other}", f"output={tmp_path}", "name=run"]
    config = config_lib.load([], words)
    policy = load.load_policy(config.model, MeshConfig(fsdp=-1))
    tokenizer = policy.tokenizer
    if kind == "a hub id":
        tokenizer = dataclasses.replace(tokenizer, source="owner/name")
    none = jax.numpy.zeros(())
    with contextlib.closing(open_run(config, policy.files, tokenizer=tokenizer)) as run:
        run.begin()
        run.save(1, TrainState(none, policy.params, none, none, none), {})
    shutil.rmtree(other)
    load.export(str(tmp_path / "run"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    own = (source / "generation_config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == own
    again = Tokenizer.load(tmp_path / "out", vocab_size=policy.config.vocab_size)
    assert again.pieces == tokenizer.pieces and again.stop_ids == tokenizer.stop_ids


def test_a_run_whose_model_folder_would_be_read_otherwise_does_not_begin(model, tmp_path):
    """transformers reads every tokenizer in the folder of a qwen2 model with Qwen's pieces."""
    files = shutil.copytree(model, tmp_path / "model")
    _change(files / "config.json", model_type="qwen2")
    words = [f"model.source={files}", f"model.tokenizer={model}", f"output={tmp_path}", "name=run"]
    opened = open_run(config_lib.load([], words), files, tokenizer=Tokenizer.load(model))
    with (
        contextlib.closing(opened) as run,
        pytest.raises(UserError, match="reads it with other pieces"),
    ):
        run.begin()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ('{"eos_token_id": 0, "temperature": 0.5}', {"temperature": 0.5}),
        ('{"eos_token_id": "x"}', {}),
        ("[]", {}),
        (None, {}),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_an_export_ends_elsewhere_as_in_training(run, tmp_path, before, kept, config):
    """Where the model's own eos is another than the chat template's, as in Qwen2.5 base."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    files = folder / MODEL_FOLDER
    _change(files / "tokenizer_config.json", eos_token="<|endoftext|>")
    (files / "generation_config.json").unlink(missing_ok=True)
    if before is not None:
        (files / "generation_config.json").write_text(before)
    if config:
        (folder / "config.yaml").write_text(dump(config_lib.load([], ["name=x", "model.source=x"])))
    trained = Tokenizer.load(files)
    load.export(str(folder), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {**kept, "eos_token_id": [0, 2]} and trained.stop_ids == (0, 2)
    again = Tokenizer.load(tmp_path / "out")
    assert (again.stop_ids, again.end_id) == (trained.stop_ids, trained.end_id) == ((0, 2), 2)


def _change(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_checkpoint_of_a_run_is_a_model(model, tmp_path):
    """The one that is named and not the newest; its results are told apart from those of the run."""
    folder = tmp_path / "run"
    shutil.copytree(model, folder / MODEL_FOLDER, ignore=shutil.ignore_patterns("*.safetensors"))
    config = Config.model_validate({"name": "mine", "model": {"source": str(model)}})
    (folder / "config.yaml").write_text(dump(config))
    policy = load.load_policy(ModelConfig(source=str(model)), MeshConfig(fsdp=-1))
    with Checkpoints(folder) as checkpoints:
        none = jax.numpy.zeros(())
        for step in (1, 2):
            params = jax.tree.map(lambda x, step=step: x + step, policy.params)
            checkpoints.save(step, TrainState(none, params, none, none, none), {})
    first, newest = str(folder / "checkpoints/1"), str(folder)
    for source, step in ((first, 1), (newest, 2), (str(folder / "checkpoints/2"), 2)):
        found = load.load_policy(ModelConfig(source=source), MeshConfig(fsdp=-1)).params
        jax.tree.map(lambda x, y, s=step: np.testing.assert_array_equal(x, y + s), found, policy.params)  # fmt: skip
    assert load.config_of(first, []).name == "mine"
    assert load.result_place(first, "gain") == folder / "gain-step1"
    assert load.result_place(first, "api_bank.json") == folder / "api_bank-step1.json"
    assert load.result_place(newest, "api_bank.json") == folder / "api_bank.json"
    assert load.result_place(str(model), "gain") is None
    load.export(first, tmp_path / "out", "float32")
    again = load.load_policy(ModelConfig(source=str(tmp_path / "out")), MeshConfig(fsdp=-1))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 1), again.params, policy.params)
    with pytest.raises(UserError, match="checkpoints/3: no such checkpoint; there are 1, 2"):
        load.load_policy(ModelConfig(source=str(folder / "checkpoints/3")), MeshConfig(fsdp=-1))
    (file,) = sorted((folder / "checkpoints/1/params").rglob("*"), key=lambda p: -p.stat().st_size)[
        :1
    ]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="checkpoints/1: damaged"):
        load.load_policy(ModelConfig(source=first), MeshConfig(fsdp=-1))


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 8, 1), (4, 1, 2), (1, 2, 4)])
def test_a_run_is_loaded_exactly_on_another_mesh(run, data, fsdp, tensor):
    folder, params = run
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    policy = load.load_policy(ModelConfig(source=str(folder)), mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), policy.params, params
    )
    assert dict(policy.mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": 1}


def test_a_layer_of_a_checkpoint_is_a_chunk(run):
    folder, params = run
    path = folder / "checkpoints" / "1" / "params"
    array = store.open_array(path, ("blocks", "mlp", "gate"))
    layers, d, f = params["blocks"]["mlp"]["gate"].shape
    assert array.shape == (layers, d, f)
    assert tuple(array.chunk_layout.read_chunk.shape) == (1, d // 2, f // 2)
    np.testing.assert_array_equal(array.read().result(), params["blocks"]["mlp"]["gate"])


def test_a_damaged_run_is_not_exported(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    largest = max((folder / "checkpoints").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        load.export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def peak_bytes(*words):
    """Peak memory of `rest-jax WORDS`, which must succeed."""
    code = (
        "import resource, subprocess, sys; "
        "done = subprocess.run([sys.executable, '-m', 'rest_jax', *sys.argv[1:]]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
def test_convert_and_export_hold_no_model(tmp_path):
    """Llama 3.2 1B: 2.5 GB in two files, the embedding alone 0.5 GB."""
    source, converted, out = (tmp_path / name for name in ("hf", "converted", "out"))
    words = [
        sys.executable,
        str(PROGRAMS / "random_hf_folder.py"),
        "meta-llama/Llama-3.2-1B-Instruct",
        str(source),
    ]
    subprocess.run(words, env=environment() | {"PYTHONPATH": str(ROOT)}, check=True)
    files = sorted(source.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 2.4 * GIGABYTE
    assert peak_bytes("convert", str(source), str(converted)) < GIGABYTE
    shutil.rmtree(source)
    assert peak_bytes("export", str(converted), str(out)) < GIGABYTE
    manifest = json.loads((converted / "rest_jax.json").read_text())["tensors"]
    assert len(manifest) == len(list(tensors_of(out)))


def tensors_of(folder):
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "numpy") as opened:
            yield from opened.keys()


# --- runs with LoRA ---------------------------------------------------------------------------------------------------------

TARGETS = ("q", "o", "down")


class Adapted(NamedTuple):
    """A run with LoRA: its config, base and adapters as NumPy."""

    folder: pathlib.Path
    config: Config
    base: dict
    adapters: dict

    def merged(self, base=None):
        """The weights with their adapters."""

        def one(operands):
            if len(operands) == 1:
                return operands[0]
            w, a, b = operands
            product = [np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)]
            return w + self.config.lora.alpha / self.config.lora.rank * np.stack(product)

        pairs = pair_up(base or self.base, self.adapters)
        return jax.tree.map(one, pairs, is_leaf=lambda x: isinstance(x, tuple))


def adapted_run(folder: pathlib.Path, base: pathlib.Path, files: pathlib.Path, **lora) -> Adapted:
    """A run folder with a checkpoint of random adapters of `base`, saved from four devices."""
    raw = {
        "name": "run",
        "model": {"source": str(base)},
        "lora": {"rank": 3, "alpha": 6, "targets": TARGETS, **lora},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }
    config = Config.model_validate(raw)
    shutil.copytree(files, folder / MODEL_FOLDER, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.yaml").write_text(dump(config))
    policy = load.load_trained(config)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(np.float32), x.sharding),
        policy.adapters,
    )
    made_of = {BASE: policy.digest or digest_params(policy.params)}
    with Checkpoints(folder) as checkpoints:
        none = jax.numpy.zeros(())
        checkpoints.save(1, TrainState(none, adapters, none, none, none), {MADE_OF: made_of})
    base_of = jax.tree.map(lambda x: np.asarray(x, np.float32), policy.params)
    return Adapted(folder, config, base_of, jax.tree.map(np.asarray, adapters))


@pytest.fixture(scope="module")
def adapted(model, tmp_path_factory) -> Adapted:
    return adapted_run(tmp_path_factory.mktemp("adapted") / "run", model, model)


def weights_of(source, **mesh):
    found = load.load_policy(ModelConfig(source=str(source)), MeshConfig(**mesh or {"fsdp": -1}))
    assert {x.dtype.name for x in jax.tree.leaves(found.params)} == {"float32"}
    return found.params


def assert_near(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_a_run_with_lora_is_a_model_with_its_adapters_merged(adapted):
    expected = adapted.merged()
    assert_near(weights_of(adapted.folder), expected)
    assert_near(weights_of(adapted.folder, data=1, fsdp=2, tensor=4), expected)
    saved = adapted.folder / "checkpoints" / "1" / "params"
    array = store.open_array(saved, ("blocks", "attention", "q", "a"))
    assert array.shape == adapted.adapters["blocks"]["attention"]["q"]["a"].shape


def test_it_is_exported_without_a_policy(adapted, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(load, "load_policy", None)
        load.export(str(adapted.folder), tmp_path / "out", "float32")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == safetensors.numpy.load_file(model / "model.safetensors").keys()
    assert_near(weights_of(tmp_path / "out"), adapted.merged())
    assert "LoRA of rank 3" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_in_bfloat16_is_merged_as_it_was_trained(adapted, model, tmp_path):
    """The weights of the folder are float32; the adapters belong to what they are in bfloat16."""
    narrow = adapted_run(tmp_path / "run", model, model, base_dtype="bfloat16")
    assert np.any(narrow.base["embed"] != adapted.base["embed"])
    np.testing.assert_array_equal(
        narrow.base["final_norm"]["scale"], adapted.base["final_norm"]["scale"]
    )
    expected = narrow.merged()
    assert_near(weights_of(tmp_path / "run"), expected)
    load.export(str(tmp_path / "run"), tmp_path / "out", "float32")
    assert_near(weights_of(tmp_path / "out"), expected)


def test_the_base_may_be_a_run_with_lora(adapted, model, tmp_path):
    second = adapted_run(tmp_path / "run", adapted.folder, model)
    assert_near(second.base, adapted.merged())
    expected = second.merged()
    assert_near(weights_of(tmp_path / "run"), expected)
    load.export(str(tmp_path / "run"), tmp_path / "out", "float32")
    assert_near(weights_of(tmp_path / "out"), expected)


@pytest.mark.parametrize("use", [weights_of, lambda run: load.export(str(run), run / "out")])
def test_a_base_that_is_gone_or_another_one_is_one_line(model, tmp_path, use):
    base = shutil.copytree(model, tmp_path / "base")
    adapted_run(tmp_path / "run", base, model)
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = np.nextafter(norm, np.float32(9))
    safetensors.numpy.save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"adapters belong to other weights than model.source"):
        use(tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"adapters of .*base: .* no such folder.*config.yaml"):
        use(tmp_path / "run")
    assert not (tmp_path / "run" / "out").exists()


PEFT = "base_model.model.model.layers"
# what peft calls them, and what we do: [r, in], [out, r]
PEFT_SHAPES = {
    "self_attn.q_proj.lora_A": (3, 32),
    "self_attn.q_proj.lora_B": (32, 3),
    "self_attn.o_proj.lora_A": (3, 32),
    "self_attn.o_proj.lora_B": (32, 3),
    "mlp.down_proj.lora_A": (3, 64),
    "mlp.down_proj.lora_B": (32, 3),
}


@pytest.fixture(scope="module")
def peft_folder(adapted, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("peft") / "adapter"
    load.export(str(adapted.folder), out, adapter=True)
    return out


def test_adapters_are_exported_as_peft_has_them(adapted, peft_folder):
    assert sorted(file.name for file in peft_folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = safetensors.numpy.load_file(peft_folder / "adapter_model.safetensors")
    shapes = {
        f"{PEFT}.{i}.{name}.weight": shape for i in range(2) for name, shape in PEFT_SHAPES.items()
    }
    assert {name: x.shape for name, x in found.items()} == shapes
    a, b = (adapted.adapters["blocks"]["attention"]["o"][key][1] for key in "ab")
    mine = found[f"{PEFT}.1.self_attn.o_proj.lora_A.weight"]
    np.testing.assert_array_equal(mine, a.reshape(32, 3).T)
    np.testing.assert_array_equal(found[f"{PEFT}.1.self_attn.o_proj.lora_B.weight"], b.T)
    said = json.loads((peft_folder / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 3, 6)
    assert said["target_modules"] == ["q_proj", "o_proj", "down_proj"]
    assert said["base_model_name_or_path"] == adapted.config.model.source


def with_adapter(adapted: Adapted, folder: pathlib.Path, **lora) -> Config:
    raw = adapted.config.model_dump(mode="json")
    raw["lora"] |= {"adapter": str(folder), **lora}
    return Config.model_validate(raw)


def test_a_run_begins_with_the_adapters_of_a_peft_folder(adapted, peft_folder):
    policy = load.load_trained(with_adapter(adapted, peft_folder))
    jax.tree.map(np.testing.assert_array_equal, policy.adapters, adapted.adapters)


@pytest.mark.parametrize(
    ("changes", "lora", "said"),
    [
        ({"use_dora": True}, {}, "use_dora True: not supported"),
        ({"bias": "all"}, {}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern"),
        ({"use_rslora": True, "alpha_pattern": {"x": 1}}, {}, "use_rslora True; alpha_pattern"),
        ({"peft_type": "IA3"}, {}, "peft_type IA3"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            {},
            "init_lora_weights pissa_niter_16, which changes",
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            {},
            "loftq_config .*init_lora_weights loftq",
        ),
        ({"init_lora_weights": ["olora"]}, {}, "init_lora_weights .'olora'."),
        ({}, {"rank": 4}, "lora.rank=3"),
        ({}, {"alpha": 8}, "lora.alpha=6"),
        ({}, {"targets": "q"}, r"lora.targets=\["),
    ],
    ids=lambda x: str(x)[:40],
)
def test_another_kind_of_adapter_is_refused_by_name(
    adapted, peft_folder, tmp_path, changes, lora, said
):
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=said) as caught:
        load.load_trained(with_adapter(adapted, folder, **lora))
    assert "\n" not in str(caught.value)


def test_adapters_of_other_sizes_or_another_model_are_refused(adapted, peft_folder, tmp_path):
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = f"{PEFT}.0.mlp.down_proj.lora_A.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name][:, :8].copy()}, file)
    with pytest.raises(UserError, match=r"lora_A.weight has shape \(3, 8\), needs \(3, 64\)"):
        load.load_trained(with_adapter(adapted, folder))
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file"):
        load.load_trained(with_adapter(adapted, folder))
    cfg = load.load_trained(adapted.config).config
    for source, other in (("some/model", "other/model"), ("some/model", "some/model-2")):
        path = folder / "adapter_config.json"
        said = json.loads(path.read_text()) | {"base_model_name_or_path": source}
        path.write_text(json.dumps(said))
        with pytest.raises(UserError, match=f"set model.source={source}"):
            peft.open_adapter(folder, cfg, other)


def test_what_is_no_run_with_lora_has_no_adapters_to_export(run, model, tmp_path):
    for source in (run[0], model):
        with pytest.raises(UserError, match="not a run with LoRA"):
            load.export(str(source), tmp_path / "out", adapter=True)


@pytest.mark.slow
@pytest.mark.services
def test_peft_computes_the_same_logits(adapted, peft_folder, model):
    """In a process with the packages peft and torch, whose folder of packages REST_JAX_PEFT may name."""
    code = (PROGRAMS / "peft_logits.py").read_text()
    words = [sys.executable, "-c", code, str(model), str(peft_folder)]
    path = os.pathsep.join([os.environ.get("REST_JAX_PEFT", ""), *sys.path])
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if "No module named 'peft'" in done.stderr:
        pytest.skip("peft is missing: pip install peft, or name its folder in REST_JAX_PEFT")
    assert done.returncode == 0, done.stderr
    expected = np.asarray(json.loads(done.stdout.splitlines()[-1]), np.float32)
    policy = load.load_trained(with_adapter(adapted, peft_folder, base_dtype="float32"))
    tokens = jax.numpy.arange(len(expected))[None] + 3
    layout, positions = prompt_rows(tokens, jax.numpy.array([len(expected)]))
    weights = with_adapters(policy.adapters, policy.frozen)
    hidden = apply_routed(policy.decoder, weights, tokens, positions, layout)[0]
    found = logits(policy.params, policy.config, hidden[0])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_plugins_of_a_run_are_left_out_unless_they_are_asked_for(tmp_path, capsys):
    """Whoever made the run wrote its config."""
    for name in ("checkpoints", MODEL_FOLDER):
        (tmp_path / name).mkdir()
    text = "name: theirs\nmodel: {source: x}\nreward: {plugin: 'theirs.py:score', builtin: false, coarse: true}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = load.config_of(str(tmp_path), [])
    assert (config.reward.plugin, config.reward.builtin, config.reward.coarse) == (None, True, True)
    assert "names reward.plugin theirs.py:score; it is not run" in capsys.readouterr().err
    own = load.config_of(str(tmp_path), ["reward.plugin=mine.py:score"])
    assert own.reward.plugin == "mine.py:score"
    capsys.readouterr()
    asked = load.config_of(str(tmp_path), [], plugins=True)
    assert (asked.reward.plugin, asked.reward.builtin) == ("theirs.py:score", False)
    assert capsys.readouterr().err == ""
