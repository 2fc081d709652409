"""Two stages in one process: SIGTERM at the very end of the first is heeded, and nothing is trained twice after it."""

import functools
import os
import pathlib
import signal

import jax
import pytest
import yaml

from rest_jax import config, sft, stages, train
from rest_jax.distributed import make_mesh
from rest_jax.models import load as policy
from rest_jax.run.folder import Run
from rest_jax.run.metrics import read_lines
from tests.test_train import model, recipe  # noqa: F401


@pytest.fixture
def both(model, tmp_path, monkeypatch) -> config.Config:  # noqa: F811
    """A supervised start of two steps, then reinforcement, on one device."""
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(policy, "make_mesh", one)
    base = recipe(model, tmp_path / "runs", data={"eval": None})
    base["mesh"] = {"data": 1, "fsdp": 1}
    base["train"] |= {"steps": 2, "eval_every": 0, "eval_before": False}
    (tmp_path / "scale.yaml").write_text(yaml.safe_dump(base))
    gold = {"base": "scale", "trainer": "sft"}
    (tmp_path / "gold.yaml").write_text(yaml.safe_dump(gold))
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump({"base": "scale", "warm_start": "gold"}))
    return config.load(path)


@pytest.mark.parametrize(("place", "name"), [(sft.Loop, "evaluate"), (Run, "save"), (Run, "close")])
def test_sigterm_in_the_last_moments_of_the_start(both, tmp_path, monkeypatch, place, name):
    real, begun = getattr(place, name), []

    def stopped(self, *args):
        if name == "close" or args[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stopped)
        patch.setattr(train, "run", lambda config, *_, **__: begun.append(config.name) or 0)
        assert stages.run(both) == 0
    assert begun == []
    gold = both.warm_start
    assert gold is not None and stages.is_finished(gold)
    done = pathlib.Path(gold.output, "gold", "metrics.jsonl")
    before = read_lines(done)
    assert [line["step"] for line in before if "update/loss" in line] == [1, 2]
    monkeypatch.setattr(train, "run", lambda config, *_, **__: begun.append(config.name) or 0)
    assert stages.run(both) == 0 and begun == ["both"]
    assert read_lines(done) == before
