"""Turns text into token ids and ids into text, and knows the bytes of every single id.

In: a Hugging Face tokenizer folder or hub id. Out: int32 id arrays for prompts, and for generated ids their exact bytes
(`bytes_of`) and byte counts (`piece_lengths`), from a table made once. Regions and rewards are computed from these bytes, so
text is derived from ids and never tokenised again. How a turn ends, and whether a prompt opens the thought, is read off what
the chat template writes. transformers is imported on first use.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from rest_jax.errors import UserError
from rest_jax.files import check_links
from rest_jax.models import chat_sandbox
from rest_jax.texts import warn

Message = Mapping[str, str]  # {"role": ..., "content": ...}

# What a template that asks for the date is told; Llama 3's falls back on it.
DATE = datetime.date(2024, 7, 26)
# What of it would be other words under another locale, or another number in another time zone.
_DATE_WORDS = {
    "%a": "Fri",
    "%A": "Friday",
    "%b": "Jul",
    "%B": "July",
    "%c": "Fri Jul 26 00:00:00 2024",
    "%h": "Jul",
    "%p": "AM",
    "%P": "am",
    "%r": "12:00:00 AM",
    "%s": "1721952000",
    "%x": "07/26/24",
    "%X": "00:00:00",
}
_MAX_FORMAT = 1000  # characters; the C library pads to widths, in up to 256 for each

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space as this

# Stands for a control token in a text that quotes it; small letters pass through JSON and chat templates.
_MASK = "qquotedcontroltokenq{}q"
_masked = re.compile(_MASK.format(r"(\d{1,9})"))
_looks_like_control = re.compile(r"[<\[].*[>\]]", re.DOTALL).fullmatch
_MAX_IDS = 2**24
_MAX_TEMPLATE = 2**17  # characters; the largest published ones have 30,000

# Bytes of what transformers reads of a folder, all at once; a tokenizer.json of 262,144 words (Gemma 3) has 33 million.
_MAX_BYTES = {
    "*.jinja": 2**20,
    "additional_chat_templates/*.jinja": 2**20,
    "*config.json": 2**26,
    "special_tokens_map.json": 2**26,
    "added_tokens.json": 2**26,
    "chat_template.json": 2**26,
    "tokenizer*.json": 2**27,
    "tekken.json": 2**27,
    "vocab.*": 2**27,
    "merges.txt": 2**27,
    "*.model": 2**27,
    "*.tiktoken": 2**27,
}

# What of a folder is its tokenizer's, chat templates among it.
_FILES = tuple(pattern for pattern in _MAX_BYTES if pattern != "*config.json")
_GENERATION = "generation_config.json"

# A tokenizer.json has regular expressions and replacements, which may take for ever or fill the memory, in a library that no
# signal stops. So it is first tried in another process, on runs of letters that make bad ones slow.
_TRIAL_SECONDS, _TRIAL_BYTES = 30, 2**32
_TRIAL = r"""
import resource, sys
file, seconds, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import tokenizers
texts = [run * 500 for run in ("x", "1", " ", "\n", ".", "é", "Ab 1,", "<x>")]
tokenizer = tokenizers.Tokenizer.from_file(file)
tokenizer.encode_batch(texts)
print(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1))
"""

# What a tokenizer should give back.
_LETTERS = 'Ab 1,  {"x": [-2.5, "é中"]}'

_tried: set[bytes] = set()  # digests

# What a chat template is given to show what it makes of it.
_PROBE = "qProbeq"
_QUESTION = ({"role": "user", "content": _PROBE},)
_ANSWER = "qAnswerq"
_PROBE_TOOL = "probe_of_tools"


class TokenizerError(UserError):
    """A tokenizer that cannot be loaded or used; the text is one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer and its byte table. Make it with `Tokenizer.load`."""

    source: str
    hf: Any  # transformers.PreTrainedTokenizerFast
    pieces: tuple[bytes, ...]  # bytes of each id; empty beyond the tokenizer's own words
    piece_lengths: np.ndarray  # int32 [V], bytes of each id
    pad_id: int
    stop_ids: tuple[int, ...]  # ids that end a turn, ascending
    end_id: int  # the one that ends supervised answers: as the chat template ends a turn, else the tokenizer's eos

    @classmethod
    def load(cls, source: str | pathlib.Path, vocab_size: int | None = None) -> "Tokenizer":
        """Loads a folder or hub id.

        `vocab_size` is the model's vocabulary when it is padded beyond the tokenizer: the ids in between have no bytes.
        Raises TokenizerError in one line when nothing usable is at `source` or the vocabulary is larger than `vocab_size`.
        """
        hf = _load_hf(str(source))
        pieces = byte_table(hf)
        if vocab_size is not None:
            if len(pieces) > vocab_size:
                raise TokenizerError(
                    f"tokenizer {source}: {len(pieces)} words, but the model's vocab_size is {vocab_size}: ids above it "
                    "have no embedding; name the model's own tokenizer (model.tokenizer), or enlarge the model's matrix "
                    "(transformers: resize_token_embeddings)"
                )
            pieces += [b""] * (vocab_size - len(pieces))
        written = _behind_answer(hf)
        end_id = _end_of_turn(hf, written)
        stop_ids = _stop_ids(str(source), hf, end_id)
        if end_id is None:
            end_id = stop_ids[0] if hf.eos_token_id is None else int(hf.eos_token_id)
            if written:
                said = f"tokenizer {source}: its chat template ends turns with {written[:40]!r}, which is no added token"
                ended = hf.convert_ids_to_tokens(end_id)
                warn(
                    f"{said}: answers end with {ended!r}, unlike the turns before; "
                    f"write {ended!r} there in the template, or add the text as a token"
                )
        elif hf.eos_token_id is not None and end_id != hf.eos_token_id:
            said = f"tokenizer {source}: its eos is {hf.eos_token!r}, its chat template ends turns with"
            ended = hf.convert_ids_to_tokens(end_id)
            warn(f"{said} {ended!r}: turns end with that")
        made = cls(
            source=str(source),
            hf=hf,
            pieces=tuple(pieces),
            piece_lengths=np.fromiter(map(len, pieces), np.int32, len(pieces)),
            pad_id=stop_ids[0] if hf.pad_token_id is None else int(hf.pad_token_id),
            stop_ids=stop_ids,
            end_id=end_id,
        )
        said = made.text(
            made.encode_all([_LETTERS])[0]
        ).strip()  # SentencePiece puts a space before
        if said != _LETTERS:
            warn(
                f"tokenizer {source}: {_LETTERS!r} comes back as {said!r}: what it loses can neither be learned nor sampled"
            )
        return made

    def write_files(self, folder: pathlib.Path) -> None:
        """Puts its files, chat templates among them, into a model folder in the place of another tokenizer's: as they are, or, of
        a hub id, as transformers writes them; and its ids into generation_config.json. UserError for links that lead out of its
        own folder, and where the config.json that is there makes another tokenizer of the files.
        """
        for file in _files_of(folder):
            file.unlink()
        own = pathlib.Path(self.source)
        if own.is_dir():
            check_links(own)
            for file in _files_of(own):
                target = folder / file.relative_to(own)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        else:
            self.hf.save_pretrained(folder)
        for name, text in self.generation_config(folder, own=False).items():
            (folder / name).write_text(text, encoding="utf-8")
        if other := self._differences(folder):
            kind = getattr(_kind_of_model(folder / "config.json"), "model_type", "other")
            raise TokenizerError(
                f"tokenizer {self.source}: in the folder of a {kind} model transformers reads it {other}: nobody could use "
                "the run as it was trained; leave model.tokenizer out, or name one made for this kind of model"
            )

    def _differences(self, folder: pathlib.Path) -> str:
        """With what that decides the ids of a chat the files of this tokenizer are read in a model folder, as it is not here; ""
        when all is the same. The config.json there tells transformers the class, and some put their own in the files' place.
        """
        try:
            hf = _load_hf(str(folder))
        except TokenizerError as error:
            return f"not at all ({str(error).removeprefix(f'tokenizer {folder}: ')})"
        # A class may have some that the files do not name; no chat template writes these two.
        own = self.hf.special_tokens_map.items()
        own = {name: token for name, token in own if name not in ("pad_token", "unk_token")}
        stop_ids = _stop_ids(str(folder), hf, _end_of_turn(hf, _behind_answer(hf)))
        same = {
            "other pieces or words": _backend_state(hf) == _backend_state(self.hf),
            "another chat template": hf.chat_template == self.hf.chat_template,
            "other special tokens": hf.special_tokens_map == hf.special_tokens_map | own,
            "other ids that end a turn": stop_ids == self.stop_ids,
        }
        other = ", ".join(what for what, is_same in same.items() if not is_same)
        return other and f"with {other}"

    def generation_config(self, folder: pathlib.Path, own: bool = True) -> dict[str, str]:
        """The generation_config.json of a model folder with `stop_ids` as its eos ids, other keys kept, as a text by the name of
        the file; empty where it tells them already. By these transformers and vLLM end a text, and not by the chat template.
        Where the tokenizer is not the model's `own`, the ids of beginning and padding are not kept either.
        """
        file = folder / _GENERATION
        found = _read_generation(file) if file.is_file() else {}
        found = found if isinstance(found, dict) else {}
        told = set(_eos_ids(found) or ()) == set(self.stop_ids)
        ids = {} if told else {"eos_token_id": list(self.stop_ids)}
        if not own:
            others = {"bos_token_id": self.hf.bos_token_id, "pad_token_id": self.pad_id}
            ids |= {key: i for key, i in others.items() if key in found}
        made = found | ids
        return {} if made == found else {_GENERATION: json.dumps(made, indent=2) + "\n"}

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding of the model's vocabulary included."""
        return len(self.pieces)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids represent, special tokens as their own text. IndexError for ids outside the vocabulary."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join(map(self.pieces.__getitem__, ids))

    def text(self, ids: Iterable[int]) -> str:
        """`bytes_of` as text; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def encode(self, text: str) -> np.ndarray:
        """int32 [T]: the ids of a text; no beginning or end token is added, added tokens in the text are recognised."""
        with _one_line(self.source, "cannot encode a text"):
            return np.asarray(_encode(self.hf, text), np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, on all cores; what `mask` has replaced is encoded as plain text."""
        if not texts:
            return []
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        with _one_line(self.source, "cannot encode a text"):
            ids = self.hf(list(texts), add_special_tokens=False, **options)["input_ids"]
            for i, text in enumerate(texts):
                if _masked.search(text):
                    ids[i] = self._encode_masked(text)
        return [np.asarray(row, np.int32) for row in ids]

    def mask(self, value: Any, keep: Collection[str] = ()) -> Any:
        """A JSON value of data, with marks in place of the control tokens that its texts quote, but for those to `keep`.

        Rendered and given to `encode_all` it becomes the ids of plain text: only what templates write is a control token.
        """
        if isinstance(value, str):
            return self._control_text.sub(
                lambda found: found[0] if found[0] in keep else self._marks[found[0]], value
            )
        if isinstance(value, Mapping):
            return {self.mask(key, keep): self.mask(inner, keep) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.mask(inner, keep) for inner in value)
        return value

    def unmask(self, text: str) -> str:
        """A text of masked values as it reads."""
        return _masked.sub(lambda found: self._control.get(int(found[1]), found[0]), text)

    @functools.cached_property
    def thought_open(self) -> bool:
        """Whether prompts end in an opened thought (Qwen3-Thinking-2507, R1 distillates), also one with words in it already:
        completions begin within it.
        """
        # What is before the question may speak of the tags.
        behind = _probe(self.hf, _QUESTION).rpartition(_PROBE)[2]
        return behind.rfind("<think>") > behind.rfind("</think>")

    def _encode_masked(self, text: str) -> list[int]:
        """Ids of a text with marks; what is between two control tokens of the template is one plain text."""
        encoding = self.hf.backend_tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        start = count = 0  # where the plain text begins, and its ids so far
        for i, (first, last) in zip(
            [*encoding.ids, -1], [*encoding.offsets, (len(text), len(text))], strict=True
        ):
            if i >= 0 and i not in self._control:
                ids.append(i)
                count += 1
                continue
            piece = text[start:first]
            if _masked.search(piece):
                quoted = self._plain.encode(self.unmask(piece), add_special_tokens=False)
                ids[len(ids) - count :] = quoted.ids
            if i >= 0:
                ids.append(i)
            start, count = last, 0
        return ids

    @functools.cached_property
    def _control(self) -> dict[int, str]:
        """Added tokens that steer: the special ones, and tags. Runs of spaces and the like are text."""
        added = self.hf.backend_tokenizer.get_added_tokens_decoder()
        return {
            i: token.content
            for i, token in added.items()
            if token.special or _looks_like_control(token.content)
        }

    @functools.cached_property
    def _marks(self) -> dict[str, str]:
        return {content: _MASK.format(i) for i, content in self._control.items()}

    @functools.cached_property
    def _control_text(self) -> re.Pattern[str]:
        longest_first = sorted(self._marks, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @functools.cached_property
    def _plain(self) -> Any:
        """The tokenizer without its control tokens."""
        from tokenizers import Tokenizer as Backend

        state = json.loads(self.hf.backend_tokenizer.to_str())
        added = [token for token in state["added_tokens"] if token["id"] not in self._control]
        state |= {"added_tokens": added, "post_processor": None}
        return Backend.from_str(json.dumps(state))

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [T]: the ids of `render_prompt`."""
        return self.encode(self.render_prompt(messages))

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The chat through the tokenizer's own template, up to where the assistant starts to write; `tools` are for it to list.

        A template that asks for the date (Llama 3.x) is told a fixed one: prompts of tomorrow are those of today. TemplateError
        for whatever the template raises, and for a chat that takes it too much time or space.
        """
        if not self.hf.chat_template:
            raise TokenizerError(
                f"tokenizer {self.source}: no chat template; add chat_template.jinja to its folder "
                "(or use the instruction-tuned model's tokenizer)"
            )
        return _render(self.hf, messages, tools)

    def lists_tools(self, request: str | None) -> bool:
        """Whether the chat template lists the tools that it is given, and asks for calls in these words."""
        if request is None:
            return False
        tool = {"type": "function", "function": {"name": _PROBE_TOOL, "parameters": {}}}
        text = _probe(self.hf, _QUESTION, [tool])
        return request in text and _PROBE_TOOL in text

    def digest(self) -> str:
        """SHA-256, in hex, of all that decides which ids a chat has, the date it is told among it."""
        hf = self.hf
        content = (
            hf.backend_tokenizer.to_str(),
            hf.chat_template,
            DATE.isoformat(),
            hf.special_tokens_map,
            self.end_id,
        )
        return hashlib.sha256(repr(content).encode()).hexdigest()


def byte_table(hf: Any) -> list[bytes]:
    """Bytes of every id of a fast tokenizer, by the alphabet its decoder declares.

    Byte-level BPE (GPT-2's 256 characters), SentencePiece with byte fallback (U+2581 is a space, <0xNN> one
    byte); an added token is its own text. TokenizerError for any other kind, because its bytes are not known.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"tokenizer {hf.name_or_path}: no fast (tokenizer.json) version")
    kinds = _decoder_kinds(backend)
    if "ByteLevel" in kinds:
        byte_of = {letter: byte for byte, letter in byte_alphabet().items()}

        def to_bytes(word: str) -> bytes:
            return bytes([byte_of[c] for c in word])
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        to_bytes = _sentencepiece_bytes
    else:
        raise TokenizerError(
            f"tokenizer {hf.name_or_path}: decoder {sorted(kinds) or 'none'} is neither byte-level nor SentencePiece"
        )
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    vocab = backend.get_vocab(with_added_tokens=True)
    last = max(vocab.values(), default=-1)
    _check_last(hf.name_or_path, last)
    table = [b""] * (last + 1)
    for word, i in vocab.items():
        if i not in added:
            try:
                table[i] = to_bytes(word)
            except KeyError:  # some converters keep special words verbatim
                table[i] = word.encode()
    for i, content in added.items():
        table[i] = content.encode()
    return table


def _check_last(source: str | pathlib.Path, last: int) -> None:
    """TokenizerError for an id so large that a table of all would fill the memory."""
    if last >= _MAX_IDS:
        raise TokenizerError(
            f"tokenizer {source}: an id of {last:,}; more than {_MAX_IDS:,} ids are not read"
        )


def byte_alphabet() -> dict[int, str]:
    """GPT-2's byte alphabet: printable Latin-1 bytes as themselves, the 68 others as U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}


def _sentencepiece_bytes(word: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(word)
    return bytes([int(byte[1], 16)]) if byte else word.replace(_SPACE, " ").encode()


def _decoder_kinds(backend: Any) -> set[str]:
    """Names of the decoder's stages, e.g. {"ByteLevel"}."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    stages = state.get("decoders", [state])
    return {stage["type"] for stage in stages}


def _backend_state(hf: Any) -> dict[str, Any]:
    """What of a tokenizer.json decides ids and bytes; an absent value and an empty one of its model are the same."""
    state = json.loads(hf.backend_tokenizer.to_str())
    model = {key: value for key, value in state["model"].items() if value}
    kept = ("normalizer", "pre_tokenizer", "decoder", "added_tokens")
    return {"model": model} | {key: state[key] for key in kept}


def _files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of the tokenizer in a model folder."""
    found = {file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def _load_hf(source: str) -> Any:
    import transformers

    path = pathlib.Path(source)
    if path.exists() and not path.is_dir():
        raise TokenizerError(f"tokenizer {source}: a folder or hub id is needed, this is a file")
    if not path.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise TokenizerError(f"tokenizer {source}: no such folder")
    check_links(path)
    for pattern, most in _MAX_BYTES.items():
        for file in path.glob(pattern):
            _check_file(source, file, most)
    chat_sandbox.install()
    with _one_line(source, "cannot be loaded"):
        if file := _file_of(source, "tokenizer.json"):
            _try_out(file)
        hf = transformers.AutoTokenizer.from_pretrained(
            source, config=_kind_of_model(path / "config.json"), trust_remote_code=False
        )
        _encode(hf, "x")  # some wrong values are noticed only now
        return hf


@contextlib.contextmanager
def _one_line(source: str, what: str) -> Iterator[None]:
    """Whatever fails within the block is a TokenizerError: tokenizers raises bare Exceptions, and panics that are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TokenizerError(f"tokenizer {source}: {what}: {reason}") from error


def _try_out(file: pathlib.Path) -> None:
    """TokenizerError for a tokenizer.json that takes too long or too much memory, here or in transformers, which looks at every
    id up to the last; a content is tried once. What else is wrong with it is seen when it is loaded.
    """
    digest = hashlib.sha256(file.read_bytes()).digest()
    if digest in _tried:
        return
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"}
    limits = (str(_TRIAL_SECONDS), str(_TRIAL_BYTES))
    command = [sys.executable, "-c", _TRIAL, str(file), *limits]
    timeout = 10 * _TRIAL_SECONDS
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=timeout)
        failed = done.returncode < 0 or b"PanicException" in done.stderr
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise TokenizerError(
            f"tokenizer {file.parent}: cannot be loaded: tokenizer.json fails on a few thousand letters, or needs more than "
            f"{_TRIAL_SECONDS} s or {_TRIAL_BYTES / 2**30:g} GiB for them"
        )
    if done.returncode == 0:
        _check_last(file.parent, int(done.stdout))
    _tried.add(digest)


def _encode(hf: Any, text: str) -> list[int]:
    # Without its warnings: lengths are checked against the model, not the tokenizer.
    return hf.encode(text, add_special_tokens=False, verbose=False)


def _kind_of_model(file: pathlib.Path) -> Any:
    """transformers' record of a config.json with what tells the class of the tokenizer, else None. Its other values may be null
    where a default is meant, which transformers does not read, or sizes of which it makes lists.
    """
    from transformers import AutoConfig

    with contextlib.suppress(Exception):  # the tokenizer's own error says what is wrong
        raw = json.loads(file.read_bytes() if file.is_file() else "{}")
        return AutoConfig.for_model(
            **{k: raw[k] for k in ("model_type", "tokenizer_class") if k in raw}
        )
    return None


def date_text(format: str) -> str:
    """DATE in a format of strftime's. TemplateLimitError for one that is too long."""
    if len(format) > _MAX_FORMAT:
        raise chat_sandbox.TemplateLimitError(
            f"the chat template writes a date in a format of {len(format):,} characters, more than {_MAX_FORMAT:,}"
        )
    known = re.sub("%.", lambda found: _DATE_WORDS.get(found[0], found[0]), format)
    return DATE.strftime(known)


def _render(
    hf: Any, messages: Sequence[Message], tools: Sequence[Any] = (), prompt: bool = True
) -> str:
    """A chat through the tokenizer's template at a fixed date, with `prompt` up to where the assistant starts to write.

    TemplateLimitError when the template takes too much time or space; TemplateError for whatever else it raises: it is a program,
    and fails with errors of any class.
    """
    given = list(tools) or None
    try:
        with chat_sandbox.rendering(date_text):
            template = hf.get_chat_template(tools=given)
            if len(template) > _MAX_TEMPLATE:
                raise chat_sandbox.TemplateLimitError(
                    f"the chat template has {len(template):,} characters, more than {_MAX_TEMPLATE:,}"
                )
            return hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=given,
                add_generation_prompt=prompt,
                tokenize=False,
                chat_template=template,
            )
    except jinja2.TemplateError:
        raise
    except Exception as error:
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error


def _probe(
    hf: Any, messages: Sequence[Message], tools: Sequence[Any] = (), prompt: bool = True
) -> str:
    """What the chat template makes of a chat, "" where it cannot. TokenizerError where this takes it too much: such a template is
    of no use to any chat.
    """
    try:
        return _render(hf, messages, tools, prompt) if hf.chat_template else ""
    except chat_sandbox.TemplateLimitError as error:
        raise TokenizerError(f"tokenizer {hf.name_or_path}: {error}") from error
    except jinja2.TemplateError:
        return ""


def _behind_answer(hf: Any) -> str:
    """What the chat template writes behind an assistant's last turn, "" where it writes nothing or not the turn."""
    chat = (*_QUESTION, {"role": "assistant", "content": _ANSWER})
    _, answer, behind = _probe(hf, chat, prompt=False).rpartition(_ANSWER)
    return behind.strip() if answer else ""


def _end_of_turn(hf: Any, written: str) -> int | None:
    """The id of the added token by which the chat template ends an assistant's turn; None where it writes none."""
    added = hf.backend_tokenizer.get_added_tokens_decoder()
    ends = {token.content: i for i, token in added.items() if written.startswith(token.content)}
    return ends[max(ends, key=len)] if ends else None


def _stop_ids(source: str, hf: Any, end_id: int | None) -> tuple[int, ...]:
    """The eos ids of generation_config.json and of the tokenizer, and the chat template's end of turn, together."""
    stop_ids = {int(i) for i in (hf.eos_token_id, end_id) if i is not None}
    stop_ids.update(_generation_eos(source))
    if not stop_ids:
        raise TokenizerError(
            f"tokenizer {source}: no end-of-turn id; set eos_token in tokenizer_config.json "
            "or eos_token_id in generation_config.json"
        )
    return tuple(sorted(stop_ids))


def _file_of(source: str, name: str) -> pathlib.Path | None:
    """A file of a folder or hub id, None where there is none. OSError when the hub is out of reach and it is not in the cache."""
    from transformers.utils.hub import cached_file

    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    _check_file(source, pathlib.Path(path), _MAX_BYTES["tokenizer*.json"])
    return pathlib.Path(path)


def _check_file(source: str, file: pathlib.Path, most: int) -> None:
    """TokenizerError for what is larger than any such file, or is none: a pipe would be waited for."""
    if file.exists() and not file.is_file():
        raise TokenizerError(f"tokenizer {source}: {file.name} is no file; put one in its place")
    if file.exists() and (size := file.stat().st_size) > most:
        raise TokenizerError(
            f"tokenizer {source}: {file.name}: {size:,} bytes, more than {most:,}; put the model's own in its place"
        )


def _generation_eos(source: str) -> list[int]:
    """The eos ids of generation_config.json, the only thing that is needed of it; a warning when it cannot tell them."""
    path = None
    with contextlib.suppress(OSError):
        path = _file_of(source, _GENERATION)
    if path is None:
        return []
    found = _read_generation(path)
    if isinstance(found, dict):
        if (ids := _eos_ids(found)) is not None:
            return ids
        fault = f"eos_token_id {str(found['eos_token_id'])[:100]!r} is no id and no list of ids"
    else:
        fault = f"not a JSON object ({found})"
    warn(f"{source}/{_GENERATION}: {fault}; its eos ids are unknown")
    return []


def _read_generation(path: pathlib.Path) -> dict[str, Any] | str:
    """The JSON object of a generation_config.json, or what is wrong with it."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        return " ".join(str(error).split())[:100]
    return found if isinstance(found, dict) else type(found).__name__


def _eos_ids(found: Mapping[str, Any]) -> list[int] | None:
    """The eos ids of a generation_config.json; None for what is no id and no list of ids."""
    eos = found.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return eos if all(type(i) is int and 0 <= i < _MAX_IDS for i in eos) else None
