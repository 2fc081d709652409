"""Grain loaders: batches of prompts (or prompts and targets) in a seeded order that resumes exactly where it stopped.

Order: shuffled by the seed, differently in every epoch; an epoch's last incomplete batch is dropped. Batches are global: with
several processes each takes the rows of its data shards, so the number of processes never changes what a step sees.
Row ids: `row = epoch * size + index in the data`, so that sampling keys differ between epochs and between prompts.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from rest_jax.config import DataConfig
from rest_jax.data.ragged import lengths_of
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Prepared
from rest_jax.errors import UserError

BUCKET = 64  # padded lengths are multiples of this
_MAX_ROW = 2**31 - 1

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TargetBatch:
    """Prompts with one tokenised target each. numpy int32, right-padded."""

    prompt: np.ndarray  # [P, Tp]
    prompt_length: np.ndarray  # [P]
    target: np.ndarray  # [P, Tr]
    target_length: np.ndarray  # [P], end-of-turn included
    row: np.ndarray  # [P]


class Loader(Generic[T]):
    """Iterator of (batch, its records) whose position can be saved and restored.

    `assemble` makes the batch of this process from the padded prompts, their lengths, the padded targets and their lengths where
    there are targets, and the row ids: `PromptBatch`, or `TargetBatch` over what `prepare_supervised` made. All are numpy int32;
    prompts are padded to one Tp, targets to one Tr, both multiples of 64. `batch` counts the prompts of all processes,
    `rows` are those of them that this process takes (default: all). UserError when an epoch does not hold one batch, or row
    ids would pass 2^31.
    """

    def __init__(
        self,
        prepared: Prepared,
        assemble: Callable[..., T],
        *,
        batch: int,
        seed: int,
        pad_id: int,
        cfg: DataConfig,
        num_steps: int,
        rows: np.ndarray | None = None,
    ):
        size = prepared.size
        if size < batch:
            raise UserError(
                f"the data has {size} usable records, fewer than one batch of {batch}; use a smaller batch"
            )
        self.batches_per_epoch = size // batch
        self._records, self._assemble, self._pad_id = prepared.records, assemble, pad_id
        self._columns = [
            (rows, bucketed(rows)) for rows in (prepared.prompts, prepared.targets) if len(rows)
        ]
        self._identity = {"records": size, "batch": batch, "seed": seed}
        self._rows = np.arange(batch) if rows is None else rows
        epochs = -(-num_steps // self.batches_per_epoch)
        if size * epochs > _MAX_ROW:
            raise UserError(
                f"{epochs} epochs of {size} records: row ids would pass 2^31; use fewer epochs"
            )
        self._iterator = iter(_index_batches(size, batch, seed, num_steps, cfg.shuffle))

    def __iter__(self) -> Iterator[tuple[T, list[StepRecord]]]:
        return self

    def __next__(self) -> tuple[T, list[StepRecord]]:
        """StopIteration after `num_steps` batches."""
        step, indices = next(self._iterator)
        index = np.asarray(indices, np.int64)[self._rows]
        epoch, size = int(step) // self.batches_per_epoch, len(self._records)
        padded = (pad([ids[i] for i in index], width, self._pad_id) for ids, width in self._columns)
        row = (epoch * size + index).astype(np.int32)
        return self._assemble(*itertools.chain(*padded), row), [self._records[i] for i in index]

    def get_state(self) -> dict[str, Any]:
        """JSON-able position: the next `__next__` after `set_state` of it gives the batch that would come next now."""
        return {**self._identity, "grain": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a saved position. UserError when it was saved over other data, another batch size or another seed."""
        for key, here in self._identity.items():
            if state.get(key) != here:
                raise UserError(
                    f"loader state: saved with {key} {state.get(key)}, this run has {key} {here}"
                )
        self._iterator.set_state(state["grain"])


def bucketed(rows: Sequence[np.ndarray]) -> int:
    """The longest length, rounded up to a multiple of 64."""
    return -(-int(lengths_of(rows).max()) // BUCKET) * BUCKET


def pad(rows: Sequence[np.ndarray], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [P, width] right-padded with `pad_id`, int32 [P] lengths)."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for padded, ids in zip(tokens, rows, strict=True):
        padded[: len(ids)] = ids
    return tokens, lengths_of(rows).astype(np.int32)


def _index_batches(size: int, batch: int, seed: int, num_steps: int, shuffle: bool) -> Any:
    """Grain data set of (step, data indices of the step's global batch)."""
    indices = grain.MapDataset.range(size).seed(seed)
    if shuffle:
        indices = indices.shuffle()
    batches = indices.batch(batch, drop_remainder=True).repeat()  # repeat reseeds the shuffle
    batches = batches.map_with_index(lambda step, indices: (step, indices)).slice(slice(num_steps))
    # tokens are ready: indices are all Grain handles, so reading ahead with threads would only cost time
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
