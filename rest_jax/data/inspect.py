"""What a file of records, or a synthetic world, holds: the command `rest-jax data inspect`."""

from collections.abc import Sequence

from rest_jax import config as config_lib
from rest_jax.data.files import iter_records
from rest_jax.data.prepare import summary
from rest_jax.data.tokenize import is_world, load_split
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import TEMPLATES


def inspect(file: str, tokenizer: str | None, limit: int | None, overrides: Sequence[str]) -> str:
    """Tables of the first `limit` records, with token counts where a tokenizer is given. UserError when there are none."""
    config = config_lib.from_overrides({"name": "data", "model": {"source": "none"}}, overrides)
    data, count = config.data, None
    if tokenizer is not None:
        loaded = Tokenizer.load(config_lib.locate(tokenizer))
        count = summary.TokenCounter(loaded, TEMPLATES[data.template], data.brief_prompt)
    records = load_split(file, data, limit) if is_world(file) else iter_records(file, limit)
    tally = summary.Tally()
    for record in records:
        tally.add(record, None if count is None else count(record))
    if not tally.records:
        raise UserError(f"data {file}: no records")
    return summary.to_text(tally)
