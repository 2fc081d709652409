"""Files of records for tests, written as `rest-jax data prepare` writes them."""

import contextlib
import pathlib
from collections.abc import Iterable

from rest_jax.data.files import WRITERS
from rest_jax.data.records import StepRecord


def write_records(path: str | pathlib.Path, records: Iterable[StepRecord]) -> None:
    """Writes .jsonl or .parquet by the name's ending."""
    path = pathlib.Path(path)
    with contextlib.closing(WRITERS[path.suffix](path)) as writer:
        for record in records:
            writer.write(record)
