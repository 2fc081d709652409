"""What a run is made of, as digests: they are kept in every checkpoint, and a run resumes over the same contents alone.

`records` are the records with their tools and gold answers, `prompts` and `targets` their token ids (so the template, the
tokenizer and dates too), `tokens` the bytes of each id, and those that end a turn, `weights` those that the run began with; with
LoRA `adapters` are those that it began with and `base` the weights that they belong to. A plug-in has the key that names it in
the config, such as `reward.plugin`. Paths are not among them: a folder may move.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from rest_jax.config import from_overrides
from rest_jax.data.ragged import StoredRecords, to_bytes
from rest_jax.data.tokenize import Prepared
from rest_jax.distributed import exchange, is_first_process
from rest_jax.errors import UserError
from rest_jax.models.hf.placement import Weights
from rest_jax.models.lora import stays_float32
from rest_jax.models.policy import Policy
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run import checkpoint
from rest_jax.types import Params

MADE_OF = "made_of"  # of a launch, and beside the loader's state in a checkpoint: these digests
BASE = "base"  # that of the weights that adapters belong to
ADAPTERS = "adapters"  # that of the adapters that a run begins with
STARTS = ("weights", ADAPTERS)  # of what a run trains


def digests(
    policy: Policy, data: Prepared, plugins: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The digests of a run about to begin, with those of its `plugins.digests`; every process must call it. The first reads all
    of the data (a million records: about ten seconds). UserError where the processes have different plug-ins.
    """
    own = {
        "weights" if policy.frozen is None else BASE: policy.digest or digest_params(policy.params)
    }
    if policy.frozen is not None:
        own[ADAPTERS] = digest_params(policy.trained)
    own |= plugins or {}
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


def kept_contents(launch: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a launch that its checkpoints keep; empty where it has none. They have adapters of their own: those that the
    run began with are needed where its KL term refers to them.
    """
    made_of = dict(launch.get(MADE_OF, {}))
    if ADAPTERS in made_of and not from_overrides(launch["config"]).refers_to_adapters:
        del made_of[ADAPTERS]
    return made_of


def check_same(saved: Mapping[str, str], found: Mapping[str, str], where: Any) -> None:
    """UserError that names the contents that are not those of a checkpoint."""
    other = changed(saved, found)
    if BASE in other:
        refuse_base(where)
    if other:
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


def digest_params(params: Params, dtype: Any = jnp.float32) -> str:
    """Of the bits of all elements, matrices as values of `dtype`."""
    return of_sums(jax.device_get(_sums_rounded(params, jnp.dtype(dtype))))


def digest_opened(weights: Sequence[Weights], dtype: Any = jnp.float32) -> str:
    """The same of parameters that are read layer by layer on the host."""
    return of_sums(unflatten_dict({w.spec.path: _sum_opened(w, dtype) for w in weights}))


def digest_merged(base: str, adapters: str, dtype: Any) -> str:
    """Of weights that were merged when they were loaded, from the digests of both: on another mesh their last bits may differ."""
    return _of_rows(x.encode() for x in (base, adapters, jnp.dtype(dtype).name))


def find_base(digest: Callable[[Any], str], saved: epath.Path) -> tuple[np.dtype, str]:
    """The dtype in which weights with these digests are those that the adapters of a checkpoint belong to, and their digest.
    UserError when they are not.
    """
    kept = checkpoint.read_loader_state(saved)[MADE_OF][BASE]
    for dtype in map(jnp.dtype, ("float32", "bfloat16")):
        if digest(dtype) == kept:
            return dtype, kept
    refuse_base(saved)


def refuse_base(where: Any) -> NoReturn:
    """UserError for adapters beside other weights than theirs."""
    raise UserError(
        f"{where}: its adapters belong to other weights than model.source leads to now; put those back (or set lora.base_dtype "
        "to what it was, which auto leaves to the devices)"
    )


def of_sums(sums: Any) -> str:
    """The digest, in hex, of a tree that `sums_of_bits` returned, on the host."""
    return _of_rows(np.asarray(x) for x in jax.tree.leaves(sums))


def sums_of_bits(tree: Any) -> Any:
    """A uint32 for each array: the sum over the bits of every element with its place. Such sums wrap round, so that they do not
    depend on the mesh. A change of one element always changes it.
    """
    return jax.tree.map(_sum_of_bits, tree)


@functools.partial(jax.jit, static_argnums=1)
def _sums_rounded(params: Params, dtype: Any) -> Params:
    flat = flatten_dict(params)
    return sums_of_bits(
        unflatten_dict({path: _rounded(x, path, dtype) for path, x in flat.items()})
    )


def _rounded(x: Any, path: tuple[str, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(x) if stays_float32(path) else jnp.asarray(x).astype(dtype)


def _sum_opened(w: Weights, dtype: Any) -> np.ndarray:
    total, size = np.zeros((), np.uint32), math.prod(w.shape[1:])
    whole = tuple(map(slice, w.shape[1:]))
    for layer in range(w.shape[0]):
        values = w.read((slice(layer, layer + 1), *whole))
        values = w.spec.to_ours(values) if w.in_hf_layout else values
        total += np.asarray(_sum_of_bits(_rounded(values, w.spec.path, dtype), layer * size))
    return total


def _sum_of_bits(x: jax.Array, first: int = 0) -> jax.Array:
    """Of a part of an array whose first element is number `first`."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    else:
        bits = x.astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    place = place + jnp.uint32(first % 2**32)
    # Odd factors, spread over all bits: no element's bits are lost.
    mixed = (bits ^ (bits >> 15)) * (place * jnp.uint32(0x9E3779B1) * 2 + 1)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)
