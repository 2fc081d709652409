"""Signals become a flag within a block, and the handlers of before come back."""

import os
import signal

import pytest

from rest_jax.run.signals import StopRequest, handled


def test_sigterm_sets_the_flag_and_the_handler_of_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.received and not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received and stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before
    assert stop.received


def test_other_signals_when_they_are_named():
    with StopRequest(signal.SIGINT) as stop:
        assert signal.getsignal(signal.SIGTERM) is not stop._receive
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received


def test_a_handler_for_a_block_even_when_it_raises():
    def raise_(number, frame):
        raise KeyError(number)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), handled(raise_, signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
