"""The command `rest-jax plan`: what a config needs and how fast it would be on hardware that is not here.

`make_plan(config, options)` has a process of its own compile the programs (`planning.compiler`), then searches the smallest
change that makes the config fit, if it does not. The same plan is made once: it is kept in the user's cache folder.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from rest_jax import config as config_lib
from rest_jax.config import Config, builtin_file
from rest_jax.errors import UserError
from rest_jax.files import Location, atomic_write, local_path
from rest_jax.planning import cache, fit, report, topology
from rest_jax.planning.compiler import versions
from rest_jax.run.environment import LIBTPU_VARIABLE
from rest_jax.run.metrics import CONFIG_FILE, DIGESTS_FILE, read_lines
from rest_jax.texts import print_text

FULL = 0.9  # of the memory: what is above is left to fragments and to the runtime


class CompilerEnded(UserError):
    """The compiler's process ended without a result, as one does that the system kills: whether the config fits is not known."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a plan is for: `rest-jax train` or `rest-jax sft` on a topology. Lengths None: the longest that the config allows."""

    topology: str
    supervised: bool = False
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    json: str | None = None
    output: str | None = None


def is_supervised(config: Config, files: Sequence[Location]) -> bool:
    """Whether a config, made of these files, is one of `rest-jax sft`. The config.yaml of a run gives the keys of both commands:
    it is for that which trained the run. ConfigError where nothing says which command is meant.
    """
    for path in map(builtin_file, reversed(files)):
        if path.name == CONFIG_FILE:
            lines = read_lines(path.parent / DIGESTS_FILE, missing_ok=True)
            launches = [line["launch"] for line in lines if isinstance(line.get("launch"), dict)]
            if launches:
                return launches[-1].get("command") == "sft"
    return config_lib.is_supervised(config)


def plan(config: Config, options: Options) -> int:
    """Prints the plan and writes its files; 0 when the config fits, 1 when it does not. UserError for bad input."""
    given = (("--json", options.json), ("--output", options.output))
    asked = {option: local_path(option, file) for option, file in given if file}
    for option, file in asked.items():
        if file.is_dir():
            raise UserError(f"{option} {file}: is a folder, the name of a file is needed")
    if len(set(map(os.path.realpath, asked.values()))) < len(asked):
        raise UserError(f"--json and --output {options.output}: name two files")
    with contextlib.ExitStack() as stack:
        written = {}
        for option, file in asked.items():
            written[option] = stack.enter_context(atomic_write(file))
            written[option].touch()  # that it can be written is known before anything is compiled
        made = make_plan(config, options)
        print_text(report.table(made))
        if options.json:
            written["--json"].write_text(json.dumps(made, indent=1) + "\n")
        if options.output:
            report.draw(made, written["--output"])
    return 0 if made["fits"] else 1


def make_plan(config: Config, options: Options) -> dict[str, Any]:
    """The plan as JSON. UserError when the config or the topology cannot be used, or the compiler is missing."""
    where = topology.parse(options.topology)
    topology.check_compiler(where)
    request = {
        "supervised": options.supervised,
        "topology": where.name,
        "lengths": _lengths(config, options),
    }
    made = compile_plan(config, where, request | {"memory_only": False})
    limit = FULL * where.chip.memory
    needs = made["memory"]["programs"]
    found = {"name": config.name, "fits": fit.largest(needs)[1] <= limit, **made}
    found |= {"change": None, "not_compiled": []}  # why what was tried is not known to fit
    if found["fits"]:
        return found

    def compile(tried: Config) -> fit.Needs:
        try:
            made = compile_plan(tried, where, request | {"memory_only": True})
        except CompilerEnded as error:
            found["not_compiled"].append(str(error))
            raise
        return made["memory"]["programs"]

    change = fit.smallest_change(config, needs, limit, compile)
    if change is None:
        return found
    small = compile_plan(change.config, where, request | {"memory_only": False})
    return found | {"change": {"values": list(change.changes), **small}}


def _lengths(config: Config, options: Options) -> tuple[int, int] | None:
    """The lengths asked for; of one alone the other is the longest beside it, a token at least."""
    prompt, response = options.prompt_tokens, options.response_tokens
    if prompt is None and response is None:
        return None
    if options.supervised:
        most = config.sft.max_tokens
        lengths = {"--prompt-tokens": prompt, "--response-tokens": response}
        given = {option: count for option, count in lengths.items() if count is not None}
        key, room = (
            ("sft.max_tokens", most) if len(given) == 2 else ("sft.max_tokens - 1 =", most - 1)
        )
        limits = [(" + ".join(given), sum(given.values()), key, room)]
        prompt = prompt or max(1, min(config.data.max_prompt_tokens, most - (response or 1)))
        response = response or most - prompt
    else:
        longest = (config.data.max_prompt_tokens, config.rollout.max_response_tokens)
        prompt, response = prompt or longest[0], response or longest[1]
        limits = [
            ("--prompt-tokens", prompt, "data.max_prompt_tokens", longest[0]),
            ("--response-tokens", response, "rollout.max_response_tokens", longest[1]),
        ]
    for option, asked, key, most in limits:
        if asked > most:
            raise UserError(f"{option} {asked} is above {key} {most}; lower it")
    return prompt, response


def compile_plan(
    config: Config, where: topology.Topology, request: dict[str, Any]
) -> dict[str, Any]:
    """What `planning.compiler` finds out of a config, from the cache where it is known. CompilerEnded, and UserError for a config
    that cannot be used.
    """
    # without defaults: the keys that are given say which command the config is for
    request = request | {"config": config.model_dump(mode="json", exclude_unset=True)}
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", LIBTPU_VARIABLE)]
    known = json.dumps([request, versions(), flags, _sources()], sort_keys=True)
    name = f"{hashlib.sha256(known.encode()).hexdigest()}.json"
    if (kept := cache.read(name)) is not None:
        return json.loads(kept)
    found = _run_compiler(request, where)
    if "error" in found:
        raise UserError(found["error"])
    cache.write(name, json.dumps(found).encode())
    return found


def _run_compiler(request: dict[str, Any], where: topology.Topology) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rest-jax-plan-") as folder:
        here = pathlib.Path(folder)
        asked, result = here / "request.json", here / "result.json"
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "rest_jax.planning.compiler", str(asked), str(result)]
        dump = here / "dump"
        environment = (
            topology.child_environment(where, dump)
            | {
                "REST_JAX_PLAN_DUMP": str(dump),
                "JAX_TRACEBACK_FILTERING": "off",  # else a note of jax is the last line, behind the error
            }
        )
        with open(here / "log", "w+") as log:
            # It ends when its standard input is closed, with this process.
            with subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=2, stderr=log
            ) as done:
                done.wait()
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
        if done.returncode or not result.is_file():
            said = lines[-1] if lines else "nothing"
            raise CompilerEnded(
                f"plan: the compiler of {where.name} ended with exit code {done.returncode}: {said}"
            )
        return json.loads(result.read_text())


@functools.cache
def _sources() -> str:
    """Digest of this package's code, on which its programs depend."""
    package = pathlib.Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
