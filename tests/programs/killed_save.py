"""killed_save.py RUN MOMENT: saves checkpoints 1 and 2, and is killed at a moment of the second save.

MOMENT: seconds after the save began, or a name of a moment in its background thread.
"""

import os
import signal
import sys
import threading
import time

from orbax.checkpoint.path import atomicity

from rest_jax.run import checkpoint
from tests.programs.states import make_state


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Has this process killed at `moment`."""
    if moment == "before the manifest":
        checkpoint.write_manifest = kill
    elif moment == "before the rename":
        checkpoint.write_manifest = write_and_kill
    elif moment == "after the rename":
        atomicity.AtomicRenameTemporaryPath.finalize = finalize_and_kill
    else:
        threading.Timer(float(moment), kill).start()


def write_and_kill(folder, plain=checkpoint.write_manifest) -> None:
    plain(folder)
    kill()


async def finalize_and_kill(self, plain=atomicity.AtomicRenameTemporaryPath.finalize) -> None:
    await plain(self)
    if self.get_final().name == "2":
        kill()


run, moment = sys.argv[1:]
checkpoints = checkpoint.Checkpoints(run)
checkpoints.save(1, make_state(1), {"seen": 10})
checkpoints.wait()
arm(moment)
checkpoints.save(2, make_state(2), {"seen": 20})
time.sleep(60)
