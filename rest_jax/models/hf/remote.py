"""Orbax checkpoints on s3://: Orbax knows local paths and gs:// alone, TensorStore below it knows S3 as well.

`checkpoint_path(path)` is called with every path that is handed to Orbax. For s3:// it has Orbax ask TensorStore's s3 driver
where it would ask the gcs driver; the three functions it replaces for that are private to Orbax, so they are looked for only
then. Credentials and region are those that AWS's own tools find; AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL name another server,
for s3fs as well as here.

A store cannot rename, so a checkpoint there is written under its final name (`ATOMICITY`): it counts once `commit_success.txt`,
put last, is there.
"""

import functools
import os
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from rest_jax.errors import UserError
from rest_jax.files import is_url

COMMIT_FILE = "commit_success.txt"
ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
_SCHEME = "s3://"


def checkpoint_path(path: epath.Path) -> epath.Path:
    """The path, once Orbax can read and write there."""
    if os.fspath(path).startswith(_SCHEME):
        _teach_orbax()
    return path


@functools.cache
def _teach_orbax() -> None:
    """Replaces the three functions, once. UserError when this version of Orbax has others."""
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        gcs_kvstore = gcs_utils.get_kvstore_for_gcs
        normalise = tensorstore_utils._normalize_path
        _ = tensorstore_utils._use_gcs_driver
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"s3://: Orbax {ocp.__version__} does not write there ({error}); "
            'pip install "orbax-checkpoint==0.12.8", or take gs:// or a local path'
        ) from error
    gcs_utils.get_kvstore_for_gcs = lambda path: (
        _s3_kvstore(path) if path.startswith(_SCHEME) else gcs_kvstore(path)
    )
    tensorstore_utils._normalize_path = lambda path: (
        path.rstrip("/") if path.startswith(_SCHEME) else normalise(path)
    )
    tensorstore_utils._use_gcs_driver = is_url


def is_complete(path: epath.Path) -> bool:
    """Whether the checkpoint in a folder was written to its end: a local one has its name only then."""
    return not is_url(path) or (path / COMMIT_FILE).exists()


def kvstore(folder: os.PathLike[str]) -> dict[str, Any]:
    """TensorStore's description of a folder: local, or in a store."""
    text = os.fspath(folder)
    if not is_url(text):
        return {"driver": "file", "path": os.path.abspath(text)}
    if text.startswith(_SCHEME):
        return _s3_kvstore(text)
    bucket, _, name = text.partition("://")[2].partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": name}


def _s3_kvstore(path: str) -> dict[str, Any]:
    """TensorStore's description of a place on s3://."""
    bucket, _, name = path.removeprefix(_SCHEME).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": name}
    for key, names in {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }.items():
        if values := [os.environ[variable] for variable in names if os.environ.get(variable)]:
            spec[key] = values[0]
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Else the driver looks for a profile first, and says on stderr that there is none.
        spec["aws_credentials"] = {"type": "environment"}
    return spec
