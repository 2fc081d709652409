"""Trains a small byte-level BPE and writes it as a Hugging Face tokenizer folder, chat template included.

For policies of about a million parameters, where a borrowed vocabulary would be most of the model. Digits are single words and
quotes never join letters, so that a name or a number is the same ids wherever it is copied.
"""

import pathlib
from collections.abc import Iterable

from rest_jax.errors import UserError

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template into `folder` (made if missing).

    Every byte is a word, so any text can be encoded; end of turn is <|im_end|>, padding <|endoftext|>, the tags of the
    toolrl and hermes templates are single words. Deterministic for equal texts. UserError when `vocab_size` is too small.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, START, END]
    least = 256 + len(special) + len(TAGS)
    if vocab_size < least:
        raise UserError(
            f"vocab_size {vocab_size}: at least {least} (256 bytes, {least - 256} special tokens)"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special + [AddedToken(t, special=False, normalized=False) for t in TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(_without_marks(texts), trainer)
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))


def _without_marks(texts: Iterable[str]) -> Iterable[str]:
    """The texts with control marks cut out, lest their letters be learned as words."""
    for text in texts:
        for mark in (PAD, START, END, *TAGS):
            text = text.replace(mark, "\n")
        yield text
