"""Where metrics go besides metrics.jsonl, on request: TensorBoard, Weights & Biases, Trackio.

    check_trackers(config, before)      before a model is loaded: UserError for one that cannot be used
    lasting_name(config, folder, begun) by what they know a run, however often it is started
    Trackers(config, folder, name)      those of a run; a resource

Nothing that a tracker does reaches the run: one that fails, or does not answer, is given up with one warning on stderr.
"""

import importlib.util
import os
import pathlib
import secrets
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.files import Location, as_path, atomic_write, store_errors
from rest_jax.texts import one_line, warn

PATIENCE = 60.0  # seconds for a tracker to begin, and to take what is left at the end
NAME_FILE = ".tracked"  # in the folder of a run: `lasting_name`
_ANSWER = 10.0  # seconds for a server to answer before a run

Line = Mapping[str, int | float | None]


class Log(Protocol):
    """An open tracker. Values that are not finite are None."""

    def write(self, step: int, line: Line) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in <run>/tensorboard."""

    def __init__(self, config: Config, folder: pathlib.Path, name: str):
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder / "tensorboard"))

    def write(self, step: int, line: Line) -> None:
        """The values there are."""
        for name, value in line.items():
            if value is not None:
                self._writer.add_scalar(name, value, step=step)

    def flush(self) -> None:
        """To the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Also the file."""
        self._writer.close()


class Wandb:
    """A run of the project `train.wandb_project`."""

    def __init__(self, config: Config, folder: pathlib.Path, name: str):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=config.train.wandb_project, id=name, name=config.name, dir=str(folder), resume="allow",
            config=config.model_dump(mode="json"),
        )  # fmt: skip

    def write(self, step: int, line: Line) -> None:
        """Queued by its package."""
        self._run.log(dict(line), step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """Waits for what is queued."""
        self._run.finish()


class Trackio:
    """A run of the project `train.trackio_project`: on this machine, or where TRACKIO_SERVER_URL or TRACKIO_SPACE_ID says."""

    def __init__(self, config: Config, folder: pathlib.Path, name: str):
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=str(config.train.trackio_project), name=name, resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False, config=config.model_dump(mode="json"),
        )  # fmt: skip

    def write(self, step: int, line: Line) -> None:
        """Queued by its package; a value that is not finite would be a text there."""
        values = {name: value for name, value in line.items() if value is not None}
        self._run.log(values, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """Waits for what is queued."""
        self._run.finish()


def _check_wandb() -> None:
    """A login that is accepted, or WANDB_MODE=offline."""
    import wandb  # pyright: ignore[reportMissingImports]

    wandb.login(verify=True)


def _check_trackio() -> None:
    """What a run would write to: a Space with a login, a server that answers, or the folder of this machine."""
    if os.environ.get("TRACKIO_SPACE_ID"):
        import huggingface_hub

        huggingface_hub.whoami()
    elif url := os.environ.get("TRACKIO_SERVER_URL"):
        if "write_token=" not in url and not os.environ.get("TRACKIO_WRITE_TOKEN"):
            raise ValueError("the server wants a token: TRACKIO_WRITE_TOKEN is not set")
        with urllib.request.urlopen(url, timeout=_ANSWER):
            pass
    else:
        from trackio.utils import TRACKIO_DIR  # pyright: ignore[reportMissingImports]

        pathlib.Path(TRACKIO_DIR).mkdir(parents=True, exist_ok=True)
        if not os.access(TRACKIO_DIR, os.W_OK | os.X_OK):
            raise PermissionError(f"{TRACKIO_DIR} cannot be written")


class Kind(NamedTuple):
    """A kind of tracker."""

    title: str
    package: str
    open: Callable[[Config, pathlib.Path, str], Log]
    check: Callable[[], object]  # raises whatever speaks against it
    remedy: str


# the key of section `train` that asks for it -> the tracker
KINDS = {
    "tensorboard": Kind("TensorBoard", "tensorboard", TensorBoard, lambda: None, "leave it out"),
    "wandb_project": Kind(
        "Weights & Biases", "wandb", Wandb, _check_wandb,
        "run `wandb login`, or set WANDB_MODE=offline",
    ),
    "trackio_project": Kind(
        "Trackio", "trackio", Trackio, _check_trackio,
        "unset TRACKIO_SERVER_URL and TRACKIO_SPACE_ID to keep the run on this machine (TRACKIO_DIR)",
    ),
}  # fmt: skip


def wanted(config: Config) -> dict[str, Kind]:
    """The trackers that a config asks for."""
    return {key: kind for key, kind in KINDS.items() if getattr(config.train, key)}


def check_packages(config: Config) -> None:
    """UserError when the package of a tracker is missing."""
    for key, kind in wanted(config).items():
        if importlib.util.find_spec(kind.package) is None:
            raise UserError(f"train.{key}: the package is missing: pip install {kind.package}")


def check_trackers(config: Config, before: Config | None = None) -> None:
    """UserError for a tracker that cannot be used: no login, no answer. One process asks, the first.

    Not asked is what a resumed run had `before`: it goes on without a tracker that is down, as it would have.
    """
    for key, kind in wanted(config).items():
        if before is not None and getattr(before.train, key) == getattr(config.train, key):
            continue
        _, fault = _within(kind.check)
        if fault is not None:
            raise UserError(
                f"train.{key}: {kind.title} cannot be used: {_reason(fault)}; {kind.remedy}"
            ) from fault


def lasting_name(config: Config, folder: Location, begun: bool) -> str:
    """The same on every start of a run, which continues its curves; another for a run that is made anew, or has the same name in
    another folder: W&B would leave out the lines of steps that it has. Written to its folder. `begun`: it has lines; by
    a version without that file, it is known by the name in its config.
    """
    file = as_path(folder) / NAME_FILE
    with store_errors(file):
        if file.exists():
            return file.read_text().strip()
        name = config.name if begun else f"{config.name}-{secrets.token_hex(3)}"
        with atomic_write(file) as partial:
            partial.write_text(name + "\n")
    return name


class Trackers:
    """The trackers of a run, in its first process."""

    def __init__(self, config: Config, folder: pathlib.Path, name: str):
        self._open: dict[str, Log] = {}
        for kind in wanted(config).values():
            opened, fault = _within(
                lambda kind=kind: kind.open(config, folder, name), lambda log: log.close()
            )
            if fault is None:
                self._open[kind.title] = opened
            else:
                self._give_up(kind.title, fault)

    def write(self, step: int, line: Line) -> None:
        """The values of a line of the metrics."""
        for title, log in list(self._open.items()):
            self._try(title, lambda log=log: log.write(step, line), waits=False)

    def flush(self) -> None:
        """What lies in the run's folder is on the disk afterwards."""
        for title, log in list(self._open.items()):
            self._try(title, log.flush, waits=False)

    def close(self) -> None:
        """Hands over what is left, for at most PATIENCE seconds each."""
        for title, log in list(self._open.items()):
            self._try(title, log.close)
        self._open.clear()

    def _try(self, title: str, act: Callable[[], object], waits: bool = True) -> None:
        """Acts; one that fails is given up. `waits`: it may wait for a network, and so has a thread and a limit."""
        _, fault = _within(act) if waits else _attempt(act)
        if fault is not None:
            self._open.pop(title, None)
            self._give_up(title, fault)

    def _give_up(self, title: str, fault: Exception) -> None:
        warn(f"{title} is given up: {_reason(fault)}; metrics.jsonl has every line")


def _attempt(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What an action returns, and what it raises."""
    try:
        return act(), None
    except Exception as error:  # of strangers' packages: whatever it is, the run matters more
        return None, error


def _within(
    act: Callable[[], Any], late: Callable[[Any], object] = lambda _: None
) -> tuple[Any, Exception | None]:
    """The same in a thread; TimeoutError when it takes longer than PATIENCE. It is left to itself then, and `late` gets what it
    returns after all.
    """
    said: list[tuple[Any, Exception | None]] = []
    first = threading.Lock()  # whoever gets it decides whether there was an answer in time

    def run() -> None:
        found, fault = _attempt(act)
        if first.acquire(blocking=False):
            said.append((found, fault))
        elif fault is None:
            _attempt(lambda: late(found))

    thread = threading.Thread(target=run, daemon=True, name="tracker")
    thread.start()
    thread.join(PATIENCE)
    if first.acquire(blocking=False):
        return None, TimeoutError(f"no answer within {PATIENCE:g} s")
    thread.join()
    return said[0]


def _reason(error: Exception) -> str:
    """One line of an error's text."""
    text = one_line(str(error))[:300].rstrip(".")
    return text or type(error).__name__
