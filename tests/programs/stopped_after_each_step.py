"""`rest-jax`, told to stop in every step, and started again in the same process until it is done."""

import sys

from rest_jax.run import environment

environment.configure()  # before jax is imported, as in the program itself

from rest_jax import cli
from rest_jax.errors import UNFINISHED
from rest_jax.run.loop import Loop

end_step = Loop.end_step


def end_step_and_stop(self, step, pending, state, loader_state):
    """As the loop's, with a signal while the step ends."""
    end_step(self, step, pending, state, loader_state)
    self.run.stop.receive()


Loop.end_step = end_step_and_stop
while (code := cli.main()) == UNFINISHED:
    pass
sys.exit(code)
