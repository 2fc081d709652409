"""Every kind of benchmark at tiny sizes, and the arguments the cases hand to it."""

import argparse
import dataclasses
import json
import sys
import types

import pytest

from benchmarks import __main__ as ours
from benchmarks import policies, process, sft
from benchmarks.cases import CASES, Case, Check, lognormal_lengths, our_arguments, peer_arguments
from tests.benchmarks.conftest import PEERS

TINY = dataclasses.replace(
    policies.MODEL_A, vocab_size=300, d_model=32, n_layers=2, n_heads=4, head_dim=8, d_ff=64
)
SMALL = ["--prompts", "2", "--group", "2", "--prompt-tokens", "12"]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(policies.NAMED, "model-a", TINY)
    monkeypatch.setattr(process.cpu_peak, "measured_cpu_peak", lambda: 1e11)


def record(capsys, *argv: str) -> dict:
    assert ours.main([*argv, "--repeats", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["side"], found["case"]) == ("rest_jax", argv[0])
    for name in ("tokens", "cpu_seconds", "wall_seconds", "peak_bytes", "warmup_seconds"):
        assert found[name] > 0
    return found


@pytest.mark.wide
def test_rollout(capsys, tmp_path):
    file = tmp_path / "lengths.json"
    file.write_text("[1, 9, 3, 4]")
    found = record(capsys, "rollout", *SMALL, "--decode-slots", "2", "--lengths", str(file))
    assert found["tokens"] == 17
    assert 0.5 < found["decode_slot_utilisation"] <= 1
    assert found["flops_share"] == found["model_flops_per_second"] / 1e11


@pytest.mark.wide
def test_step_trains_every_group(capsys):
    found = record(capsys, "step", *SMALL, "--group", "4", "--response-tokens", "8")
    assert found["tokens"] == 2 * 4 * (12 + 8)


@pytest.mark.slow
def test_supervised_step(capsys):
    assert record(capsys, "sft", "--records", "5+3,12+9")["tokens"] == 5 + 3 + 12 + 9


@pytest.mark.slow
def test_skipping_leaves_the_gradient_alone(capsys):
    sizes = ["--response-tokens", "8", "--max-tokens-per-microbatch", "40"]
    found = record(capsys, "skipping", *SMALL, *sizes)
    assert found["gradient_difference"] < 1e-5
    assert found["half_cpu_seconds"] > 0


@pytest.mark.slow
def test_chats_are_answered_as_the_peer_answers_them(
    capsys, tmp_path, configs_dir, load_peer, monkeypatch
):
    folder, file = str(configs_dir / "quickstart_policy"), tmp_path / "requests.json"
    assert ours.main(["requests", folder, str(file), "--count", "8"]) == 0
    given = ["--model", folder, "--requests", str(file), "--new-tokens", "6"]
    found = record(capsys, "serve", *given, "--count", "4", "--at-once", "3")
    peer = load_peer("torch_bench")
    monkeypatch.setattr("sys.argv", ["torch_bench", "serve", *given, "--rows", "4", "--group", "2"])
    expected = peer.measure(peer.parse_args())
    assert found["tokens"] == expected["tokens"] == 4 * 6
    assert found["answers"] == expected["answers"] and len(set(found["answers"])) > 1


def test_host(capsys):
    found = record(capsys, "host", "--prompts", "3", "--tokens", "300")
    assert found["tokens"] == 3 * 4 * 300
    assert found["bytes"] > 3 * found["tokens"]
    assert 0 < found["step_share"] < found["pod_step_share"] < found["pod_rollout_share"]


def test_a_folder_holds_the_weights_of_its_name(tmp_path):
    import jax

    assert ours.main(["export", "model-a", str(tmp_path / "a")]) == 0
    read, fresh = policies.load(str(tmp_path / "a")), policies.load("model-a")
    assert read.config == fresh.config
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), read.params, fresh.params))


@pytest.mark.parametrize(
    "argv",
    [
        ["rollout", "--prompts", "0"],
        ["flight"],
        [],
        ["rollout", "--lengths", "nowhere.json"],
        ["sft", "--records", "5"],
        ["sft", "--records", "5+0"],
    ],
)
def test_bad_arguments_are_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        ours.main(argv)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_model_is_one_line(capsys):
    assert ours.main(["update", "--model", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_arguments_of_the_cases(case: Case, tmp_path):
    file = str(tmp_path / "file.json")
    numbers = lognormal_lengths(case.prompts * case.group)
    (tmp_path / "file.json").write_text(json.dumps(numbers))
    given = case.folder, file if case.lognormal or case.kind == "serve" else None
    args = ours.make_parser(ours.load_cases()).parse_args(our_arguments(case, *given))
    assert args.case == case.kind
    if case.peer:
        pairs = iter(peer_arguments(case, *given)[1:])
        given = argparse.Namespace(**{name[2:]: value for name, value in zip(pairs, pairs)})  # noqa: B905
        if case.kind == "sft":
            assert sft.read_records(given.records) == args.records
        else:
            rows = 16 if case.lognormal else case.prompts * case.group
            assert given.rows == str(rows)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.peer in ("torch", "trl")], ids=str)
def test_peers_take_the_arguments_of_the_cases(case: Case, load_peer, monkeypatch):
    for name in ("datasets", "trl"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.syspath_prepend(str(PEERS))
    file = "x.json" if case.lognormal or case.kind == "serve" else None
    words = [*peer_arguments(case, case.folder, file), "--repeats", "3"]
    monkeypatch.setattr("sys.argv", ["peer", *words])
    assert load_peer(f"{case.peer}_bench").parse_args().repeats == 3


def test_lognormal_lengths():
    lengths = lognormal_lengths(512)
    assert lengths == lognormal_lengths(512)
    assert min(lengths) >= 1 and 300 <= max(lengths) <= 512
    assert 55 < sum(lengths) / 512 < 70


def test_checks():
    assert Check("ratio", 2.0).holds(2.0) and not Check("ratio", 2.0).holds(1.9)
    assert Check("memory_ratio", 0.4, at_least=False).holds(0.4)
    assert Check("ratio", 2.0).holds(None) is None
