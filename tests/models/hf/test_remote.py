"""Orbax asks TensorStore for s3:// as it does for gs://; local paths and gs:// stay what they were."""

import pytest
from orbax.checkpoint._src.serialization import tensorstore_utils

from rest_jax.files import as_path
from rest_jax.models.hf import remote

VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION",
             "AWS_ACCESS_KEY_ID")  # fmt: skip


@pytest.fixture(autouse=True)
def without_account(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def base(url: str) -> dict:
    return tensorstore_utils.build_kvstore_tspec(url)["base"]


def test_only_s3_is_changed(memory_store, tmp_path):
    before = base("gs://bucket/run/1"), base(str(tmp_path))
    path = as_path(f"{memory_store}/run/1")
    assert remote.checkpoint_path(path) == path
    assert base(str(path)) == {"driver": "s3", "bucket": "bucket", "path": "run/1"}
    assert (base("gs://bucket/run/1"), base(str(tmp_path))) == before
    assert before[0]["driver"] == "gcs"


def test_endpoint_region_and_account_are_those_of_the_environment(memory_store, monkeypatch):
    remote.checkpoint_path(as_path(memory_store))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://a:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    spec = base("s3://bucket/run/1")
    assert (spec["endpoint"], spec["aws_region"]) == ("http://a:1", "eu-west-1")
    assert spec["aws_credentials"] == {"type": "environment"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://b:2")
    assert base("s3://bucket/run/1")["endpoint"] == "http://b:2"


def test_a_checkpoint_of_a_store_is_complete_with_its_commit_file(memory_store, tmp_path):
    path = as_path(f"{memory_store}/run/1")
    assert not remote.is_complete(path) and remote.is_complete(as_path(tmp_path))
    (path / remote.COMMIT_FILE).write_text("")
    assert remote.is_complete(path)
