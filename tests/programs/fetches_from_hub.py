"""fetches_from_hub.py LOG ADDRESS INDEX [FAIL]: one of two processes that ask for a hub id; a fake hub logs every request."""

import pathlib
import sys
import time

import huggingface_hub
import jax

from rest_jax.errors import UserError
from rest_jax.models.hf.folder import find_source

log, fails = pathlib.Path(sys.argv[1]), "FAIL" in sys.argv


def snapshot_download(hub_id, *, allow_patterns, local_files_only):
    """The network, slowly; or the cache, which is right only after it."""
    done = log.parent / "done"
    if local_files_only:
        assert done.exists(), "looked into the cache before the download was complete"
        return str(log.parent)
    with log.open("a") as file:
        file.write(f"{hub_id}\n")
    time.sleep(1)
    if fails:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
    done.touch()
    return str(log.parent)


huggingface_hub.snapshot_download = snapshot_download
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
try:
    print(f"found {find_source('some/where')}")
except UserError as error:
    print(f"said {str(error)!r}")
