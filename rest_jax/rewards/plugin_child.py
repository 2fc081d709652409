"""The worker that a reward of the user's runs in (`rewards/plugin.py`). Questions and answers are JSON objects, one a line.

    {"path", "name", "text", "memory": bytes}    -> {"ready": true}, or {"fault": why the file is no use}
    {"completion", "text", "record": JSON text}  -> {"parts": {name: number}}, or {"fault"}

The code of the file and what it starts see neither these lines nor the terminal: their standard streams lead nowhere. Their
memory is bounded, and they end with the process that started this one. Nothing here is a wall against code that means harm.
"""

import ctypes
import json
import math
import numbers
import os
import pathlib
import re
import resource
import signal
import sys
from typing import Any

# Of its own folder this program needs nothing, and the user's file must not find modules there.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from rest_jax import plugins  # noqa: E402

sys.path.pop(0)

MOST_PARTS, LARGEST = 32, 1e6
WHOLE = "plugin"  # the name of a reward that is one number
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_is_name = re.compile(r"[A-Za-z0-9_.-]{1,64}").fullmatch


def main() -> None:
    """Answers until its input ends."""
    source, target = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    home = os.getpid()

    def cut_off() -> None:
        os.close(source)
        os.close(target)
        end_with_parent()

    os.register_at_fork(after_in_child=cut_off)
    end_with_parent()
    with open(source, encoding="utf-8", closefd=False) as lines:
        given = json.loads(next(lines, "null"))
        if given is None:
            return
        limit_memory(given["memory"])
        file = plugins.Source(given["path"], given["name"], given["text"].encode("latin-1"))
        function: Any = None
        try:
            function = plugins.load(file)
            said: dict[str, Any] = {"ready": True}
            if not callable(function):
                said = {"fault": f"{file.name} is a {type(function).__name__}, not a function"}
        except BaseException as error:
            said = {"fault": plugins.describe(error, file.path)}
        answer(target, said, home)
        for line in lines:
            answer(target, ask(function, json.loads(line), file), home)


def ask(function: Any, question: dict[str, Any], file: plugins.Source) -> dict[str, Any]:
    """{"parts"} that the function gives a completion, or {"fault"}."""
    record = json.loads(question["record"])
    try:
        value = function(question["completion"], question["text"], record, record["target"])
        return {"parts": read_value(value)}
    except MemoryError:
        return {"fault": "MemoryError: reward.plugin_memory is used up", "spent": True}
    except BaseException as error:
        return {"fault": plugins.describe(error, file.path)}


def read_value(value: Any) -> dict[str, float]:
    """The parts of what a function has returned; ValueError says what is wrong with it."""
    parts = value if isinstance(value, dict) else {WHOLE: value}
    if len(parts) > MOST_PARTS:
        raise ValueError(f"{len(parts)} parts, of which there may be {MOST_PARTS}")
    found = {}
    for name, part in parts.items():
        if not isinstance(name, str) or not _is_name(name):
            raise ValueError(f"{name!r:.80}: a name has letters, digits, '_', '.' and '-'")
        if not isinstance(part, numbers.Real):
            raise ValueError(f"{name}: a number is needed, not a {type(part).__name__}")
        found[name] = float(part)
        if not math.isfinite(found[name]) or abs(found[name]) > LARGEST:
            raise ValueError(f"{name}: {found[name]} is not between -{LARGEST:g} and {LARGEST:g}")
    return found


def answer(target: int, said: dict[str, Any], home: int) -> None:
    """Sends an object. A copy of this process that the function has forked ends here."""
    if os.getpid() != home:
        os._exit(0)
    data = memoryview(json.dumps(said).encode() + b"\n")
    while data:
        data = data[os.write(target, data) :]


def limit_memory(most: int) -> None:
    """Bounds what this process, and each that it forks, may allocate, where the system counts that."""
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CORE):
        hard = resource.getrlimit(kind)[1]
        bound = most if kind == resource.RLIMIT_DATA else 0
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, hard))


def end_with_parent() -> None:
    """Has the system kill this process when the one that started it has ended, even in the middle of a question."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)


if __name__ == "__main__":
    main()
