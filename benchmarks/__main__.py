"""python -m benchmarks CASE [sizes]: one measured process of ours, its record as one JSON line on stdout."""

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks import process

DESCRIPTION = "One measured process; its record is one JSON line on stdout."


def load_cases() -> dict[str, Any]:
    """Name -> (adds its arguments to a parser, makes the work from them). Imports jax."""
    from benchmarks import host, rollout, serving, sft, step, update

    return {
        "rollout": (rollout.add_arguments, rollout.make_work),
        "update": (update.add_arguments, update.make_work),
        "skipping": (update.add_arguments, update.make_skipping_work),
        "step": (step.add_arguments, step.make_work),
        "sft": (sft.add_arguments, sft.make_work),
        "host": (host.add_arguments, host.make_work),
        "serve": (serving.add_arguments, serving.make_work),
    }


def make_parser(cases: dict[str, Any]) -> process.Parser:
    """The cases, each with the sizes it takes."""
    parser = process.Parser(prog="python -m benchmarks", description=DESCRIPTION)
    parts = parser.add_subparsers(dest="case", required=True, parser_class=process.Parser)
    for name, (add_arguments, _) in cases.items():
        part = parts.add_parser(name)
        add_arguments(part)
        part.add_argument("--repeats", type=process.positive, default=3, help="timed calls")
    part = parts.add_parser("export", help="random weights as an HF folder")
    part.add_argument("model", help="model-a or a preset")
    part.add_argument("out", type=pathlib.Path)
    part.add_argument("--vocab", type=process.positive)
    part = parts.add_parser("requests", help="chats with tools, for serve and its peer")
    part.add_argument("model", help="the HF folder whose ids they have")
    part.add_argument("out", type=pathlib.Path)
    part.add_argument("--count", type=process.positive, required=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """0; 1 when the case fails, which is said in one line; 2 for bad arguments."""
    cases = load_cases()
    args = make_parser(cases).parse_args(argv)
    try:
        if args.case == "export":
            export(args)
        elif args.case == "requests":
            write_requests(args)
        else:
            make_work = cases[args.case][1]
            print(json.dumps(process.measure(args.case, lambda: make_work(args), args.repeats)))
    except (ValueError, OSError) as error:
        print(f"benchmarks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def export(args: argparse.Namespace) -> None:
    """Writes the folder."""
    from benchmarks import policies

    policies.write_folder(args.model, args.vocab, args.out)


def write_requests(args: argparse.Namespace) -> None:
    """Writes the file."""
    from benchmarks import serving

    serving.write_requests(args.model, args.count, args.out)


if __name__ == "__main__":
    process.start()  # before jax is imported
    sys.exit(main())
