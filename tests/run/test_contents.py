"""Digests of what a run is made of: the same on every mesh and from every kind of storage, others for any change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig, ModelConfig
from rest_jax.data.ragged import Ragged, StoredRecords, to_bytes
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Prepared
from rest_jax.errors import UserError
from rest_jax.run.contents import ADAPTERS, BASE, check_same, digest_params, digests
from rest_jax.run.load import load_policy
from rest_jax.tool_calls import Call, Target


def data_of(*records: StepRecord, last: int = 3) -> Prepared:
    prompts = Ragged.of([np.array([1, 2], np.int32), np.array([last], np.int32)])
    return Prepared(records, prompts, Ragged.of([]), 0, 9)


FIRST, SECOND = (StepRecord(x, "", (), ({"role": "user", "content": x},), Target()) for x in "ab")


@pytest.fixture(scope="module")
def policy(model):
    return load_policy(ModelConfig(source=str(model)), MeshConfig(fsdp=-1))


def test_a_change_of_anything_is_seen_and_named(policy):
    old = digests(policy, data_of(FIRST, SECOND))
    assert digests(policy, data_of(FIRST, SECOND)) == old
    gold = dataclasses.replace(SECOND, target=Target((Call("f", {}),)))
    params = jax.tree.map(lambda x: x, policy.params)
    params["final_norm"]["scale"] = jnp.nextafter(params["final_norm"]["scale"], 2.0)
    pieces = list(policy.tokenizer.pieces)
    pieces[10], pieces[11] = pieces[11], pieces[10]
    tokenizer = dataclasses.replace(policy.tokenizer, pieces=tuple(pieces))
    changes = {
        "tokens": digests(dataclasses.replace(policy, tokenizer=tokenizer), data_of(FIRST, SECOND)),
        "records": digests(policy, data_of(FIRST, gold)),
        "prompts": digests(policy, data_of(FIRST, SECOND, last=4)),
        "weights": digests(dataclasses.replace(policy, params=params), data_of(FIRST, SECOND)),
    }
    for name, new in changes.items():
        assert {key for key in old if old[key] != new[key]} == {name}
        with pytest.raises(UserError, match=f"run: its run was made of other {name} than"):
            check_same(old, new, "run")
    check_same(old, dict(old), "run")


def test_of_a_run_with_lora_they_are_those_of_the_base_and_of_the_first_adapters(policy):
    found = [
        digests(dataclasses.replace(policy, adapters={"a": jnp.full((2, 2), x)}), data_of(FIRST))
        for x in (1.0, 2.0)
    ]
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {ADAPTERS}
    full = digests(policy, data_of(FIRST))
    assert found[0].pop(BASE) == full.pop("weights") and found[0].keys() - {ADAPTERS} == full.keys()
    with pytest.raises(UserError, match="run: its adapters belong to other weights"):
        check_same({BASE: "x"}, {BASE: "y"}, "run")


def test_plugins_are_contents(policy):
    key = "reward.plugin"
    one, other = (digests(policy, data_of(FIRST), {key: text}) for text in ("a", "b"))
    with pytest.raises(UserError, match=r"made of other reward\.plugin than"):
        check_same(one, other, "run")


def test_records_in_files_and_in_memory_are_the_same(policy):
    data = data_of(FIRST, SECOND)
    rows = Ragged.of([np.frombuffer(to_bytes(record), np.uint8) for record in data.records])
    stored = dataclasses.replace(data, records=StoredRecords(rows))
    assert digests(policy, stored) == digests(policy, data)


def test_the_digest_of_weights_does_not_depend_on_the_mesh_and_sees_exchanged_elements():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()), ("all",))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("all")))
    assert digest_params({"a": split}) == digest_params({"a": jnp.asarray(x)})
    assert (
        digest_params({"a": x[::-1]}) != digest_params({"a": x}) != digest_params({"a": x[:, ::-1]})
    )
