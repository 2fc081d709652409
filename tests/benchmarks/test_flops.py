"""FLOPs of an update in groups and row by row, on a tiny model."""

import argparse
import json

import pytest

from benchmarks import flops, policies
from rest_jax.planning import topology


@pytest.fixture
def args(tmp_path):
    cfg = policies.MODEL_A
    (tmp_path / "config.json").write_text(json.dumps(policies.hf_config(cfg)))
    sizes = {"prompts": 1, "group": 4, "prompt_tokens": 129, "response_tokens": 256}
    return argparse.Namespace(model=str(tmp_path), topology="cpu:1", remat="none", **sizes)


@pytest.mark.slow
def test_a_prompt_is_computed_once_in_a_group(args, tmp_path):
    found = flops.compare(args, topology.parse(args.topology), tmp_path)
    cfg = policies.MODEL_A
    heads = cfg.head_dim * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    trunk = 6 * cfg.n_layers * cfg.d_model * (heads + 3 * cfg.d_ff)
    head = 6 * cfg.d_model * cfg.vocab_size
    # a row of 128 + 4 x 256 positions in a group, of 4 x 384 one by one; the rest is attention
    for name, positions in {"grouped": 1152, "by_row": 1536}.items():
        products = trunk * positions + head * 4 * 256
        assert products < found[name] < 1.6 * products


def test_bad_topology_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        flops.main(["--topology", "moon:4"])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
