"""Memory and speed of `rest-jax data prepare` on a generated file: one measured process, its record as one JSON line.

    python -m benchmarks.preparing [--records 1000000] [--form jsonl] [--ending jsonl] [--tokenizer FOLDER]

In: OpenAI dialogues, each with 3 to 6 of 5,000 tools offered, a question, one or two calls, their results and an answer: two
records of about 3 KB; as Parquet xLAM items of one record, all in one row group. All steps are on: duplicates, a split by
tool, masking, irrelevance; tokens are counted where a tokenizer is given. The process is the command itself; peak_bytes is its
largest resident size, by the kernel.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.process import Parser, positive

DESCRIPTION = "Memory and speed of data prepare; its record is one JSON line on stdout."
TOOLS = 5000
OPTIONS = ("--held-out", "0.05", "--mask-names", "0.3", "--irrelevance", "0.1")
WORDS = (
    *(
        "list",
        "the",
        "nearest",
        "open",
        "restaurant",
        "hotel",
        "train",
        "flight",
        "invoice",
        "order",
    ),
    *("customer", "account", "with", "price", "under", "and", "then", "book", "cancel", "compare"),
    *("report", "its", "average", "total", "city", "country", "date", "window", "number", "guests"),
)


def dialogues(count: int) -> Iterator[dict[str, Any]]:
    """Dialogues of two steps each, all different."""
    rng = random.Random(0)
    tools = [make_tool(number, random.Random(number)) for number in range(TOOLS)]
    for number in range(count):
        offered = rng.sample(tools, rng.randint(3, 6))
        called = offered[: rng.choice((1, 1, 2))]
        calls = [make_call(f"c{i}", tool, rng) for i, tool in enumerate(called)]
        results = [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "content": json.dumps({"ok": sentence(rng)}),
            }
            for call in calls
        ]
        yield {
            "messages": [
                {"role": "user", "content": f"{sentence(rng)} ({number})"},
                {"role": "assistant", "content": None, "tool_calls": calls},
                *results,
                {"role": "assistant", "content": sentence(rng)},
            ],
            "tools": [{"type": "function", "function": tool} for tool in offered],
        }


def make_tool(number: int, rng: random.Random) -> dict[str, Any]:
    """A tool of two to five parameters, one of them an object."""
    properties: dict[str, Any] = {
        f"{word}_{i}": {
            "type": "string",
            "description": sentence(rng),
            "default": rng.choice(WORDS),
        }
        for i, word in enumerate(rng.sample(WORDS, rng.randint(1, 4)))
    }
    inner = {"type": "object", "properties": {"most": {"type": "integer"}}}
    properties["filter"] = {"description": sentence(rng), **inner}
    schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    name = f"{rng.choice(WORDS)}_{rng.choice(WORDS)}_{number}"
    return {"name": name, "description": f"{sentence(rng)} {number}", "parameters": schema}


def make_call(name: str, tool: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A call of all parameters."""
    arguments: dict[str, Any] = dict.fromkeys(tool["parameters"]["properties"], rng.choice(WORDS))
    arguments["filter"] = {"most": rng.randint(0, 99)}
    function = {"name": tool["name"], "arguments": json.dumps(arguments)}
    return {"id": name, "type": "function", "function": function}


def sentence(rng: random.Random) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(6, 14)))


def write(path: pathlib.Path, form: str, count: int) -> None:
    """The file of dialogues: one a line, a list, or Parquet in one row group."""
    if form == "parquet":
        write_parquet(path, count)
        return
    start, between, end = ("[", ",\n", "]") if form == "list" else ("", "\n", "\n")
    with path.open("w", encoding="utf-8") as file:
        file.write(start)
        for number, item in enumerate(dialogues(count)):
            file.write((between if number else "") + json.dumps(item))
        file.write(end)


def write_parquet(path: pathlib.Path, count: int) -> None:
    """The questions with their first calls in the xlam form (text columns), all in one row group."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[str]] = {"query": [], "tools": [], "answers": []}
    for item in dialogues(count):
        question, action = item["messages"][:2]
        answers = [
            {"name": f["name"], "arguments": json.loads(f["arguments"])}
            for f in (call["function"] for call in action["tool_calls"])
        ]
        columns["query"].append(question["content"])
        columns["tools"].append(json.dumps([tool["function"] for tool in item["tools"]]))
        columns["answers"].append(json.dumps(answers))
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=count)


def measure(records: int, form: str, ending: str, extra: list[str]) -> dict[str, Any]:
    """Generates, prepares in a process of its own, and tells what it took. RuntimeError when the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = pathlib.Path(folder, "in.json"), pathlib.Path(folder, f"out.{ending}")
        layout, per_item = ("xlam", 1) if form == "parquet" else ("openai", 2)
        # in a process of its own: on Linux a child starts with the peak memory of the process that makes it
        writing = multiprocessing.get_context("spawn").Process(
            target=write, args=(source, form, -(-records // per_item))
        )
        writing.start()
        writing.join()
        if writing.exitcode:
            raise RuntimeError(f"the file was not written ({writing.exitcode})")
        command = [sys.executable, "-m", "rest_jax", "data", "prepare", layout, str(source)]
        begun = time.perf_counter()
        process = subprocess.Popen(
            [*command, str(out), *OPTIONS, *extra], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"the command ended with {process.returncode}")
        told = json.loads(out.with_name(f"{out.name}.summary.json").read_bytes())
        return {
            "case": "prepare",
            "form": form,
            "ending": ending,
            "records": told["converted"],
            "kept": told["train"]["records"] + told["eval"]["records"],
            "input_bytes": source.stat().st_size,
            "output_bytes": out.stat().st_size,
            "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "wall_seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "records_per_cpu_second": told["converted"] / (usage.ru_utime + usage.ru_stime),
        }


def main(argv: list[str] | None = None) -> int:
    """0; 1 when the command fails; 2 for bad arguments."""
    parser = Parser(prog="python -m benchmarks.preparing", description=DESCRIPTION)
    parser.add_argument("--records", type=positive, default=1_000_000)
    parser.add_argument(
        "--form", choices=("jsonl", "list", "parquet"), default="jsonl", help="of the input"
    )
    parser.add_argument("--ending", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--tokenizer", help="HF folder or hub id: counts tokens too")
    args: argparse.Namespace = parser.parse_args(argv)
    extra = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    try:
        print(json.dumps(measure(args.records, args.form, args.ending, extra)))
    except (RuntimeError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
