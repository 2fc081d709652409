"""Hammer's irrelevance data: the shape of xLAM with the right tool removed from the list, so that `answers` is empty.

There the target is a response that says so, and no call. Items with answers are as in xLAM.
"""

from typing import Any

from rest_jax.data.convert import xlam
from rest_jax.data.records import StepRecord

NO_CALL = "None of the given tools can do this."

restore = xlam.restore


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item."""
    return xlam.convert_as("hammer", NO_CALL, raw, name, where)
