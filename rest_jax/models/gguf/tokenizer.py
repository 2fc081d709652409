"""The tokenizer of a GGUF file as a Hugging Face folder has it: tokenizer.json, its config, the chat template, the eos ids.

Byte-level BPE only. How a text is cut into pieces before merging is not in the file: it names a pre-tokenizer, whose
expressions are those of the models' published tokenizer.json (llama.cpp has them as code, in src/llama-vocab.cpp).
"""

import dataclasses
import pathlib
import re
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from rest_jax.models.gguf.file import GgufFile, shown
from rest_jax.models.hf.folder import write_json

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type
_PREFIX = "tokenizer.ggml."
# ids that end a turn: of the text, of a turn, of a message
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> PreTokenizer:
    pieces = Split(Regex(_WORDS.format(digits=digits)), "isolated")
    return Sequence([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A pre-tokenizer and what goes with it."""

    pieces: PreTokenizer
    composes: bool = False  # letters and their accents are brought together first (NFC)
    whole_words: bool = False  # a piece that is a word is not merged
    adds_bos: bool = False  # where the file does not say


_GPT2 = ByteLevel(add_prefix_space=False)
_LLAMA3 = _Kind(_split("{1,3}"), whole_words=True, adds_bos=True)
_KINDS = {
    "gpt-2": _Kind(_GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Kind(_split(""), composes=True),
    "smollm": _Kind(Sequence([Digits(individual_digits=True), _GPT2])),
}
# The pre-tokenizer by which transformers cuts all texts for a family, whatever its tokenizer.json says.
_OF_FAMILY = {"qwen2": "qwen2"}


def special_ids(file: GgufFile) -> dict[str, int]:
    """The bos, eos and pad ids of a config.json."""
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{ours}_token_id": _id(file, f"{theirs}_token_id") for ours, theirs in named.items()}
    return {name: i for name, i in ids.items() if i is not None}


def write(file: GgufFile, folder: pathlib.Path) -> None:
    """Writes the tokenizer of a GGUF file. ConversionError names a kind that is not supported, or what is wrong with it."""
    words = _texts(file, "tokens")
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{ours}_token": _id(file, f"{theirs}_token_id") for ours, theirs in named.items()}
    config: dict[str, Any] = {name: words[i] for name, i in ids.items() if i is not None}
    _backend(file, words, config.get("bos_token")).save(str(folder / "tokenizer.json"))
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get(
            f"{file.get('general.architecture', str)}.context_length", int
        ),
    }
    write_json(folder / "tokenizer_config.json", config)
    ends = sorted({i for i in (_id(file, name) for name in _ENDS) if i is not None})
    generation = special_ids(file) | ({"eos_token_id": ends} if ends else {})
    write_json(folder / "generation_config.json", generation)
    _write_templates(file, folder)


def _write_templates(file: GgufFile, folder: pathlib.Path) -> None:
    """The chat template, and others by their names."""
    prefix = "tokenizer.chat_template"
    for key in (key for key in file.metadata if key == prefix or key.startswith(f"{prefix}.")):
        name = key.removeprefix(prefix)[1:]
        if not re.fullmatch(r"[\w-]{0,64}", name):
            raise file.fault(f"key {shown(key)}: no name of a chat template")
        path = f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(file.get(key, str), encoding="utf-8")


def _backend(file: GgufFile, words: list[str], bos: str | None) -> Tokenizer:
    model = file.get(f"{_PREFIX}model", str)
    if model != "gpt2":
        raise file.fault(
            f"{_PREFIX}model {shown(model)} is not supported; known: gpt2 (byte-level BPE)"
        )
    pre = file.get(f"{_PREFIX}pre", str)
    if pre not in _KINDS:
        raise file.fault(f"{_PREFIX}pre {shown(pre)} is not supported; known: {', '.join(_KINDS)}")
    family = file.get("general.architecture", str)
    if (only := _OF_FAMILY.get(family, pre)) != pre:
        raise file.fault(
            f"{_PREFIX}pre {shown(pre)} is not supported for architecture {family}; known: {only}"
        )
    kind = _KINDS[pre]
    types = file.get(f"{_PREFIX}token_type", list, [1] * len(words))
    if len(types) != len(words):
        raise file.fault(
            f"{_PREFIX}token_type has {len(types)} items, there are {len(words)} tokens"
        )
    vocab = {word: i for i, word in enumerate(words)}
    if len(vocab) < len(words):
        twice = next(word for i, word in enumerate(words) if vocab[word] != i)
        raise file.fault(f"{_PREFIX}tokens has {shown(twice)} twice")
    # Rows behind the last word, which only fill the matrix up.
    used = max((i + 1 for i, kind in enumerate(types) if kind != _UNUSED), default=0)
    vocab = {word: i for word, i in vocab.items() if i < used}
    pairs = (merge.partition(" ") for merge in _texts(file, "merges"))
    merges = [(first, second) for first, _, second in pairs]
    try:
        backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind.whole_words))
    except Exception as error:  # tokenizers has no class of its own
        raise file.fault(f"{_PREFIX}merges: {' '.join(str(error).split())[:200]}") from error
    backend.normalizer = normalizers.NFC() if kind.composes else None
    backend.pre_tokenizer = kind.pieces
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(word, special=types[i] == _CONTROL, normalized=False)
        for word, i in vocab.items()
        if types[i] in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos is not None and file.get(f"{_PREFIX}add_bos_token", bool, kind.adds_bos):
        begin = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, vocab[bos])]
        )
        backend.post_processor = processors.Sequence([backend.post_processor, begin])
    return backend


def _texts(file: GgufFile, name: str) -> list[str]:
    found = file.get(f"{_PREFIX}{name}", list)
    if not found or not all(isinstance(text, str) for text in found):
        raise file.fault(f"{_PREFIX}{name} is {shown(found)}; a list of texts is needed")
    return found


def _id(file: GgufFile, name: str) -> int | None:
    key = _PREFIX + name
    if key not in file.metadata:
        return None
    found, words = file.get(key, int), len(_texts(file, "tokens"))
    if not 0 <= found < words:
        raise file.fault(f"{key} is {found}, there are {words} tokens")
    return found
