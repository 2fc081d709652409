"""The command line: `rest-jax <command> ...`, or `python -m rest_jax`.

One typed function for each command: it reads its words and calls the module that does the work, which is imported only then,
so that `--help` is quick. A word `key=value` is a config value, any other is a file. Exit codes: 0 done, 1 a run stopped
itself (NaN) or the disk is full, 2 input that cannot be used, as one line on stderr, 75 a run that was told to stop (SIGTERM,
Ctrl-C, SIGHUP) and has saved, 130 Ctrl-C elsewhere, 143 SIGTERM to `data prepare`, or to a run that waits in vain. Any other
error is a defect and shows its traceback.
"""

import contextlib
import errno
import io
import json
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from rest_jax import __version__
from rest_jax.errors import RunStopped, UserError, full_disk
from rest_jax.texts import one_line, print_text

if TYPE_CHECKING:
    from rest_jax.config import Config
    from rest_jax.files import Location

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
data_app = typer.Typer(help="Prepare training records, look at them.", no_args_is_help=True)
# How `rest-jax --help` groups the commands.
_TRAIN, _MODEL, _STUDY, _LOOK = "Train", "Use a model", "Experiments", "Data and reports"
_STATUS = re.compile(r"[A-Z_]{5,}: ")  # what begins an error of XLA
_CANNOT_OPEN = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
)


def entry() -> int:
    """`main` as the console program: XLA is set up for the machine first, and stdout for any text."""
    from rest_jax.run import environment

    environment.configure()
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is by itself
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        with full_disk("output"):
            code = command.main(argv, "rest-jax", standalone_mode=False) or 0
    except typer.TyperException as error:
        return _fail(_usage(error), error.exit_code)
    except UserError as error:
        return _fail(str(error), 2)
    except RunStopped as error:
        return _fail(str(error), 1)
    except Exception as error:
        if fault := _unusable_file(error):
            return _fail(fault, 2)
        if fault := _lost_peer(error):
            return _fail(fault, 1)
        raise
    return _fail("interrupted", code) if code == 130 else code


def _unusable_file(error: Exception) -> str | None:
    """What the system says of a file that cannot be opened, made or written; None for a disk that fails and for other errors."""
    if not isinstance(error, OSError):
        return None
    names_file = error.filename is not None and error.errno not in (None, errno.EIO)
    if not (names_file or isinstance(error, _CANNOT_OPEN)):
        return None
    from rest_jax.files import PARTIAL

    # What is written beside a file is about that file.
    name = PARTIAL.sub("", str(error.filename or ""))
    return f"{name}: {error.strerror or error}".removeprefix(": ")


def _lost_peer(error: Exception) -> str | None:
    """Why a computation over many processes failed, if another process is lost; then its error is no news."""
    if "jax" not in sys.modules or "rest_jax.run.processes" not in sys.modules:
        return None
    import jax

    from rest_jax.run import processes

    # What the collectives of a CPU say of a peer that is gone comes as a ValueError where a call compiles.
    broken = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
    return processes.lost_peer() if broken else None


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the words, and where the right ones are listed; "" when the help itself has been printed."""
    message = error.format_message().strip().rstrip(".").replace("Value error, ", "", 1)
    faults = getattr(error.__cause__, "errors", list)()  # pydantic's, of a value
    inputs = (repr(fault["input"]) for fault in faults)
    message += "".join(f", not {given}" for given in inputs if given not in message)
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if message and context else message


def _fail(message: str, code: int) -> int:
    message = one_line(message)
    if "rest_jax.run.processes" in sys.modules:
        from rest_jax.run import processes

        processes.leave(message, code)  # and a process of many ends here
    if message:
        print_text(f"rest-jax: error: {message}", sys.stderr)
    return code


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files, overrides): a word with "=" before any path separator is an override, `./a=b` is a file."""
    overrides = [word for word in words if "=" in re.split(r"[/\\]", word)[0]]
    return [word for word in words if word not in overrides], overrides


def _once(words: list[str] | None) -> list[str] | None:
    """The words of a command line, each key among them with one value. UserError for a key that has two."""
    given: dict[str, str] = {}
    for word in split(words or [])[1]:
        key, _, value = word.partition("=")
        if given.setdefault(key, value) != value:
            raise UserError(f"{key}: two values, {given[key]!r} and {value!r}; give one")
    return words


def _load(
    words: Sequence[str], world: str | None, fork: str | None
) -> "tuple[Config, Location | None]":
    """The config of a training run, and the folder of the run that it forks, if it does. It joins the other processes before
    anything touches a device; alone it looks at once, before jax is imported, whether the folder is free.
    """
    from rest_jax import config

    loaded = config.load(*split(words))
    fork_of = None if fork is None else loaded.folder
    if fork is not None:
        loaded = loaded.renamed(fork, "--fork")
    if world is None:
        from rest_jax.run import lock

        lock.check_free(loaded.folder)
    _join(world, loaded)
    return loaded, fork_of


def _load_model(
    model: str, overrides: Sequence[str], world: str | None, plugins: bool = False
) -> "Config":
    """The config to use a model under, once this process has joined the others; with the `plugins` that a run names itself."""
    from rest_jax.run.load import config_of

    _once(list(overrides))  # some of them options of the command line
    loaded = config_of(model, overrides, plugins)
    _join(world, loaded)
    return loaded


def _load_measured(name: str, options: dict[str, Any]) -> "Config":
    """`_load_model` of the options of a measurement, which are taken out of them. UserError for a folder that its results cannot
    be written to.
    """
    names = ("model", "overrides", "distributed", "plugins")
    config = _load_model(*(options.pop(name, None) for name in names))
    from rest_jax.analysis.measured import check_result_folder

    check_result_folder(config, options["output"], name)
    return config


def _join(world: str | None, config: "Config") -> None:
    if world is not None:
        from rest_jax.run import processes

        processes.join(world, config.distributed)


Configs = Annotated[
    list[str],
    Argument(
        metavar="FILE|KEY=VALUE",
        help="YAML files or builtin names, merged left to right, then single values",
        callback=_once,
    ),
]
Overrides = Annotated[
    list[str],
    Argument(
        metavar="KEY=VALUE",
        help="config values, e.g. seed=1",
        callback=_once,
        default_factory=list,
        show_default=False,
    ),
]
Model = Annotated[str, Argument(help="HF folder, hub id, converted folder, or folder of a run")]
Run = Annotated[str, Argument(help="folder of a run")]
Out = Annotated[str, Argument(help="folder to make")]
DryRun = Annotated[bool, Option("--dry-run", help="check config, model and data, train nothing")]
Restart = Annotated[bool, Option("--restart", help="forget the run in the folder, start anew")]
Fork = Annotated[
    str | None,
    Option(
        metavar="NEW_NAME",
        help="continue from the newest checkpoint of the run in the folder, under this name and config",
    ),
]
Distributed = Annotated[
    str | None,
    Option(
        metavar="auto|I/N@HOST:PORT",
        help="one process of many: a host's, under SLURM a GPU's; auto on Cloud TPU, GKE, SLURM, Open MPI",
    ),
]
TemplateName = Annotated[
    Literal["toolrl", "hermes", "llama3"] | None,
    Option("--template", help="format of calls; default: the run's, or the chat template's"),
]
Plugins = Annotated[
    bool, Option("--plugins", help="run the code that the run's own config names (docs/plugins.md)")
]
Limit = Annotated[int | None, Option(min=1, help="records to read at most")]
Methods = Annotated[str, Option(help="of configs/method or files, with commas")]
_METHODS = (
    "grpo,rest,rest_inverse_gini,rest_mass,ablation_no_cot,top_entropy,htmr,gtpo,entropy_advantage,egpo,steer,covariance,"
    "a3po,hicra,ar,direction,less,tr_grpo,optimal_baseline,dr_grpo,rloo,maxrl,gdpo,reinforce_pp"
)
Workers = Annotated[int, Option(min=0, help="processes on this machine; 0: results so far")]
Storage = Annotated[str | None, Option(help="database URL, for many machines; default: SQLite")]
Tokenizer = Annotated[str | None, Option(help="HF folder or hub id: counts tokens")]


def _print_version(asked: bool) -> None:
    if asked:
        print_text(f"rest-jax {__version__}")
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="the version")
    ] = False,
) -> None:
    """ResT: entropy-reshaped policy gradients for tool-use language models."""


@app.command(rich_help_panel=_TRAIN)
def train(
    words: Configs,
    dry_run: DryRun = False,
    profile: Annotated[
        int | None, Option(min=1, metavar="STEP", help="write a trace of it, for Perfetto or xprof")
    ] = None,
    restart: Restart = False,
    fork: Fork = None,
    distributed: Distributed = None,
) -> int:
    """Train with ResT, GRPO or one of their variants; the same command resumes."""
    config, fork_of = _load(words, distributed, fork)
    from rest_jax import train

    return train.train(config, dry_run, profile, restart, fork_of)


@app.command(rich_help_panel=_TRAIN)
def sft(
    words: Configs,
    dry_run: DryRun = False,
    restart: Restart = False,
    fork: Fork = None,
    distributed: Distributed = None,
) -> int:
    """Train on the gold answers (supervised); the same command resumes."""
    config, fork_of = _load(words, distributed, fork)
    from rest_jax import sft

    return sft.finetune(config, dry_run, restart, fork_of)


@app.command(rich_help_panel=_TRAIN)
def plan(
    words: Configs,
    topology: Annotated[
        str,
        Option(metavar="NAME", help="v5e:4x4, v5p:2x2x4, 2xv6e:4x4 (2 slices), h100:4x8, cpu:8"),
    ],
    prompt_tokens: Annotated[
        int | None, Option(min=1, help="of every prompt, for the time; default: the longest")
    ] = None,
    response_tokens: Annotated[int | None, Option(min=1, help="of every response")] = None,
    supervised: Annotated[
        bool | None,
        Option(
            "--sft/--train",
            help="which command; default: that of the run whose config it is; sft if the config sets a key of sft",
        ),
    ] = None,
    json: Annotated[str | None, Option(metavar="FILE", help="write everything as JSON")] = None,
    output: Annotated[str | None, Option(metavar="FILE", help="draw the memory, as PNG")] = None,
) -> int:
    """Compile for hardware that is not here: memory, traffic, speed; exit code 1 if it does not fit."""
    from rest_jax import config
    from rest_jax.files import check_output, local_path
    from rest_jax.planning import plan

    files, overrides = split(words)
    for option, written in (("--json", json), ("--output", output)):
        if written is not None:
            check_output(local_path(option, written), map(config.builtin_file, files), option)
    loaded = config.load(files, overrides)
    if supervised is None:
        supervised = plan.is_supervised(loaded, files)
    options = plan.Options(topology, supervised, prompt_tokens, response_tokens, json, output)
    return plan.plan(loaded, options)


@app.command(rich_help_panel=_TRAIN)
def quickstart(
    overrides: Overrides,
    seed: Annotated[int | None, Option(min=0, help="short for seed=N")] = None,
    fresh: Annotated[bool, Option("--fresh", help="forget an earlier quickstart run")] = False,
) -> int:
    """Train, evaluate and export a tiny policy on CPU, in minutes."""
    from rest_jax import quickstart

    words = [*([] if seed is None else [f"seed={seed}"]), *overrides]
    _once(words)
    return quickstart.quickstart(words, fresh)


@app.command(rich_help_panel=_TRAIN)
def audit(
    run: Run,
    overrides: Overrides,
    steps: Annotated[int, Option(min=1, help="to repeat; the run's metrics say which")] = 3,
    seed: Annotated[int, Option(help="of their choice, so that nobody knew them before")] = 0,
    at: Annotated[
        list[int] | None, Option("--at", metavar="STEP", help="this step instead; may be repeated")
    ] = None,
    output: Annotated[
        str | None, Option(metavar="FILE", help="the certificate; default: audit.json of the run")
    ] = None,
    plugins: Plugins = False,
    distributed: Distributed = None,
) -> int:
    """Repeat some steps of a run and compare all that it recorded; exit code 1 if anything differs."""
    _load_model(run, [], distributed)
    from rest_jax.audit import audit

    return audit(run, steps, seed, at or (), overrides, plugins, output)


@app.command(rich_help_panel=_TRAIN)
def reproduce(
    run: Run,
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="NEW_NAME|KEY=VALUE",
            help="default: <run>-reproduced, beside it",
            callback=_once,
        ),
    ] = None,
    strict: Annotated[bool, Option("--strict", help="refuse other versions and devices")] = False,
    plugins: Plugins = False,
    distributed: Distributed = None,
) -> int:
    """Train a run again from what it recorded, and say where the two first differ (exit code 1)."""
    names, overrides = split(words or [])
    if len(names) > 1:
        raise UserError(f"reproduce: one name is needed, not {', '.join(names)}")
    _load_model(run, [], distributed)
    from rest_jax.reproduce import reproduce

    return reproduce(run, next(iter(names), None), overrides, strict, plugins)


@app.command(rich_help_panel=_MODEL)
def generate(
    model: Model,
    overrides: Overrides,
    prompt: Annotated[str | None, Option(help="what the user says")] = None,
    file: Annotated[str | None, Option(help="records instead; the output is JSON lines")] = None,
    tools: Annotated[str | None, Option(help="JSON file, the tools offered to --prompt")] = None,
    samples: Annotated[int, Option(min=1, help="completions to each prompt")] = 1,
    greedy: Annotated[bool, Option("--greedy", help="the most probable token each time")] = False,
    limit: Limit = None,
    distributed: Distributed = None,
) -> None:
    """Sample completions."""
    if (prompt is None) == (file is None):
        raise UserError("generate: exactly one of --prompt and --file is needed")
    if file is not None and tools is not None:
        raise UserError(
            "generate: --tools belong to --prompt; the records of --file have their own"
        )
    if file is None and limit is not None:
        raise UserError("generate: --limit belongs to --file")
    config = _load_model(model, overrides, distributed)
    from rest_jax.data.tokenize import load_split
    from rest_jax.distributed import say
    from rest_jax.rollout import generate

    records = (
        load_split(file, config.data, limit)
        if file is not None
        else [generate.prompt_record(str(prompt), tools)]
    )
    for record, texts in generate.generate(config, records, samples, greedy):
        for number, text in enumerate(texts, 1):
            if file is not None:
                say(json.dumps({"id": record.id, "text": text}))
            else:
                say(text if samples == 1 else f"--- {number} of {samples}\n{text}")


@app.command(rich_help_panel=_MODEL)
def serve(
    model: Model,
    overrides: Overrides,
    template: TemplateName = None,
    host: Annotated[str, Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any that is free")] = 8000,
    name: Annotated[str | None, Option(help="of the model; default: its folder's")] = None,
    api_key: Annotated[
        str | None, Option(envvar="REST_JAX_API_KEY", help="what clients must send")
    ] = None,
    max_queue: Annotated[
        int, Option(min=0, help="completions that may wait; more get status 429")
    ] = 256,
    max_body: Annotated[int, Option(min=1, help="bytes of a request")] = 2**22,
    drain: Annotated[float, Option(min=0, help="seconds to finish in after SIGTERM")] = 60.0,
) -> None:
    """Serve a policy over HTTP, to clients of OpenAI's API."""
    config = _load_model(model, [*_chosen(template), *overrides], None)
    from rest_jax.serving import server
    from rest_jax.serving.app import Access

    access = Access(api_key or None, max_body)
    server.serve(config, server.Options(host, port, name, max_queue, drain, access))


@app.command(rich_help_panel=_MODEL)
def chat(
    model: Annotated[
        str, Argument(help="as for generate, or the URL of a server: http://HOST:PORT")
    ],
    overrides: Overrides,
    template: TemplateName = None,
    tools: Annotated[
        str | None, Option(help="Python file, whose functions are called, or JSON list of tools")
    ] = None,
    world: Annotated[
        str | None,
        Option(
            metavar="NAME[:N]",
            help="a world of tools instead, synthetic or tau2:telecom, and its task N",
        ),
    ] = None,
    data: Annotated[
        str | None, Option(metavar="VENV", help="virtual environment with the package of tau2")
    ] = None,
    system: Annotated[str | None, Option(help="what the model is told first")] = None,
    temperature: Annotated[float, Option(min=0, max=2, help="0: greedy")] = 1.0,
    seed: Annotated[int | None, Option(help="of every completion")] = None,
    name: Annotated[str | None, Option(help="of the model at the URL; default: its first")] = None,
    api_key: Annotated[str | None, Option(envvar="REST_JAX_API_KEY", help="for the URL")] = None,
) -> None:
    """Talk to a model in the terminal; calls of tools are executed and shown."""
    import contextlib
    import secrets

    from rest_jax.serving import chat

    remote = re.match(r"https?://", model)
    if remote and (overrides or template):
        raise UserError(f"chat {model}: config values and --template are for a model to load")
    if tools is not None and world is not None:
        raise UserError("chat: --tools and --world are two sources of tools; give one")
    sampling = {"temperature": temperature} | ({} if seed is None else {"seed": seed})
    with contextlib.ExitStack() as stack:
        offered = stack.enter_context(chat.open_tools(tools, world, data))
        if not remote:
            config = _load_model(model, [*_chosen(template), *overrides], None)
            from rest_jax.serving import server
            from rest_jax.serving.app import Access

            api_key = secrets.token_hex()
            options = server.Options(port=0, access=Access(api_key))
            model = stack.enter_context(server.beside(config, options))
        chat.chat(chat.connect(model, name, api_key), offered, system, sampling)


def _chosen(template: str | None) -> list[str]:
    return [] if template is None else [f"data.template={template}"]


@app.command(rich_help_panel=_MODEL)
def evaluate(
    model: Annotated[
        str | None, Argument(help="HF folder, hub id, converted folder, or folder of a run")
    ] = None,
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="DATA|KEY=VALUE",
            help="record files, or synthetic:eval; config values",
            callback=_once,
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        Option(
            metavar="NAME", help="a public one instead of records: api_bank, bfcl_v3, bfcl_v4, tau2"
        ),
    ] = None,
    data: Annotated[
        str | None,
        Option(metavar="FOLDER", help="the files of api_bank; of others the virtual environment"),
    ] = None,
    categories: Annotated[
        str | None, Option(metavar="NAMES", help="of bfcl, with commas; default: all that are run")
    ] = None,
    samples: Annotated[
        int | None, Option(min=1, help="dialogues with each task of tau2, for pass^k")
    ] = None,
    temperature: Annotated[
        float | None, Option(min=0, help="of --benchmark; default: greedy")
    ] = None,
    max_response_tokens: Annotated[
        int | None, Option(min=1, help="short for rollout.max_response_tokens=N")
    ] = None,
    limit: Limit = None,
    output: Annotated[
        str | None,
        Option(help="file for every scored completion: JSONL, of --benchmark JSON"),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        Option(
            metavar="FIRST SECOND",
            help="result files, or those of --output, item by item; no model",
        ),
    ] = None,
    plugins: Plugins = False,
    distributed: Distributed = None,
) -> None:
    """Score completions to held-out records (greedy), or to a public benchmark; compare two results."""
    if compare is not None:
        others = (
            model,
            benchmark,
            data,
            categories,
            samples,
            temperature,
            max_response_tokens,
            limit,
            output,
            distributed,
        )
        if any(other is not None for other in others) or words or plugins:
            raise UserError("evaluate --compare: takes two result files and nothing else")
        from rest_jax.evaluation.benchmark import compare_results

        print_text(compare_results(*compare))
        return
    if model is None:
        raise UserError("evaluate: no model; see rest-jax evaluate --help")
    files, overrides = split(words or [])
    _check_sources(files, benchmark, (data, categories, samples, temperature))
    if temperature:
        overrides.append(f"rollout.temperature={temperature}")
    if max_response_tokens is not None:
        overrides.append(f"rollout.max_response_tokens={max_response_tokens}")
    config = _load_model(model, overrides, distributed, plugins)
    if benchmark is not None:
        from rest_jax.evaluation.benchmark import Options, evaluate_benchmark

        options = Options(data, limit, categories, samples or 1)
        table = evaluate_benchmark(
            config, benchmark, options, greedy=not temperature, output=output
        )
    else:
        from rest_jax.evaluation.heldout import evaluate

        table = evaluate(config, files, limit=limit, output=output)
    if table:
        print_text(table)


def _check_sources(files: Sequence[str], benchmark: str | None, options: Sequence[object]) -> None:
    """UserError unless there are either records or a benchmark; `options` are those of a benchmark."""
    if benchmark is None:
        if any(option is not None for option in options):
            raise UserError(
                "evaluate: --data, --categories, --samples and --temperature belong to --benchmark NAME"
            )
        if not files:
            raise UserError("evaluate: no data; name record files, or synthetic:eval")
    elif files:
        raise UserError(
            f"evaluate --benchmark {benchmark}: {files[0]}: no records are read; name the folder of "
            "the benchmark with --data"
        )


@app.command(rich_help_panel=_MODEL)
def convert(
    source: Annotated[str, Argument(help="HF folder with safetensors, hub id, or GGUF file")],
    out: Out,
) -> None:
    """Turn an HF model or a GGUF file into an Orbax folder."""
    from rest_jax.config import locate
    from rest_jax.run import load

    load.convert(locate(source), out)
    print_text(f"converted {source} to {out}")


@app.command(rich_help_panel=_MODEL)
def export(
    model: Model,
    out: Out,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Option(help="default: the model's")
    ] = None,
    adapter: Annotated[
        bool, Option("--adapter", help="the adapters of a LoRA run alone, as a folder for peft")
    ] = False,
    distributed: Distributed = None,
) -> None:
    """Write a model as an HF folder that transformers loads."""
    from rest_jax.config import locate

    _load_model(model, [], distributed)
    from rest_jax.distributed import say
    from rest_jax.run import card, load

    load.export(locate(model), out, dtype, adapter)
    say(f"exported {model} to {out}")
    if card.recorded_use(out):  # else it may need more words
        say(f"serve it: rest-jax serve {shlex.quote(out)}")


@app.command(rich_help_panel=_STUDY)
def sweep(
    words: Configs,
    space: Annotated[str, Option(help="YAML file with the values to try, or a builtin name")],
    trials: Annotated[int | None, Option(min=1, help="trials at most")] = None,
    workers: Workers = 1,
    storage: Storage = None,
    name: Annotated[str | None, Option(help="of the sweep, shared by its workers")] = None,
) -> None:
    """Search config values: many trials, many workers."""
    from rest_jax.experiments import search
    from rest_jax.experiments.worker import Engine

    engine = Engine(workers, storage)
    search.sweep(*split(words), space, engine=engine, trials=trials, name=name)


@app.command(rich_help_panel=_STUDY)
def compare(
    plan: Annotated[str, Argument(help="YAML file, or a builtin name")],
    workers: Workers = 1,
    storage: Storage = None,
    output: Annotated[
        str | None, Option(help="folder of the page; default: page/ beside the runs")
    ] = None,
) -> None:
    """Compare methods over seeds, with intervals, tables and pictures."""
    from rest_jax.experiments import compare
    from rest_jax.experiments.worker import Engine

    compare.compare(plan, output=output, engine=Engine(workers, storage))


@app.command(rich_help_panel=_STUDY)
def variance(
    model: Model,
    data: Annotated[str, Argument(help="record file, or synthetic:eval")],
    overrides: Overrides,
    prompts: Annotated[int, Option(min=1, help="prompts sampled")] = 32,
    tokens: Annotated[int, Option(min=1, help="tokens of each region, for beta")] = 32,
    limit: Limit = None,
    output: Annotated[str | None, Option(help="folder; default: variance/ of the run")] = None,
    plugins: Plugins = False,
    distributed: Distributed = None,
) -> int:
    """Measure gradient variance under each weight rule, and check the theory."""
    options = locals()
    config = _load_measured("variance", options)
    from rest_jax.analysis.variance.measure import measure_variance

    return measure_variance(config, options.pop("data"), **options)


@app.command(rich_help_panel=_STUDY)
def credit(
    model: Model,
    data: Annotated[str, Argument(help="record file, or synthetic:eval")],
    overrides: Overrides,
    methods: Methods = _METHODS,
    prompts: Annotated[int, Option(min=1, help="prompts sampled")] = 16,
    continuations: Annotated[int, Option(min=1, help="of each state of a completion")] = 32,
    limit: Limit = None,
    output: Annotated[str | None, Option(help="folder; default: credit/ of the run")] = None,
    plugins: Plugins = False,
) -> int:
    """Measure which tokens decide the reward, and how well weight rules rank them."""
    options = locals()
    config = _load_measured("credit", options)
    options["methods"] = methods.split(",")
    from rest_jax.analysis.credit import measure_credit

    return measure_credit(config, options.pop("data"), **options)


@app.command(rich_help_panel=_STUDY)
def gain(
    model: Model,
    data: Annotated[str, Argument(help="record file, or synthetic:train")],
    overrides: Overrides,
    methods: Methods = _METHODS,
    placebos: Annotated[
        str, Option(help="shuffle, shuffle_regions, random: of every method, with commas")
    ] = "",
    batches: Annotated[int, Option(min=1, help="batches measured")] = 30,
    prompts: Annotated[int, Option(min=1, help="prompts of a batch")] = 16,
    reference: Annotated[int, Option(min=8, help="prompts that grad J is measured on")] = 512,
    limit: Limit = None,
    output: Annotated[str | None, Option(help="folder; default: gain/ of the run")] = None,
    plugins: Plugins = False,
) -> int:
    """Measure how far one step of each method leads towards a higher reward."""
    options = locals()
    config = _load_measured("gain", options)
    options["methods"] = methods.split(",")
    options["placebos"] = [name for name in placebos.split(",") if name]
    from rest_jax.analysis.gain import measure_gain

    return measure_gain(config, options.pop("data"), **options)


@app.command(rich_help_panel=_LOOK)
def report(
    runs: Annotated[list[str], Argument(metavar="RUN...", help="folders of runs")],
    output: Annotated[
        str | None, Option(help="HTML file; default: report.html of the first run")
    ] = None,
    watch: Annotated[
        bool, Option("--watch", help="write the page anew while runs train, until Ctrl-C")
    ] = False,
) -> None:
    """Write a page with the curves and tokens of runs, and print their tables."""
    from rest_jax.analysis import page
    from rest_jax.analysis.report import write_report

    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            for path in page.watch(runs, output):
                print_text(f"page: {path}")
    # first, since it reads all of them before it writes anything
    path = page.write_page(runs, output)
    for run in runs:
        print_text(write_report(run))
    print_text(f"page: {path}")


@app.command(rich_help_panel=_LOOK)
def runs(folder: Annotated[str, Argument(help="where the runs are")] = "runs") -> None:
    """List runs with state, step, headline figure and host."""
    from rest_jax.run.overview import list_runs

    print_text(list_runs(folder))


@app.command("inspect", rich_help_panel=_LOOK)
def inspect_checkpoint(
    source: Annotated[str, Argument(metavar="CHECKPOINT", help="its folder, or that of a run")],
    verify: Annotated[bool, Option("--verify", help="read all of it, against its digests")] = False,
) -> None:
    """Show what a checkpoint holds: step, curriculum, shapes, size, digest."""
    from rest_jax.run.overview import describe_checkpoint

    print_text(describe_checkpoint(source, verify))


@app.command(rich_help_panel=_LOOK)
def doctor() -> None:
    """Show versions, devices, memory, caches, and what is missing."""
    from rest_jax.run.environment import diagnose

    print_text(diagnose())


@app.command(rich_help_panel=_LOOK)
def schema(
    output: Annotated[str | None, Option(help="file for it; default: printed")] = None,
) -> None:
    """Write the JSON schema of configs, for editors."""
    from rest_jax.files import as_path, atomic_write
    from rest_jax.schema import schema

    text = json.dumps(schema(), indent=2)
    if output is None:
        print_text(text)
        return
    if as_path(output).suffix != ".json":
        raise UserError(f"schema --output {output}: a JSON schema; name a file that ends in .json")
    with atomic_write(as_path(output)) as partial:
        partial.write_text(f"{text}\n")
    print_text(
        f"schema: {output}; first line of a config: # yaml-language-server: $schema={output}"
    )


@app.command(rich_help_panel=_STUDY)
def new(
    kind: Annotated[
        Literal["reward", "judge", "weight", "advantage", "loss"],
        Argument(help="of the plug-in; judge: a reward by a model behind a URL"),
    ],
    name: Annotated[str, Argument(help="of the module")],
) -> None:
    """Write a reward, weight rule, advantage or loss to begin your own with, and its test."""
    import pathlib

    from rest_jax.examples import write_new

    print_text(write_new(kind, name, pathlib.Path()))


@config_app.command()
def show(words: Configs) -> None:
    """Print the resolved config, and where each value comes from."""
    from rest_jax import config

    files, overrides = split(words)
    origins = config.origins(files, overrides)
    text = config.dump(config.load(files, overrides))
    places = {line: origins.get(path) for line, path in config.lines(text)}
    width = max(map(len, text.splitlines()))
    for number, line in enumerate(text.splitlines()):
        origin = places.get(number)
        print_text(line if origin is None else f"{line:<{width}}  # {origin}")


@data_app.command()
def inspect(
    file: Annotated[str, Argument(help="a file of records, or synthetic:train")],
    overrides: Overrides,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
) -> None:
    """Print what a file of records holds."""
    from rest_jax.data.prepare.summary import inspect

    print_text(inspect(file, tokenizer, limit, overrides))


def _fraction(of: str) -> object:
    return Option(metavar="FRACTION", help=of)


@data_app.command()
def prepare(
    source: Annotated[
        str, Argument(help="openai, toolace, xlam, hammer, rlla, sgd, tau2, records, ...")
    ],
    words: Annotated[
        list[str],
        Argument(
            metavar="IN|OUT|KEY=VALUE",
            help="files to read, then the .jsonl or .parquet to make; data.template, data.brief_prompt",
            callback=_once,
        ),
    ],
    seed: Annotated[int, Option(help="of all that is random")] = 0,
    mask_names: Annotated[float, _fraction("of records whose names become random words")] = 0.0,
    irrelevance: Annotated[float, _fraction("of records whose right tool is taken away")] = 0.0,
    irrelevance_response: Annotated[str | None, Option(help="the answer to those")] = None,
    held_out: Annotated[float, _fraction("of tools that only OUT's .eval twin has")] = 0.0,
    held_out_dialogues: Annotated[
        float, _fraction("of dialogues that only it has, where tools are few")
    ] = 0.0,
    responses: Annotated[float, _fraction("of records without a call that are kept")] = 1.0,
    keep_duplicates: Annotated[bool, Option("--keep-duplicates", help="else dropped")] = False,
    tokenizer: Tokenizer = None,
    max_tokens: Annotated[int | None, Option(min=1, help="longer records are dropped")] = None,
    limit: Limit = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace OUT and its side files")
    ] = False,
) -> None:
    """Make training records of other people's data."""
    options = locals()  # named as the fields of Settings
    files, overrides = split(options.pop("words"))
    if len(files) < 2:
        raise UserError(f"data prepare {source}: an input and an output file are needed")
    from rest_jax import config
    from rest_jax.data.prepare import pipeline, settings

    settings.check_settings(overrides)
    data = config.from_overrides({"name": "data", "model": {"source": "none"}}, overrides).data
    options |= {"template": data.template, "brief": data.brief_prompt}
    asked = settings.Settings(inputs=tuple(files[:-1]), out=files[-1], **options)
    print_text(pipeline.prepare(asked).to_text())


app.add_typer(data_app, name="data", rich_help_panel=_LOOK)
app.add_typer(config_app, name="config", rich_help_panel=_LOOK)
