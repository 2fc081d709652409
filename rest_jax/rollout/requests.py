"""Records of continuous batching."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """One completion to draw."""

    ids: np.ndarray  # int32 [T]: the prompt
    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0  # with `sample` decides the draws: they do not depend on what else runs
    sample: int = 0  # number among completions with one seed
    top_logprobs: int = 0  # 0 to 20


@dataclass(frozen=True)
class Piece:
    """What one decode call drew for one request."""

    request: int  # the number that `submit` returned
    ids: np.ndarray  # int32 [n]; the last may be the stop id
    logp: np.ndarray  # float32 [n], of the model's own distribution
    entropy: np.ndarray  # float32 [n], nats
    top: tuple[np.ndarray, np.ndarray] | None  # ids int32 [n k], log-probs float32 [n k]
    finish: str | None  # None: more comes; "stop": the last id is a stop id; "length"
