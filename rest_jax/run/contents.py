"""What a run is made of, as digests: they are kept in every checkpoint, and a run resumes over the same contents alone.

`records` are the records with their tools and gold answers, `prompts` and `targets` their token ids (so the template, the
tokenizer and dates too), `tokens` the bytes of each id, and those that end a turn, `weights` those that the run began with;
a plug-in has the key that names it in the config, such as `reward.plugin`.
Paths are not among them: a folder may move.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.data.ragged import StoredRecords, to_bytes
from rest_jax.data.tokenize import Prepared
from rest_jax.distributed import exchange, is_first_process
from rest_jax.errors import UserError
from rest_jax.models.policy import Policy
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.types import Params


def digests(
    policy: Policy, data: Prepared, plugins: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The digests of a run about to begin, with those of its `plugins.digests`; every process must call it. The first reads all
    of the data (a million records: about ten seconds). UserError where the processes have different plug-ins.
    """
    own = {"weights": _of_weights(policy.params), **(plugins or {})}
    if is_first_process():
        records = data.records
        rows = records.rows if isinstance(records, StoredRecords) else map(to_bytes, records)
        own |= {"records": _of_rows(rows), "tokens": _of_tokens(policy.tokenizer)}
        own |= {"prompts": _of_rows(data.prompts), "targets": _of_rows(data.targets)}
    first, *others = map(json.loads, exchange(json.dumps(own)))
    for process, other in enumerate(others, start=1):
        for key in plugins or {}:
            if other[key] != first[key]:
                raise UserError(
                    f"{key}: process {process} has another file than process 0; give all hosts the same one"
                )
    return first


def check_same(saved: Mapping[str, str], found: Mapping[str, str], where: Any) -> None:
    """UserError that names the contents that are not those of a checkpoint."""
    if other := changed(saved, found):
        raise UserError(
            f"{where}: its run was made of other {', '.join(other)} than are here now; put the old ones back, go on "
            "from it under another name with --fork NEW_NAME, or forget that run with --restart"
        )


def changed(saved: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names of the contents that are not those of a checkpoint."""
    return [name for name, digest in saved.items() if found.get(name, digest) != digest]


def _of_rows(rows: Iterable[np.ndarray | bytes]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        content = row if isinstance(row, bytes) else row.tobytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:16]


def _of_tokens(tokenizer: Tokenizer) -> str:
    ids = np.array([tokenizer.pad_id, tokenizer.end_id, *tokenizer.stop_ids])
    return _of_rows([ids.astype(np.int64), *tokenizer.pieces])


def _of_weights(params: Params) -> str:
    return of_sums(jax.device_get(jax.jit(sums_of_bits)(params)))


def of_sums(sums: Any) -> str:
    """The digest, in hex, of a tree that `sums_of_bits` returned, on the host."""
    return _of_rows(np.asarray(x) for x in jax.tree.leaves(sums))


def sums_of_bits(tree: Any) -> Any:
    """A uint32 for each array: the sum over the bits of every element with its place. Such sums wrap round, so that they do not
    depend on the mesh. A change of one element always changes it.
    """
    return jax.tree.map(_sum_of_bits, tree)


def _sum_of_bits(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    else:
        bits = x.astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    # Odd factors, spread over all bits: no element's bits are lost.
    mixed = (bits ^ (bits >> 15)) * (place * jnp.uint32(0x9E3779B1) * 2 + 1)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)
