"""Parity with transformers in both directions, bit-exact round trips, and refusals that name what is wrong."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding

from rest_jax.config import MeshConfig
from rest_jax.distributed import make_mesh
from rest_jax.errors import UserError
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import Decoder, init_params, logits
from rest_jax.models.hf import write
from rest_jax.models.hf.config import ConversionError, decoder_config
from rest_jax.models.hf.folder import scan
from rest_jax.models.hf.read import load_model
from rest_jax.models.hf.table import table
from rest_jax.models.hf.write import convert, export
from rest_jax.models.presets import PRESETS, preset

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, TIME = 96, 600
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # small, so that all three frequency bands occur with 8 dimensions
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
EXPERTS = {
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
CASES = {
    "qwen3-tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama3-untied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-tied": (
        "Qwen3Moe",
        {**EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "llama-tied": ("Llama", {"head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
}


def make_torch(case, seed=0):
    """A random HF model whose biases and norms are not at their trivial start."""
    name, extra = CASES[case]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SMALL, **extra)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in key else 0.15 * noise)
    return model


def save_torch(model, folder, max_shard_size="5GB"):
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64))).logits.float().numpy()


def our_logits(cfg, params, tokens):
    layout, positions = prompt_rows(tokens, jnp.full(len(tokens), tokens.shape[1]))
    hidden, _ = jax.jit(Decoder(cfg).apply)({"params": params}, tokens, positions, layout)
    return np.asarray(logits(params, cfg, hidden))


def read_on_host(folder):
    """Sizes and float32 parameters on the first CPU device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return load_model(str(folder), mesh, jnp.float32, "none")[:2]


def some_tokens():
    return jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, (2, TIME)), jnp.int32)


def tensors(folder):
    return {name: stored.read() for name, stored in scan(folder).items()}


def assert_same_tensors(first, second):
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved model a case."""
    root = tmp_path_factory.mktemp("hf")
    return {case: save_torch(make_torch(case), root / case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_parity_both_ways(case, folders, tmp_path):
    tokens = some_tokens()
    model = make_torch(case)
    cfg, params = read_on_host(folders[case])
    expected = torch_logits(model, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(our_logits(cfg, params, tokens), expected, atol=1e-4)

    rng = np.random.default_rng(7)
    ours = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), params)
    export(ours, folders[case], tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    np.testing.assert_allclose(torch_logits(back, tokens), our_logits(cfg, ours, tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("qwen3-tied", "bfloat16"),
        ("qwen2-tied", "float16"),
        ("llama3-untied", "float32"),
        ("qwen3-moe", "bfloat16"),
    ],
)
def test_export_of_convert_is_bit_exact(case, dtype, tmp_path, monkeypatch):
    model = make_torch(case).to(getattr(torch, dtype))
    source = save_torch(model, tmp_path / "source", max_shard_size="30KB")
    assert (source / "model.safetensors.index.json").is_file()
    convert(str(source), tmp_path / "converted")
    monkeypatch.setattr(write, "MAX_SHARD_BYTES", 20_000)
    export(tmp_path / "converted", tmp_path / "converted", tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_mixed_dtypes_and_a_stored_tied_head_survive(folders, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((folders["qwen3-tied"] / "config.json").read_text())
    mixed = {}
    for name, x in tensors(folders["qwen3-tied"]).items():
        kind = (
            np.float32 if "norm" in name else np.float16 if "layers.1.mlp" in name else jnp.bfloat16
        )
        mixed[name] = x.astype(kind)
    mixed["lm_head.weight"] = mixed["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "converted", tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")

    mixed["lm_head.weight"][3, 3] += 1
    safetensors.numpy.save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs"):
        read_on_host(source)


def test_side_files_travel(folders, tmp_path):
    source = tmp_path / "source"
    make_torch("qwen2-tied").save_pretrained(source)
    side = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": [1, 2]}',
        "merges.txt": "a b\n",
        "LICENSE": "some",
    }
    for name, text in side.items():
        (source / name).write_text(text)
    (source / "notes.md").write_text("stays behind")
    convert(str(source), tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "converted", tmp_path / "out", dtype="bfloat16")
    for name, text in side.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "notes.md").exists()
    assert not (tmp_path / "out" / "rest_jax.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {stored.dtype for stored in scan(tmp_path / "out").values()} == {"BF16"}


@pytest.mark.parametrize("converted", [False, True])
def test_load_model_is_sharded_and_equal(converted, folders, tmp_path):
    source = folders["qwen3-untied"]
    on_host = read_on_host(source)[1]
    if converted:
        convert(str(source), tmp_path / "converted")
        source = tmp_path / "converted"
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    cfg, params, files = load_model(str(source), mesh, jnp.bfloat16, "dots")
    assert cfg.dtype == jnp.bfloat16 and cfg.remat == "dots" and files == source
    assert jax.tree.structure(params) == jax.tree.structure(on_host)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(on_host), strict=True):
        assert a.dtype == jnp.float32 and isinstance(a.sharding, NamedSharding)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    q = params["blocks"]["attention"]["q"]
    assert q.addressable_shards[0].data.shape == (2, 16, 2, 8)


def test_experts_are_read_where_they_belong(folders):
    """Each device reads the tensors of its own experts alone."""
    on_host = read_on_host(folders["qwen3-moe"])[1]
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    _, params, _ = load_model(str(folders["qwen3-moe"]), mesh, jnp.float32, "none")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(on_host), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    mlp = params["blocks"]["mlp"]
    assert mlp["gate"].addressable_shards[0].data.shape == (2, 3, 16, 12)
    assert mlp["down"].addressable_shards[0].data.shape == (2, 3, 12, 16)
    assert mlp["router"].addressable_shards[0].data.shape == (2, 8, 6)


def test_published_files_have_one_tensor_an_expert(folders):
    """So has what transformers writes, although it keeps the experts of a layer together."""
    names = scan(folders["qwen3-moe"]).keys()
    assert {f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(6)} <= names
    assert "model.layers.0.mlp.gate.weight" in names
    raw = json.loads((folders["qwen3-moe"] / "config.json").read_text())
    count = raw.pop("num_local_experts", None) or raw.pop("num_experts")
    for key in ("num_experts", "num_local_experts"):
        assert decoder_config({**raw, key: count}).n_experts == 6


def test_every_parameter_has_a_row_in_the_table():
    small = {"vocab_size": 8, "d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    for case in map(preset, PRESETS):
        tiny = dataclasses.replace(case, **small, head_dim=2, d_ff=4)
        shapes = jax.eval_shape(lambda c=tiny: init_params(c, jax.random.key(0)))
        ours = {
            tuple(k.key for k in path): x.shape
            for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        }
        assert ours == {spec.path: spec.shape for spec in table(tiny)}


def test_every_fault_is_named(folders, tmp_path):
    good = tensors(folders["qwen3-untied"])
    bad = dict(good)
    del bad["model.norm.weight"]
    bad["model.layers.7.extra.weight"] = np.zeros(3, np.float32)
    bad["lm_head.weight"] = good["lm_head.weight"][:-1]
    bad["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    (tmp_path / "config.json").write_text((folders["qwen3-untied"] / "config.json").read_text())
    safetensors.numpy.save_file(bad, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert(str(tmp_path), tmp_path / "out")
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "missing tensors: model.norm.weight",
        "unknown tensors: model.layers.7.extra.weight",
    ):
        assert part in text
    assert "lm_head.weight has shape (95, 32), needs (96, 32)" in text
    assert "model.layers.0.mlp.up_proj.weight is I8" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_folders_that_cannot_be_used(folders, tmp_path):
    with pytest.raises(ConversionError, match="no such folder, and not a hub id"):
        load_model("nowhere", make_mesh(MeshConfig(), jax.devices()[:1]), jnp.float32, "none")
    with pytest.raises(ConversionError, match=r"config\.json: no such file"):
        read_on_host(tmp_path)
    (tmp_path / "config.json").write_text((folders["llama-tied"] / "config.json").read_text())
    with pytest.raises(ConversionError, match=r"weight files missing: model\.safetensors"):
        read_on_host(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ConversionError, match="not a readable safetensors file"):
        read_on_host(tmp_path)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(str(folders["llama-tied"]), tmp_path)
    convert(str(folders["llama-tied"]), tmp_path / "converted")
    with pytest.raises(ConversionError, match="already a converted folder"):
        convert(str(tmp_path / "converted"), tmp_path / "again")
    with pytest.raises(ConversionError, match="export dtype 'int8'"):
        export(tmp_path / "converted", tmp_path / "converted", tmp_path / "out", dtype="int8")
    for file in (tmp_path / "converted" / "params").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    with pytest.raises(ConversionError, match="not a readable checkpoint"):
        export(tmp_path / "converted", tmp_path / "converted", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_side_files_without_weights_name_the_dtype_themselves(folders, tmp_path):
    """What a run keeps: config.json alone; its dtype is the export's."""
    files = tmp_path / "files"
    files.mkdir()
    raw = json.loads((folders["qwen3-tied"] / "config.json").read_text())
    (files / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
    params = read_on_host(folders["qwen3-tied"])[1]
    export(params, files, tmp_path / "out")
    assert {stored.dtype for stored in scan(tmp_path / "out").values()} == {"BF16"}
    (files / "config.json").write_text(json.dumps(raw | {"dtype": "float64"}))
    with pytest.raises(ConversionError, match="export dtype 'float64'; known: float32"):
        export(params, files, tmp_path / "again")
    del params["embed"]
    with pytest.raises(ConversionError, match="parameter embed is missing"):
        export(params, folders["qwen3-tied"], tmp_path / "again")


@pytest.mark.parametrize("keys", [["torch_dtype"], ["dtype"], ["torch_dtype", "dtype"], []])
def test_the_dtype_of_an_export_is_told_wherever_a_reader_looks(folders, tmp_path, keys):
    source = folders["llama-tied"]
    raw = json.loads((source / "config.json").read_text())
    others = {key: value for key, value in raw.items() if key not in ("torch_dtype", "dtype")}
    files = shutil.copytree(source, tmp_path / "files")
    (files / "config.json").write_text(json.dumps(others | dict.fromkeys(keys, "float32")))
    export(files, files, tmp_path / "out", dtype="bfloat16")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == others | dict.fromkeys(keys or ["dtype"], "bfloat16")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_unreachable_hub_is_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(hub_id, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ConversionError, match=r"model some/where: .*hub did not give it \(no connection\)"
    ):
        convert("some/where", "unused")


def test_a_misspelt_folder_is_told_the_nearest(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(hub_id, **_):
        raise huggingface_hub.errors.HFValidationError("no repository id")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConversionError,
        match=r"model runs/quikstart: no such folder \(nearest: runs/quickstart\), and",
    ):
        convert("runs/quikstart", "unused")


def test_failed_write_leaves_nothing(folders, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(write, "lay_out", full)
    with pytest.raises(OSError, match="disk full"):
        export(folders["llama-tied"], folders["llama-tied"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


BASE = {**SMALL, "model_type": "llama"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"model_type": "gemma3"},
            "'gemma3' is not supported; known: qwen3, qwen3_moe, qwen2, llama",
        ),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"model_type": "qwen3"}, "head_dim is missing"),
        ({"model_type": "qwen3_moe", "head_dim": 8}, "moe_intermediate_size is None"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ],
)
def test_unsupported_configs_are_named(change, named):
    with pytest.raises(ConversionError) as caught:
        decoder_config({**BASE, **change})
    assert named in str(caught.value)


def test_old_and_new_rope_spellings_agree():
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = decoder_config({**BASE, "rope_theta": 500.0, "rope_scaling": scaling})
    new = decoder_config({**BASE, "rope_parameters": LLAMA3_ROPE})
    assert old == new and new.rope_theta == 500.0 and new.rope_scaling is not None
