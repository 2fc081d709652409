"""The runner, with processes that only pretend: order, resumption, missing peers, ratios, the table."""

import json

import pytest

from benchmarks import run
from benchmarks.cases import CASES
from benchmarks.summary import summarise

CASE = CASES["update-768"]


class Processes:
    """Replaces the processes: ours takes 1, 2, 3 .. seconds, the peer ten times as long."""

    def __init__(self):
        self.commands, self.fail = [], False

    def __call__(self, command, variables):
        if self.fail:
            raise run.Failed("out of memory")
        ours = "-m" in command
        self.commands.append(("ours" if ours else "peer", variables))
        number = sum(side == self.commands[-1][0] for side, _ in self.commands)
        return made(number if ours else 10 * number, 1e9 if ours else 8e9)


def made(seconds: float, peak: float, **more) -> dict:
    times = {"cpu_seconds": seconds, "wall_seconds": seconds, "tokens_per_cpu_second": 60 / seconds}
    return {
        "tokens": 60,
        **times,
        "peak_bytes": peak,
        "warmup_seconds": 1,
        "flops_share": 0.4,
        **more,
    }


@pytest.fixture
def processes(monkeypatch):
    found = Processes()
    monkeypatch.setattr(run, "run_process", found)
    monkeypatch.setattr(run, "pin", lambda case, args: True)
    monkeypatch.setattr(run, "is_installed", lambda peer, python: True)
    return found


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_sides_alternate_and_are_compared(processes, tmp_path, capsys):
    assert run.main(["--case", CASE.name, "--runs", "3", "--out", str(tmp_path)]) == 0
    *records, summary = lines(capsys)
    assert [side for side, _ in processes.commands] == ["ours", "peer"] * 3
    assert [record["run"] for record in records] == [0, 0, 1, 1, 2, 2]
    assert summary["ratio"] == summary["ratio_of_medians"] == 10
    assert summary["memory_ratio"] == 0.125
    assert summary["met"] is True
    (file,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line) for line in file.read_text().splitlines()] == [*records, summary]
    assert "| update-768 | 3 x 3 | 30 | 3 | 10.00 |" in (tmp_path / "table.md").read_text()


def test_resuming_runs_only_what_is_missing(processes, tmp_path, capsys):
    again = ["--case", CASE.name, "--out", str(tmp_path), "--resume"]
    run.main([*again, "--runs", "1"])
    run.main([*again, "--runs", "2"])
    assert len(processes.commands) == 4
    assert lines(capsys)[-1]["runs"] == 2


def test_only_ours_compiles_afresh_and_pages_are_the_peers_choice(processes, tmp_path, monkeypatch):
    monkeypatch.delenv("REST_JAX_CACHE", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    run.main(["--case", CASE.name, "--runs", "1", "--out", str(tmp_path), "--peer-hugepages"])
    (_, ours), (_, peer) = processes.commands
    assert ours["REST_JAX_CACHE"] == "off" and "REST_JAX_CACHE" not in peer
    (file,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records[0]["compiled_afresh"] is records[1]["hugepages"] is True
    assert "peer with huge pages" in (tmp_path / "table.md").read_text()
    assert peer["GLIBC_TUNABLES"] == ours["GLIBC_TUNABLES"] == run.HUGE_PAGES


def test_a_missing_peer_is_named_once(processes, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(run, "run_process", processes)
    monkeypatch.setattr(run, "pin", lambda case, args: True)
    names = ["update-768", "update-128"]
    absent = ["--peer-python", f"tunix={tmp_path / 'python'}"]
    assert run.main(["--case", *names, "--runs", "1", "--out", str(tmp_path), *absent]) == 0
    out, err = capsys.readouterr()
    assert "google-tunix" in err and len(err.splitlines()) == 1
    summary = json.loads(out.splitlines()[-1])
    assert summary["ratio"] is None and summary["met"] is None and summary["peer"] is None


def test_every_peer_has_its_own_interpreter(processes, tmp_path):
    names = ["update-128", "trl-step-128", "hf-rollout"]
    own = ["--peer-python", "trl=python-of-trl", "--peer-python", "tunix=python-of-tunix"]
    args = run.parse(["--case", *names, "--out", str(tmp_path), *own])
    for name in names:
        (tmp_path / "models" / str(CASES[name].folder)).mkdir(parents=True, exist_ok=True)
    found = [run.peer_command(CASES[name], args)[0] for name in names]
    assert found == ["python-of-tunix", "python-of-trl", run.sys.executable]


def test_a_failing_process_is_one_line(processes, tmp_path, capsys):
    processes.fail = True
    assert run.main(["--case", CASE.name, "--runs", "1", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "run: error: update-768: out of memory\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--case", "flight"],
        ["--runs", "0"],
        ["--core", "4096"],
        ["--out", __file__],
        ["--peer-python", "flight=python"],
        ["--peer-python", "tunix"],
    ],
)
def test_bad_arguments_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(argv)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_ratio_is_of_pairs(capsys):
    ours = [made(s, 1, case="host", side="rest_jax", run=i) for i, s in enumerate((1, 2, 6))]
    peer = [made(s, 1, case="host", side="peer", run=i) for i, s in enumerate((12, 9, 10))]
    named = [{**record, "case": CASE.name} for record in ours + peer]
    found = summarise(CASE, named)
    assert (found["ratio"], found["ratio_of_medians"]) == (4.5, 5)
    assert found["met"] is False
    with pytest.raises(ValueError, match="same work"):
        summarise(CASE, [*named[:-1], {**named[-1], "tokens": 61}])
