"""`rest-jax`, which is killed within a phase: PHASE NUMBER PROCESS WORDS.., at the NUMBER-th call (from 1) of what the phase is
made of, if it is the PROCESS-th of many (0: alone). It says "killed" before.
"""

import os
import signal
import sys

from rest_jax.run import environment

environment.configure()  # before jax is imported, as in the program itself

import jax

from rest_jax import cli
from rest_jax.evaluation.heldout import Evaluator
from rest_jax.models.hf.safetensors import Stored
from rest_jax.rl.step import Update
from rest_jax.rollout.experience import Collector
from rest_jax.rollout.scheduler import _Rollout
from rest_jax.run import checkpoint

PHASES = {
    "rollout": (_Rollout, "decode"),
    "reward": (Collector, "_score"),
    "update": (Update, "__call__"),  # of a mini-batch
    "evaluation": (Evaluator, "_score"),
    "save": (checkpoint.Checkpoints, "save"),
    "manifest": (checkpoint, "write_manifest"),  # the end of a save, in the first process
    "export": (Stored, "write"),
}
phase, number, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
calls = 0


def dies(function):
    """The function, within which the process is killed."""

    def wrapped(*args, **options):
        global calls
        calls += 1
        if calls == number and jax.process_index() == process:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return wrapped


where, name = PHASES[phase]
setattr(where, name, dies(getattr(where, name)))
sys.exit(cli.main(sys.argv[4:]))
