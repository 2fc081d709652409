"""A reward of the user's own: `reward.plugin: FILE.py:FUNCTION` (docs/plugins.md).

    FUNCTION(completion, text, record, target) -> float or {name: float}

`completion` is the parse of the text (calls, response, think, blocks, broken_calls), `record` the data's record as JSON has it
with all that its file said of it under `extra`, `target` the record's gold answer. It runs in worker processes, so that whatever
it does costs no more than its own part of the reward: the completion is counted as a failure and keeps the builtin reward.
Host code without jax.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax import plugins
from rest_jax.child import Child, NoAnswer
from rest_jax.config import RewardConfig
from rest_jax.errors import RunStopped, UserError
from rest_jax.rewards.score import Outcome
from rest_jax.texts import warn, without_secrets
from rest_jax.tool_calls import Answer

KEY = "reward.plugin"
_LOOK = 0.1  # seconds between looks at whether a step is given up
_TO_IMPORT = 60  # seconds that a file has
# All that a worker inherits, beside `reward.plugin_env`: where programs and packages are, and how to read and write.
ENVIRONMENT = (
    *("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL", "LC_CTYPE", "VIRTUAL_ENV"),
    *("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
)
# The order of sets is the same in every worker, and workers share the cores.
_FIXED = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
_warned: set[str] = set()  # words of which a fault was said


class RewardPlugin:
    """The function in its workers, which start when they are needed. A resource: `close` ends them, and asked again it
    starts others.

    A completion that meets the deadline costs its worker, and the others continue. When as many completions of a step have met
    it as there are workers, the rest of the step is given up, so that a step waits for one deadline and not for many.
    """

    def __init__(self, cfg: RewardConfig):
        """UserError for a file that cannot be read."""
        assert cfg.plugin is not None
        self.cfg, self.name = cfg, f"{KEY} {cfg.plugin}"
        self._file = plugins.read(cfg.plugin, KEY)
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._workers: set[Child] = set()
        self._idle: list[Child] = []
        self._late = 0  # of this step
        self._ending = False

    def begin(self) -> None:
        """A new step, or evaluation."""
        self._late = 0

    def check(self) -> None:
        """UserError that names file and line when the file cannot be loaded."""
        self._idle.append(self._start())

    def ask(
        self, record: Mapping[str, Any], answers: Sequence[Answer], texts: Sequence[bytes]
    ) -> list[concurrent.futures.Future[Outcome]]:
        """What it makes of completions to the prompt of one record (`data.records.to_json`). RunStopped comes out of the results
        for a fault under `reward.plugin_errors` stop.
        """
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.cfg.plugin_workers, "plugin")
        # what a record lacks is there all the same
        target = {"think": None, "text": None, **record["target"]}
        said = json.dumps({"messages": None, "extra": {}, **record, "target": target})
        questions = [
            {"completion": plain(answer), "text": text.decode("utf-8", "replace"), "record": said}
            for answer, text in zip(answers, texts, strict=True)
        ]
        return [self._pool.submit(self._outcome, str(record["id"]), q) for q in questions]

    def close(self) -> None:
        """Ends the workers."""
        pool, self._pool, self._ending = self._pool, None, True
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            workers, self._workers = self._workers, set()
            self._idle.clear()
        for worker in workers:
            worker.kill()
        if pool is not None:
            pool.shutdown()
        self._ending = False

    def _outcome(self, name: str, question: Mapping[str, Any]) -> Outcome:
        """The answer to a question about the record of that name."""
        outcome = self._answer(question)
        if outcome.fault is None or self._ending:
            return outcome
        # it is kept with the completion, and may be of an address
        outcome = outcome._replace(fault=without_secrets(outcome.fault))
        said = f"{self.name}: record {name}: {outcome.fault}"
        if self.cfg.plugin_errors == "stop":
            raise RunStopped(f"{said}; reward.plugin_errors=count continues without it")
        with self._lock:
            first = self.name not in _warned
            _warned.add(self.name)
        if first:
            left = "the builtin reward alone" if self.cfg.builtin else "reward 0"
            warn(f"{said}; such a completion has {left}, and .../plugin_failures counts them")
        return outcome

    def _answer(self, question: Mapping[str, Any]) -> Outcome:
        given_up = f"given up, since {self.cfg.plugin_workers} others of the step gave no answer"
        if self._gives_up():
            return Outcome({}, given_up)
        worker = None
        try:
            worker = self._take()
            worker.send(question)
            found = self._receive(worker)
        except NoAnswer as error:
            if self._gives_up():
                return self._end(worker, given_up)
            with self._lock:
                self._late += 1
            return self._end(worker, str(error))
        except UserError as error:  # it could be loaded before
            with self._lock:
                self._late += 1
            return Outcome({}, str(error).removeprefix(f"{self.name}: "))
        except RunStopped as error:
            return self._end(worker, str(error).removeprefix(f"{self.name}: "))
        except (RecursionError, ValueError) as error:
            return self._end(worker, f"the completion cannot be sent: {type(error).__name__}")
        assert found is not None and worker is not None
        if found.get("spent"):
            return self._end(worker, found["fault"])
        with self._lock:
            self._idle.append(worker)
        return Outcome(found.get("parts", {}), found.get("fault"))

    def _gives_up(self) -> bool:
        return self._late >= self.cfg.plugin_workers

    def _receive(self, worker: Child) -> dict[str, Any] | None:
        """The answer of a worker. NoAnswer at the deadline, or soon after the step has been given up."""
        seconds = self.cfg.plugin_timeout
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            try:
                return worker.receive(seconds=max(0.0, min(left, _LOOK)))
            except NoAnswer as error:
                if left <= _LOOK:
                    raise NoAnswer(f"no answer in {seconds:g} s") from error
                if self._gives_up():
                    raise

    def _take(self) -> Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._start()

    def _end(self, worker: Child | None, fault: str) -> Outcome:
        if worker is not None:
            worker.kill()
            with self._lock:
                self._workers.discard(worker)
        return Outcome({}, fault)

    def _start(self) -> Child:
        """A worker that has loaded the file."""
        program = str(pathlib.Path(__file__).with_name("plugin_child.py"))
        names = (*ENVIRONMENT, *self.cfg.plugin_env)
        own = {name: os.environ[name] for name in names if name in os.environ}
        worker = Child(self.name, [sys.executable, program], _FIXED | own, apart=True)
        with self._lock:
            self._workers.add(worker)
        path, name, text = self._file
        given = {"path": path, "name": name, "text": text.decode("latin-1")}
        found: dict[str, Any] | None = None
        try:
            worker.send({**given, "memory": int(self.cfg.plugin_memory * 2**30)})
            found = worker.receive(seconds=_TO_IMPORT)
        except RunStopped as error:
            found = {"fault": str(error).removeprefix(f"{self.name}: ")}
        if found is None or "fault" in found:
            self._end(worker, "")
            raise UserError(f"{self.name}: {found and found['fault']}")
        return worker


def open_plugin(cfg: RewardConfig) -> RewardPlugin | None:
    """The plug-in of a config, if it names one."""
    return None if cfg.plugin is None else RewardPlugin(cfg)


def check_plugin(cfg: RewardConfig) -> None:
    """UserError, before anything else is begun, for a plug-in that cannot be loaded."""
    if (plugin := open_plugin(cfg)) is not None:
        with contextlib.closing(plugin):
            plugin.check()


def plain(answer: Answer) -> dict[str, Any]:
    """A parse as plain values, as the function gets it."""
    return {
        "calls": [{"name": call.name, "arguments": call.arguments} for call in answer.calls],
        "response": answer.response,
        "think": answer.think,
        "blocks": [str(block) for block in answer.blocks],
        "broken_calls": answer.broken_calls,
    }
