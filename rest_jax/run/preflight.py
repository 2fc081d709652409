"""Before anything is loaded or compiled: the run's store can be written and read, and all processes see the same one.

Every process writes a token into the run's folder and reads those of all, so that a folder which is not shared, a bucket that
cannot be written, credentials or a package that are missing are one line within DEADLINE seconds, and not a hang at the first
checkpoint.
"""

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import jax
from etils import epath

from rest_jax.config import Config
from rest_jax.distributed import agree, exchange
from rest_jax.errors import RunStopped, UserError, full_disk
from rest_jax.files import as_path, folder_while_used, is_url, store_errors

DEADLINE = 25  # seconds for a store to answer
_PATIENCE = 8.0  # seconds in which a shared file system shows what another host has written


def check_store(config: Config) -> None:
    """UserError, the same in every process, for a run folder that not all can use, or a URL that cannot be read; RunStopped for
    a disk that is full.
    """
    agree(_fault(lambda: _check_readable(config)))
    folder = config.folder
    nonce = exchange(uuid.uuid4().hex)[0]
    me, processes = jax.process_index(), jax.process_count()
    with contextlib.ExitStack() as stack:
        own = _token(folder, nonce, me)
        agree(_fault(lambda: stack.enter_context(_written(own, nonce))))
        wanted = [_token(folder, nonce, index) for index in range(processes)]
        # No process removes its token, at the end of the block, before all have looked for it.
        agree(_fault(lambda: _check_shared(folder, wanted, nonce)))


def _token(folder: epath.Path, nonce: str, process: int) -> epath.Path:
    return folder / f".shared-{nonce[:12]}-{process}"


def _fault(check: Callable[[], object]) -> UserError | RunStopped | None:
    """What is wrong, None when nothing is. A store that does not answer is given up: its packages may try for minutes."""
    found: list[UserError | RunStopped | None] = [
        UserError(
            f"output: the store gave no answer within {DEADLINE} s; check its address and the network"
        )
    ]

    def run() -> None:
        try:
            check()
            found[0] = None
        except (UserError, RunStopped) as error:
            found[0] = error

    thread = threading.Thread(target=run, daemon=True, name="preflight")
    thread.start()
    thread.join(DEADLINE)
    return found[0]


def _check_readable(config: Config) -> None:
    """UserError for a URL of the model or the data that cannot be reached; whether it holds the right thing is seen later."""
    data, model = config.data, config.model
    for location in (model.source, model.tokenizer, data.train, data.eval):
        if location and is_url(location):
            with store_errors(location):
                as_path(location).exists()


@contextlib.contextmanager
def _written(token: epath.Path, content: str) -> Iterator[None]:
    """The token is there within the block."""
    with contextlib.ExitStack() as stack:
        try:
            with full_disk(token.parent), store_errors(token.parent):
                stack.enter_context(folder_while_used(token.parent))
                stack.callback(_remove, token)
                token.write_text(content)
        except OSError as error:
            raise UserError(
                f"output {token.parent}: cannot be written ({error.strerror}); name a folder that can"
            ) from error
        yield


def _remove(token: epath.Path) -> None:
    with contextlib.suppress(OSError, UserError), store_errors(token.parent):
        token.unlink()


def _check_shared(folder: epath.Path, tokens: list[epath.Path], content: str) -> None:
    """UserError when the token of a process is not found here."""
    begun = time.monotonic()
    for process, token in enumerate(tokens):
        while (found := _content(token)) != content:
            if time.monotonic() - begun > _PATIENCE:
                here = f"process {jax.process_index()} ({socket.gethostname()})"
                raise UserError(
                    f"output {folder}: not shared by all processes: {here} does not see what process {process} wrote"
                    f"{' (it reads something else)' if found else ''}; "
                    "name a folder on a file system that all hosts mount, or gs://BUCKET/.., s3://BUCKET/.."
                )
            time.sleep(0.25)


def _content(token: epath.Path) -> str:
    with store_errors(token.parent):
        try:
            return token.read_text()
        except FileNotFoundError:
            return ""
