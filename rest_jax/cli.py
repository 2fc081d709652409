"""The command line: `rest-jax <command> ...`, or `python -m rest_jax`.

Commands are thin: they read arguments (arguments.py) and call the room that does the work, which is imported only then,
so that `--help` is instant. Exit codes: 0 done (also when SIGTERM ended a run after saving), 1 a run stopped itself (NaN), 2
input that cannot be used, as one line on stderr, 130 Ctrl-C, 143 SIGTERM to `data prepare`. Any other error is a defect
and shows its traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rest_jax.arguments import parse
from rest_jax.errors import RunStopped, UserError
from rest_jax.run import machine

if TYPE_CHECKING:
    from rest_jax.config import Config


def entry() -> int:
    """`main` as a program of its own: the process is set up for the machine first."""
    machine.relaunch_tuned()
    machine.configure()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = parse(argv, COMMANDS)
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


def _fail(message: str, code: int) -> int:
    print(f"rest-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _load_config(arguments: argparse.Namespace) -> "Config":
    from rest_jax import config

    words = [*arguments.config, *arguments.overrides]
    files = [word for word in words if "=" not in word]
    return config.load(files, [word for word in words if "=" in word])


def _join_hosts(arguments: argparse.Namespace) -> None:
    """Before anything touches a device."""
    if arguments.distributed:
        from rest_jax import distributed as hosts

        hosts.join()


def _train(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    _join_hosts(arguments)
    from rest_jax import train

    return train.run(config, arguments.dry_run, arguments.profile)


def _sft(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    _join_hosts(arguments)
    from rest_jax import sft

    return sft.run(config, arguments.dry_run)


def _convert(arguments: argparse.Namespace) -> int:
    from rest_jax import config
    from rest_jax.models.hf import write as hf

    hf.convert(config.locate(arguments.source), arguments.out)
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
    from rest_jax.analysis.variance import command as variance

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
    from rest_jax.data.prepare import pipeline, termination
    from rest_jax.data.prepare import settings as prepare_settings

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
    from rest_jax.experiments import search
    from rest_jax.experiments.worker import Engine

    engine = Engine(arguments.workers, arguments.storage)
    search.sweep(
        [arguments.config],
        arguments.overrides,
        arguments.space,
        engine=engine,
        trials=arguments.trials,
    )
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from rest_jax.experiments import compare
    from rest_jax.experiments.worker import Engine

    engine = Engine(0 if arguments.report else arguments.workers or 1)
    compare.compare(arguments.study, output=arguments.output, engine=engine)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rest_jax.analysis.report import write_report

    print(write_report(arguments.run))
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from rest_jax import quickstart

    return quickstart.run(seed=arguments.seed, fresh=arguments.fresh)


COMMANDS = {
    "train": _train,
    "sft": _sft,
    "sweep": _sweep,
    "study": _study,
    "convert": _convert,
    "export": _export,
    "generate": _generate,
    "evaluate": _evaluate,
    "variance": _variance,
    "prepare": _prepare,
    "inspect": _inspect,
    "report": _report,
    "quickstart": _quickstart,
}
