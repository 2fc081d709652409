"""Models in GGUF files: converted, they are the models that were written; what cannot be computed is named."""

import json
import math

import numpy as np
import pytest

from rest_jax import cli
from rest_jax.models.gguf.model import read_model
from rest_jax.models.hf.config import ConversionError, decoder_config
from rest_jax.models.hf.read import verify
from rest_jax.models.hf.safetensors import scan_file
from rest_jax.models.hf.write import convert, export
from rest_jax.models.tokenizer import Tokenizer
from tests.gguf_files import HEADS, WIDTH, Kind, write_gguf

MODELS = {
    "llama-Q8_0": ("llama", Kind.Q8_0, True),
    "llama-untied-F16": ("llama", Kind.F16, False),
    "qwen2-Q4_1": ("qwen2", Kind.Q4_1, True),
    "qwen3-untied-BF16": ("qwen3", Kind.BF16, False),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_converted_file_is_the_model(tmp_path, capsys, case):
    family, kind, tied = MODELS[case]
    values = write_gguf(tmp_path / "m.gguf", family, kind, tied=tied)
    assert cli.main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "made")]) == 0
    verify(tmp_path / "made")
    export(str(tmp_path / "made"), tmp_path / "made", tmp_path / "hf")
    tensors = {t.name: t.read() for t in scan_file(tmp_path / "hf" / "model.safetensors")}
    assert set(tensors) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(tensors[name].astype(np.float32), value, err_msg=name)
    cfg = decoder_config(json.loads((tmp_path / "made" / "config.json").read_text()))
    assert (cfg.family, cfg.tied, cfg.norm_eps, cfg.rope_theta) == (family, tied, 1e-5, 1e4)
    assert Tokenizer.load(tmp_path / "made", cfg.vocab_size).stop_ids == (2,)


@pytest.mark.parametrize(
    "changes",
    [
        {"general.type": "adapter"},
        {"split.count": 2},
        {"llama.expert_count": 8},
        {"llama.rope.scaling.type": "yarn"},
        {"llama.attention.sliding_window": 4096},
        {"llama.rope.dimension_count": 32},
        {"llama.block_count": 2**31},
        {"llama.attention.head_count": 0},
        {"llama.attention.head_count_kv": [2, 2]},
        {"llama.attention.head_count": "4"},
        {"llama.feed_forward_length": None},
        {"llama.context_length": 0},
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(tmp_path, changes):
    write_gguf(tmp_path / "m.gguf", changes=changes)
    named = "max_position_embeddings is 0" if "llama.context_length" in changes else str(*changes)
    with pytest.raises(ConversionError, match=named.replace(".", r"\.")):
        convert(str(tmp_path / "m.gguf"), tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"absent": ["model.embed_tokens.weight"]}, "token_embd.weight is missing"),
        ({"absent": ["model.norm.weight"]}, "missing tensors: model.norm.weight"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(WIDTH, np.float32)}}, "unknown tensors: blk.0.attn_q.bias"),
        ({"changes": {"llama.attention.head_count_kv": 4}}, "k_proj.weight has shape"),
        ({"tensors": {"rope_freqs.weight": np.full(32, 2, np.float32)}}, "another rope scaling"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "of shape (8,)"),
    ],
    ids=["no embedding", "no norm", "a bias", "another shape", "another scaling", "short factors"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, options, said):
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(ConversionError) as error:
        convert(str(tmp_path / "m.gguf"), tmp_path / "made")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_another_architecture_is_named(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", changes={"general.architecture": "gemma"})
    assert cli.main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert "general.architecture 'gemma' is not supported; known: llama, qwen2, qwen3" in error
    assert error.count("\n") == 1


def test_llama3_scaling_is_read_off_its_factors(tmp_path):
    """The factors are made as llama.cpp's converter makes them: a wavelength at a time."""
    size = WIDTH // HEADS
    factors = []
    for exponent in range(0, size, 2):
        wavelength = 2 * math.pi * 500_000 ** (exponent / size)
        if wavelength < 8192 / 4:
            factors.append(1)
        elif wavelength > 8192:
            factors.append(32)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    factors = np.asarray(factors, np.float32)
    assert len(set(factors)) > 4
    changes = {"llama.rope.freq_base": 500_000.0}
    write_gguf(tmp_path / "m.gguf", changes=changes, tensors={"rope_freqs.weight": factors})
    scaling = decoder_config(read_model(tmp_path / "m.gguf").config).rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (32, 1, 4)
