"""A program that copies its input to stderr without what jax's C++ side says when the process that coordinates is lost.

jax ends every process then, with a C++ stack trace that nothing in Python can hold back. `run.processes` lets the stderr of a
process of many run through this program, so that what is left is one line.
"""

import signal
import sys
from collections.abc import Iterable, Iterator

LOST = (
    "rest-jax: error: the first process, which the others report to, is lost; "
    "run the same command on all hosts to resume"
)
# absl's names of the source files that speak when the service is gone, and gloo's greeting.
_NOISE = (
    " coordination_service.cc:",
    " coordination_service_agent.cc:",
    " preemption_sync_manager.cc:",
    " client.h:",
    "[Gloo] Rank ",
)
_LEVELS = "IWEF"  # first letters of absl's lines
_FATAL = "F"


def filtered(lines: Iterable[str]) -> Iterator[str]:
    """The lines to show. A message of the coordination service is dropped with the lines that continue it; after a fatal one
    only `LOST` is left.
    """
    dropping = False
    for line in lines:
        speaks = any(source in line for source in _NOISE)
        if speaks and line.startswith(_FATAL):
            yield LOST + "\n"
            return
        starts_message = line[:1] in _LEVELS and line[1:5].isdigit() and "]" in line
        if speaks:
            dropping = not line.startswith("[Gloo]")
        elif starts_message or line.startswith(("rest-jax", "Traceback", "step ")):
            dropping = False
        if not speaks and not dropping:
            yield line


def main() -> None:
    """Copies stdin to stderr until the process at its other end has ended."""
    # A signal to the job is for that process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with open(0, errors="replace", newline="", closefd=False) as source:
        for line in filtered(source):
            sys.stderr.write(line)
            sys.stderr.flush()
        for _ in source:  # what follows a fatal message: nobody may wait to write it
            pass


if __name__ == "__main__":
    main()
