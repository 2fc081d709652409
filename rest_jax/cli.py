"""The command line: `rest-jax <command> ...`, or `python -m rest_jax`.

Commands are thin: they read arguments and call the room that does the work, which is imported only then, so that
`--help` is instant. Exit codes: 0 done (also when SIGTERM ended a run after saving), 1 a run stopped itself (NaN), 2
input that cannot be used, as one line on stderr, 130 Ctrl-C, 143 SIGTERM to `data prepare`. Any other error is a defect
and shows its traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rest_jax import __version__, machine
from rest_jax.errors import RunStopped, UserError

if TYPE_CHECKING:
    from rest_jax.config import Config

MODEL_HELP = "HF folder, hub id, converted folder, or the folder of a run"
DTYPES = ("float32", "bfloat16", "float16")


def entry() -> int:
    """`main` as a program of its own: the process is set up for the machine first."""
    machine.relaunch_tuned()
    machine.configure()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = _parse(argv)
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        return _fail(str(error), 2)
    except (
        FileNotFoundError,
        PermissionError,
        NotADirectoryError,
        IsADirectoryError,
        FileExistsError,
    ) as error:
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror or error}", 2)
    except RunStopped as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options, which argparse alone refuses."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    if left and (any(word.startswith("-") for word in left) or "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


def _fail(message: str, code: int) -> int:
    print(f"rest-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _load_config(arguments: argparse.Namespace) -> "Config":
    from rest_jax import config, shipped

    path = shipped.find_config(arguments.config)
    trainer = "sft" if arguments.command is _sft else None
    return config.resolve(config.load(path, arguments.overrides, arguments.base, trainer))


def _join_hosts(arguments: argparse.Namespace) -> None:
    """Before anything touches a device."""
    if arguments.distributed:
        from rest_jax import hosts

        hosts.join()


def _train(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    _join_hosts(arguments)
    from rest_jax import stages

    return stages.run(config, arguments.dry_run, arguments.profile)


def _sft(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    _join_hosts(arguments)
    from rest_jax import stages

    return stages.run(config, arguments.dry_run)


def _convert(arguments: argparse.Namespace) -> int:
    from rest_jax import shipped
    from rest_jax.models import hf

    hf.convert(shipped.locate(arguments.source), arguments.out)
    print(f"converted {arguments.source} to {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from rest_jax import commands

    return commands.export(arguments.source, arguments.out, arguments.dtype)


def _generate(arguments: argparse.Namespace) -> int:
    from rest_jax import commands

    return commands.generate(
        arguments.model,
        prompt=arguments.prompt,
        tools=arguments.tools,
        file=arguments.file,
        limit=arguments.limit,
        samples=arguments.samples,
        greedy=arguments.greedy,
        overrides=arguments.settings,
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from rest_jax import commands

    return commands.evaluate(
        arguments.model,
        arguments.data,
        limit=arguments.limit,
        output=arguments.output,
        overrides=arguments.settings,
    )


def _variance(arguments: argparse.Namespace) -> int:
    from rest_jax import variance

    return variance.run(
        arguments.model,
        arguments.data,
        prompts=arguments.prompts,
        tokens=arguments.tokens,
        limit=arguments.limit,
        output=arguments.output,
        overrides=arguments.settings,
    )


def _prepare(arguments: argparse.Namespace) -> int:
    from rest_jax import config
    from rest_jax.data import pipeline, prepare_settings, termination

    prepare_settings.check_settings(arguments.settings)
    data = config.from_overrides(
        {"name": "data", "model": {"source": "none"}}, arguments.settings
    ).data
    settings = prepare_settings.Settings(
        source=arguments.source,
        inputs=tuple(arguments.inputs),
        out=arguments.out,
        seed=arguments.seed,
        mask_names=arguments.mask_names,
        irrelevance=arguments.irrelevance,
        irrelevance_response=arguments.irrelevance_response,
        held_out=arguments.held_out,
        keep_duplicates=arguments.keep_duplicates,
        tokenizer=arguments.tokenizer,
        max_tokens=arguments.max_tokens,
        template=data.template,
        brief=data.brief_prompt,
        limit=arguments.limit,
        overwrite=arguments.overwrite,
        not_for_training=arguments.not_for_training,
    )
    try:
        with termination.raised_on_sigterm():
            print(pipeline.run(settings).to_text())
    except termination.Terminated:
        return _fail("terminated", 143)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from rest_jax import commands

    return commands.inspect(
        arguments.file,
        tokenizer=arguments.tokenizer,
        limit=arguments.limit,
        overrides=arguments.settings,
    )


def _sweep(arguments: argparse.Namespace) -> int:
    from rest_jax import shipped, sweep

    return sweep.run(
        shipped.find_config(arguments.config),
        shipped.find_space(arguments.space),
        arguments.overrides,
        based_on=arguments.base,
        storage=arguments.storage,
        trials=arguments.trials,
        workers=arguments.workers,
        stale=arguments.stale,
        only_results=arguments.results,
        quiet=arguments.quiet,
    )


def _study(arguments: argparse.Namespace) -> int:
    from rest_jax.study import command

    return command.run(
        arguments.study,
        workers=arguments.workers,
        output=arguments.output,
        overrides=arguments.settings,
        report_only=arguments.report,
        dry_run=arguments.dry_run,
    )


def _report(arguments: argparse.Namespace) -> int:
    from rest_jax.report import write_report

    print(write_report(arguments.run))
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from rest_jax import quickstart

    return quickstart.run(seed=arguments.seed, fresh=arguments.fresh)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest-jax",
        description="ResT: entropy-reshaped policy gradients for tool-use language models.",
    )
    parser.add_argument("--version", action="version", version=f"rest-jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="<command>")

    for name, command, what in (
        ("train", _train, "run a recipe: ResT, GRPO or one of their variants, or supervised"),
        ("sft", _sft, "run a recipe as supervised training on the gold answers"),
    ):
        run = _add(commands, name, command, what)
        run.add_argument("config", help="a YAML file, or the name of a shipped recipe")
        run.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=10")
        run.add_argument(
            "--base",
            metavar="CONFIG",
            help="what the recipe is built on, instead of its own base, e.g. qwen3_1p7b_rlla",
        )
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

    sweep = _add(commands, "sweep", _sweep, "search config values: many trials, many workers")
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

    study = _add(commands, "study", _study, "compare methods over seeds, with intervals")
    study.add_argument("study", nargs="+", help="a study file, or the name of a shipped one")
    study.add_argument("--workers", type=_positive, help="runs at once (default: one a core)")
    study.add_argument("--output", default="docs/study", help="folder of the page")
    study.add_argument("--report", action="store_true", help="only write the page of what is done")
    study.add_argument("--dry-run", action="store_true", help="check every run's config only")
    study.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="key=value",
        help="a config value for every run",
    )  # fmt: skip

    convert = _add(commands, "convert", _convert, "turn an HF model into a converted folder")
    convert.add_argument("source", help="HF folder with safetensors, or hub id")
    convert.add_argument("out", help="folder to make")

    export = _add(commands, "export", _export, "write a model as an HF folder")
    export.add_argument("source", help=MODEL_HELP)
    export.add_argument("out", help="folder to make")
    export.add_argument("--dtype", choices=DTYPES, help="default: as the source has it")

    generate = _add(commands, "generate", _generate, "sample answers")
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

    evaluate = _add(commands, "evaluate", _evaluate, "score greedy answers to held-out records")
    evaluate.add_argument("model", help=MODEL_HELP)
    evaluate.add_argument("data", nargs="+", help="record files, or synthetic:eval")
    evaluate.add_argument("--output", help="JSONL file for every answer with its scores")
    _add_settings(evaluate)

    variance = _add(
        commands, "variance", _variance, "gradient variance under each weight rule, and the theory"
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

    what = "make records of other people's data, look at files of records"
    data = commands.add_parser("data", help=what, description=f"{what.capitalize()}.")
    parts = data.add_subparsers(title="commands", required=True, metavar="<command>")
    _add_prepare(parts)
    inspect = _add(parts, "inspect", _inspect, "what a file of records holds")
    inspect.add_argument("file", help="a file of records, of any kind, or synthetic:train")
    inspect.add_argument("--tokenizer", help="HF folder or hub id: adds token counts")
    _add_settings(inspect)

    report = _add(commands, "report", _report, "redraw the curves of a run and print its table")
    report.add_argument("run", help="the run's folder")

    quickstart = _add(commands, "quickstart", _quickstart, "train the tiny shipped policy, on CPU")
    quickstart.add_argument("--seed", type=int, help="another seed than the recipe's")
    quickstart.add_argument("--fresh", action="store_true", help="forget an earlier quickstart run")
    return parser


def _add(commands, name: str, command, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_prepare(parts) -> None:
    prepare = _add(parts, "prepare", _prepare, "make training records of other people's data")
    prepare.add_argument("source", help="layout of the files: openai, toolace, xlam, records, ...")
    prepare.add_argument("inputs", nargs="+", metavar="IN", help="JSONL, JSON list or Parquet")
    prepare.add_argument("out", metavar="OUT", help="OUT.jsonl, .parquet or .array_record")
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
    prepare.add_argument(
        "--not-for-training", action="store_true", help="a benchmark may be prepared with this"
    )
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
