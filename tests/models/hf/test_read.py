"""Model folders as they are found: which files and values count, with transformers as the oracle, and what is refused."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rest_jax.config import MeshConfig
from rest_jax.distributed import make_mesh
from rest_jax.errors import UserError
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import Decoder, logits
from rest_jax.models.hf.config import ConversionError, decoder_config
from rest_jax.models.hf.folder import scan
from rest_jax.models.hf.read import load_model
from rest_jax.models.hf.write import convert, export
from rest_jax.models.tokenizer import Tokenizer

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TOKENS = np.random.default_rng(0).integers(0, 48, (1, 400)).astype(np.int32)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of CONFIG."""
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (48, 32), "model.norm.weight": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, 32)
        for name, shape in (("gate", (40, 32)), ("up", (40, 32)), ("down", (32, 40))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (32,)
    return {
        name: (0.3 * rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def save(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def make(folder: pathlib.Path, tensors: dict[str, np.ndarray] | None = None, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if tensors is not None:
        save(folder / "model.safetensors", tensors)
    return folder


def split(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """The tensors in two files with an index."""
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9]}
    parts["model-00002-of-00002.safetensors"] = names[9:]
    for file, own in parts.items():
        save(folder / file, {name: tensors[name] for name in own})
    weight_map = {name: file for file, own in parts.items() for name in own}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load(folder: pathlib.Path):
    return load_model(str(folder), make_mesh(MeshConfig(), jax.devices()[:1]), jnp.float32, "none")[
        :2
    ]


def assert_as_in_transformers(folder: pathlib.Path) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    cfg, params = load(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    tokens = jnp.asarray(TOKENS)
    layout, positions = prompt_rows(tokens, jnp.full(1, tokens.shape[1]))
    hidden, _ = jax.jit(Decoder(cfg).apply)({"params": params}, tokens, positions, layout)
    np.testing.assert_allclose(np.asarray(logits(params, cfg, hidden)), expected, atol=1e-4)


def test_a_single_file_counts_beside_an_index(tmp_path):
    folder = make(tmp_path / "both", weights(0))
    split(folder, weights(1))
    np.testing.assert_array_equal(scan(folder)[EMBED].read(), weights(0)[EMBED])
    assert_as_in_transformers(folder)


def test_a_stale_index_beside_a_single_file_is_not_read(tmp_path):
    folder = make(tmp_path / "stale", weights(0))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"')
    convert(str(folder), tmp_path / "out")
    assert_as_in_transformers(folder)


def test_an_index_that_says_the_wrong_file(tmp_path):
    """Every tensor of the files that it names is read, wherever it says it is."""
    folder = make(tmp_path / "swapped")
    split(folder, weights(0))
    path = folder / "model.safetensors.index.json"
    raw = json.loads(path.read_text())
    files = sorted(set(raw["weight_map"].values()))
    raw["weight_map"] = dict(zip(raw["weight_map"], files * 50, strict=False))
    path.write_text(json.dumps(raw))
    assert_as_in_transformers(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{}.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.embed_positions.position_ids",
    ],
)
def test_what_models_compute_is_no_weight(tmp_path, name):
    computed = {name.format(i): np.ones(4, np.float32) for i in range(2)}
    folder = make(tmp_path / "buffers", weights() | computed)
    assert_as_in_transformers(folder)
    convert(str(folder), tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "converted", tmp_path / "out")
    assert scan(tmp_path / "out").keys() == weights().keys()


def test_one_of_two_tied_matrices_is_enough(tmp_path):
    tensors = weights()
    tensors[HEAD] = tensors.pop(EMBED)
    folder = make(tmp_path / "head", tensors)
    assert_as_in_transformers(folder)
    convert(str(folder), tmp_path / "converted")
    for source in (folder, tmp_path / "converted"):
        out = tmp_path / f"out_{source.name}"
        export(source, source, out)
        np.testing.assert_array_equal(scan(out)[EMBED].read(), tensors[HEAD])
        assert_as_in_transformers(out)


def test_a_tied_flag_with_another_head_is_refused_with_the_remedy(tmp_path):
    tensors = weights()
    folder = make(tmp_path / "differs", tensors | {HEAD: tensors[EMBED] + 1})
    with pytest.raises(ConversionError, match="set tie_word_embeddings false or remove"):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = make(tmp_path / "absent", tensors, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match=r"lm_head\.weight; set tie_word_embeddings true"):
        load(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3, "rope_theta": 700.0},
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {
            "rope_scaling": {**LLAMA3, "rope_theta": 300.0},
            "rope_parameters": {"rope_theta": 500.0},
            "rope_theta": 700.0,
        },
        {"rope_scaling": {"type": "default"}, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_scaling": None, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_scaling": {}, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
    ],
)
def test_rope_as_transformers_takes_it(tmp_path, rope):
    assert_as_in_transformers(make(tmp_path / "rope", weights(), **rope))


@pytest.mark.parametrize(
    "key",
    [
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "layer_types",
        "partial_rotary_factor",
        "quantization_config",
        "decoder_sparse_step",
    ],
)
def test_null_means_the_default(key):
    without = {name: value for name, value in CONFIG.items() if name != key}
    assert decoder_config({**CONFIG, key: None}) == decoder_config(without)


@pytest.mark.parametrize("value", ["x", -1, 0, True, [], {"a": 1}, [1], 1e400, float("nan"), 2**40])
@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "hidden_act",
        "tie_word_embeddings",
    ],
)
def test_malformed_values_are_named(key, value):
    if key == "tie_word_embeddings" and value is True:
        return
    with pytest.raises(ConversionError, match=key) as caught:
        decoder_config({**CONFIG, key: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor is 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "is not below high_freq_factor"),
        ({"layer_types": 7, "hidden_act": ["silu"]}, "hidden_act ['silu']"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"model_type": "x" * 10_000}, "model_type 'xxx"),
    ],
)
def test_values_that_cannot_be_meant_are_named(changes, named):
    with pytest.raises(ConversionError) as caught:
        decoder_config(CONFIG | changes)
    assert named in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "..", 7, None, "a.bin"]
)
def test_an_index_names_files_of_its_folder(tmp_path, name):
    save(tmp_path / "other.safetensors", weights())
    folder = make(tmp_path / "model")
    index = {"weight_map": dict.fromkeys(weights(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="weight_map names"):
        convert(str(folder), tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "LICENSE", "additional_chat_templates/a.jinja"]
)
def test_links_out_of_a_folder_are_refused(tmp_path, name):
    """They are read by nobody, nor do they come into an export."""
    folder = make(tmp_path / "model", weights())
    (folder / "additional_chat_templates").mkdir()
    for side in ("LICENSE", "additional_chat_templates/a.jinja"):
        (folder / side).write_text("x")
    shutil.copy(folder / name, tmp_path / "outside")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "outside")
    for command in (lambda: convert(str(folder), tmp_path / "out"), lambda: load(folder)):
        with pytest.raises(UserError, match=rf"{name} is a link that leads out of the folder"):
            command()
    with pytest.raises(UserError, match="is a link that leads out of the folder"):
        export(folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_to_itself_is_a_missing_file(tmp_path, configs_dir):
    folder = tmp_path / "model"
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(configs_dir / "quickstart_policy", folder, ignore=ignore)
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(ConversionError, match=r"weight files missing: model\.safetensors"):
        convert(str(folder), tmp_path / "out")


def test_links_within_a_folder_and_the_hub_cache_are_followed(tmp_path):
    repo = tmp_path / "models--some--where"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").mkdir()
    folder = make(repo / "snapshots" / "abc", weights())
    for number, name in enumerate(("model.safetensors", "config.json")):
        (folder / name).rename(repo / "blobs" / str(number))
        (folder / name).symlink_to(f"../../blobs/{number}")
    (folder / "LICENSE.txt").write_text("x")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    (tmp_path / "linked").symlink_to(folder)
    convert(str(tmp_path / "linked"), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "x"
    (tmp_path / "secret").write_text("y")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("../../../secret")
    with pytest.raises(UserError, match="LICENSE is a link"):
        convert(str(folder), tmp_path / "again")


@pytest.mark.parametrize("seed", range(6))
def test_no_flipped_byte_of_a_converted_folder_loads(tmp_path, seed):
    folder = make(tmp_path / "model", weights())
    (folder / "tokenizer.json").write_text("{}")
    convert(str(folder), tmp_path / "converted")
    convert(str(folder), tmp_path / "sound")
    load(tmp_path / "converted")
    rng = np.random.default_rng(seed)
    files = sorted(f for f in (tmp_path / "converted").rglob("*") if f.is_file())
    files = [f for f in files if f.name != "rest_jax.json" and f.stat().st_size]
    for file in rng.choice(np.asarray(files, object), 10, replace=False):
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        sound = file.read_bytes()
        file.write_bytes(content)
        for command in (
            lambda: load(tmp_path / "converted"),
            lambda: export(tmp_path / "converted", tmp_path / "converted", tmp_path / "out"),
        ):
            with pytest.raises(ConversionError, match=f"{file.name} is not what was converted"):
                command()
        file.write_bytes(sound)
    load(tmp_path / "converted")


def test_a_folder_does_not_lead_to_a_store(tmp_path):
    """Only what was fetched from a store has its parameters there."""
    convert(str(make(tmp_path / "model", weights())), tmp_path / "converted")
    (tmp_path / "converted" / "params.url").write_text("s3://bucket/params")
    load(tmp_path / "converted")


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = make(tmp_path / "model", weights())
    os.mkfifo(folder / "pipe.json")
    convert(str(folder), tmp_path / "out")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ConversionError, match=r"config\.json: no such file"):
        convert(str(folder), tmp_path / "again")
    with pytest.raises(UserError, match=r"config\.json is no file"):
        Tokenizer.load(folder)


def test_manifests_that_cannot_be_used(tmp_path):
    convert(str(make(tmp_path / "model", weights())), tmp_path / "converted")
    path = tmp_path / "converted" / "rest_jax.json"
    written = json.loads(path.read_text())
    for changes, said in (
        ({"format": 1}, "format 1, this version reads 2; convert"),
        ({"files": None}, "no files"),
        ({"tensors": []}, "no tensors"),
        ({"files": written["files"] | {"../x": [1, "0"]}}, "x is missing"),
        ({"tensors": {name: 7 for name in written["tensors"]}}, "not those of config.json"),
    ):
        path.write_text(json.dumps(written | changes))
        with pytest.raises(ConversionError, match=said):
            load(tmp_path / "converted")


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    folder = tmp_path
    for number, changes in enumerate(
        (
            {"num_hidden_layers": 10**9},
            {"vocab_size": 2 * 10**9},
            {"hidden_size": 2**30, "head_dim": 8},
            {"intermediate_size": 2**30},
            {"model_type": "qwen3_moe", "head_dim": 8, "moe_intermediate_size": 4}
            | {"num_experts": 10**9, "num_experts_per_tok": 2},
        )
    ):
        folder = make(tmp_path / str(number), weights(), **changes)
        with pytest.raises(ConversionError) as caught:
            load(folder)
        assert len(str(caught.value)) < 3000
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConversionError, match="not JSON"):
        load(folder)
