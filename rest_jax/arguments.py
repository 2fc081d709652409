"""The words of the command line: which commands there are, what each takes, its help. What they do is in cli.py.

In: the words, and a function for each command. Out: a namespace with the values, and the function as `command`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence

from rest_jax import __version__

# The function of each command, by its name; those of `data` by their second word.
Commands = Mapping[str, Callable[[argparse.Namespace], int]]

MODEL_HELP = "HF folder, hub id, converted folder, or the folder of a run"
DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: Sequence[str] | None, commands: Commands) -> argparse.Namespace:
    """The words of a command line (default: the program's own); `command` is the function of `commands` to call with them.
    SystemExit as of argparse. Overrides may stand before and after options, which argparse alone refuses.
    """
    parser = build(commands)
    arguments, left = parser.parse_known_args(argv)
    if left and (any(word.startswith("-") for word in left) or "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


def build(commands: Commands) -> argparse.ArgumentParser:
    """The parser of all commands; `commands` has a function for each."""
    parser = argparse.ArgumentParser(
        prog="rest-jax",
        description="ResT: entropy-reshaped policy gradients for tool-use language models.",
    )
    parser.add_argument("--version", action="version", version=f"rest-jax {__version__}")
    parts = parser.add_subparsers(title="commands", required=True, metavar="<command>")
    for add in (
        _training,
        _sweep,
        _study,
        _conversion,
        _sampling,
        _variance,
        _data,
        _rest,
    ):
        add(parts, commands)
    return parser


def _training(parts, commands: Commands) -> None:
    """`train` and `sft`."""
    for name, what in (
        ("train", "run a recipe: ResT, GRPO or one of their variants, or supervised"),
        ("sft", "run a recipe as supervised training on the gold answers"),
    ):
        run = _add(parts, commands, name, what)
        run.add_argument("config", nargs="+", help="YAML files or names (scale/tiny), key=value")
        run.set_defaults(overrides=[])
        run.add_argument(
            "--distributed",
            action="store_true",
            help="one process of many: one a host, under SLURM one a GPU",
        )
        run.add_argument(
            "--dry-run", action="store_true", help="check config, model and data, train nothing"
        )

        if name == "train":
            run.add_argument(
                "--profile",
                type=_positive,
                metavar="STEP",
                help="write a trace of that step to the run's folder, for Perfetto or xprof",
            )


def _sweep(parts, commands: Commands) -> None:
    sweep = _add(parts, commands, "sweep", "search config values: many trials, many workers")
    sweep.add_argument("config", help="a YAML file, or the name of a shipped recipe")
    sweep.add_argument("space", help="a SPACE.yaml, or the name of a shipped one (curriculum)")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="for every trial")
    sweep.add_argument("--base", metavar="CONFIG", help="as of train")
    sweep.add_argument(
        "--storage", help="journal file or database URL (default: journal.log of the sweep)"
    )
    sweep.add_argument("--trials", type=_positive, help="trials of this worker at most")
    sweep.add_argument("--workers", type=_positive, default=1, help="processes on this machine")
    sweep.add_argument(
        "--stale",
        type=_positive,
        default=120,
        metavar="SECONDS",
        help="a worker silent for so long is dead (default: 120); the same for all workers",
    )
    sweep.add_argument(
        "--results", action="store_true", help="write and print the results so far, run nothing"
    )
    sweep.add_argument("--quiet", action="store_true", help="no results at the end")


def _study(parts, commands: Commands) -> None:
    study = _add(parts, commands, "study", "compare methods over seeds, with intervals")
    study.add_argument("study", nargs="+", help="a study file, or the name of a shipped one")
    study.add_argument("--workers", type=_positive, help="runs at once (default: one a core)")
    study.add_argument("--output", default="docs/study", help="folder of the page")
    study.add_argument("--report", action="store_true", help="only write the page of what is done")
    study.add_argument("--dry-run", action="store_true", help="check every run's config only")
    study.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="key=value",
        help="a config value for every run",
    )  # fmt: skip


def _conversion(parts, commands: Commands) -> None:
    """`convert` and `export`."""
    convert = _add(parts, commands, "convert", "turn an HF model into a converted folder")
    convert.add_argument("source", help="HF folder with safetensors, or hub id")
    convert.add_argument("out", help="folder to make")

    export = _add(parts, commands, "export", "write a model as an HF folder")
    export.add_argument("source", help=MODEL_HELP)
    export.add_argument("out", help="folder to make")
    export.add_argument("--dtype", choices=DTYPES, help="default: as the source has it")


def _sampling(parts, commands: Commands) -> None:
    """`generate` and `evaluate`."""
    generate = _add(parts, commands, "generate", "sample answers")
    generate.add_argument("model", help=MODEL_HELP)
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="what the user says")
    asked.add_argument(
        "--file", help="records (any format of `data`): one answer each, as JSON lines"
    )
    generate.add_argument("--tools", help="JSON file with the list of tools offered to --prompt")
    generate.add_argument("--samples", type=_positive, default=1, help="answers a prompt")
    generate.add_argument("--greedy", action="store_true", help="the most probable token each time")
    _add_settings(generate)

    evaluate = _add(parts, commands, "evaluate", "score greedy answers to held-out records")
    evaluate.add_argument("model", help=MODEL_HELP)
    evaluate.add_argument("data", nargs="+", help="record files, or synthetic:eval")
    evaluate.add_argument("--output", help="JSONL file for every answer with its scores")
    _add_settings(evaluate)


def _variance(parts, commands: Commands) -> None:
    variance = _add(
        parts, commands, "variance", "gradient variance under each weight rule, and the theory"
    )
    variance.add_argument("model", help=MODEL_HELP)
    variance.add_argument("data", help="record file, or synthetic:eval")
    variance.add_argument("--prompts", type=_positive, default=32, help="prompts (default: 32)")
    variance.add_argument(
        "--tokens", type=_positive, default=32, help="tokens a region, for beta (default: 32)"
    )
    variance.add_argument(
        "--output", help="folder for the JSON, CSV and PNG (default: variance/ of the run)"
    )
    _add_settings(variance)


def _data(parts, commands: Commands) -> None:
    """`data prepare` and `data inspect`."""
    what = "make records of other people's data, look at files of records"
    data = parts.add_parser("data", help=what, description=f"{what.capitalize()}.")
    below = data.add_subparsers(title="commands", required=True, metavar="<command>")
    _add_prepare(below, commands)
    inspect = _add(below, commands, "inspect", "what a file of records holds")
    inspect.add_argument("file", help="a file of records, of any kind, or synthetic:train")
    inspect.add_argument("--tokenizer", help="HF folder or hub id: adds token counts")
    _add_settings(inspect)


def _rest(parts, commands: Commands) -> None:
    """`report` and `quickstart`."""
    report = _add(parts, commands, "report", "redraw the curves of a run and print its table")
    report.add_argument("run", help="the run's folder")

    quickstart = _add(parts, commands, "quickstart", "train the tiny shipped policy, on CPU")
    quickstart.add_argument("--seed", type=int, help="another seed than the recipe's")
    quickstart.add_argument("--fresh", action="store_true", help="forget an earlier quickstart run")


def _add(parts, commands: Commands, name: str, what: str) -> argparse.ArgumentParser:
    parser = parts.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(command=commands[name])
    return parser


def _add_prepare(parts, commands: Commands) -> None:
    prepare = _add(parts, commands, "prepare", "make training records of other people's data")
    prepare.add_argument("source", help="layout of the files: openai, toolace, xlam, records, ...")
    prepare.add_argument("inputs", nargs="+", metavar="IN", help="JSONL, JSON list or Parquet")
    prepare.add_argument("out", metavar="OUT", help="OUT.jsonl or OUT.parquet")
    prepare.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    for name, what in (
        ("--mask-names", "of records whose tool and parameter names become random words"),
        ("--irrelevance", "of records whose right tool is taken away"),
        ("--held-out", "of tools that only OUT's .eval twin has"),
    ):
        prepare.add_argument(name, type=float, default=0.0, metavar="FRACTION", help=what)
    prepare.add_argument(
        "--irrelevance-response", metavar="TEXT", help="the answer when the right tool is missing"
    )
    prepare.add_argument("--keep-duplicates", action="store_true", help="default: dropped")
    prepare.add_argument("--tokenizer", help="HF folder or hub id: counts tokens")
    prepare.add_argument(
        "--max-tokens", type=_positive, help="longer records (prompt and answer) are dropped"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace OUT and its side files")
    _add_settings(prepare)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_positive, help="records to read at most")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="key=value",
        help="a config value, e.g. data.template=hermes; a run's own config is the default",
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 is needed")
    return value
