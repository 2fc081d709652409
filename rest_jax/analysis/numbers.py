"""Numbers of a measurement as JSON has them."""

import math
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The same with plain lists and numbers; None for what is not finite."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
