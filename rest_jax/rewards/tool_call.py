"""S_acc in [0, 1]: how well predicted calls match the gold ones (docs/method.md
section 6, after ToolRL).

    S_acc = (r_name + sum_i r_para_i + sum_i r_value_i) / (1 + |G| + sum_i |params(G_i)|)

r_name is the multiset Jaccard of the names; gold and predicted calls of the same name are paired so
that the sum of r_para + r_value is largest; r_para is the Jaccard of the parameter names, r_value
the number of gold parameters whose value is equal as JSON. A call that cannot be read is a call of
no gold name. Options close the holes that many superfluous calls would use.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # its modules are loaded when they are used: 0.7 s and 40 MB

from rest_jax.config import RewardConfig
from rest_jax.tool_calls import Call


def canonical(value: Any) -> Hashable:
    """A hashable form of a JSON value, equal for equal JSON: true is not 1, 1 and 1.0 are equal,
    member order is free.
    """
    if isinstance(value, dict):
        return ("object", frozenset((key, canonical(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return ("array", tuple(map(canonical, value)))
    if isinstance(value, bool):
        return ("bool", value)
    return value


def same_calls(gold: Sequence[Call], predicted: Sequence[Call]) -> bool:
    """Whether the two are equal as multisets: names, parameters and values."""
    if len(gold) != len(predicted):
        return False
    given, found = (
        Counter((call.name, canonical(call.arguments)) for call in calls)
        for calls in (gold, predicted)
    )
    return given == found


def superfluous(gold: Sequence[Call], predicted: Sequence[Call], unreadable: int = 0) -> int:
    """How many calls, readable or not, there are beyond the number of gold calls."""
    return max(0, len(predicted) + unreadable - len(gold))


def r_name(
    gold: Sequence[Call],
    predicted: Sequence[Call],
    unreadable: int = 0,
    count_extra: bool = True,
    strict: bool = False,
) -> float:
    """Multiset Jaccard of the names, 1 for two empty ones. `unreadable`: further calls, of no gold
    name. `count_extra` False: superfluous calls leave the union. `strict`: all or nothing.
    """
    names, found = Counter(call.name for call in gold), Counter(call.name for call in predicted)
    if strict:
        return float(names == found and not unreadable)
    union = (names | found).total() + unreadable
    union -= 0 if count_extra else superfluous(gold, predicted, unreadable)
    return (names & found).total() / union if union else 1.0


def match_calls(
    gold: Sequence[Call], predicted: Sequence[Call], strict: bool = False
) -> list[float]:
    """r_para + r_value of each gold call in the pairing of `pair_calls`; 0 without a partner."""
    found = pair_calls(gold, predicted, strict)
    return [found[i][1] if i in found else 0.0 for i in range(len(gold))]


def pair_calls(
    gold: Sequence[Call], predicted: Sequence[Call], strict: bool = False
) -> dict[int, tuple[int, float]]:
    """{gold call: (its predicted call, r_para + r_value)}: the best one-to-one pairing of calls with the same name.

    Time: gold x predicted of each name, plus its assignment problem.
    """
    by_name: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i, call in enumerate(gold):
        by_name[call.name][0].append(i)
    for j, call in enumerate(predicted):
        by_name[call.name][1].append(j)
    pairs = {}
    for rows, columns in by_name.values():
        wanted = [_parameters(gold[i]) for i in rows]
        offered = [_parameters(predicted[j]) for j in columns]
        scores = [[_pair_score(g, p, strict) for p in offered] for g in wanted]
        for row, column in _assign(scores):
            pairs[rows[row]] = columns[column], scores[row][column]
    return pairs


def accuracy(
    gold: Sequence[Call], predicted: Sequence[Call], cfg: RewardConfig, unreadable: int = 0
) -> float:
    """S_acc with the options of `cfg`. `unreadable`: calls that were tried and cannot be read.
    ValueError when gold has no calls, where it is not defined.
    """
    if not gold:
        raise ValueError("accuracy: gold has 0 calls; score the format alone")
    if cfg.coarse:
        return float(same_calls(gold, predicted) and not unreadable)
    if not predicted:
        return 0.0
    gained = r_name(gold, predicted, unreadable, cfg.count_extra_calls, cfg.strict_match)
    gained += sum(match_calls(gold, predicted, cfg.strict_match))
    score = gained / (1 + len(gold) + sum(len(call.arguments) for call in gold))
    cost = cfg.extra_call_penalty * superfluous(gold, predicted, unreadable) / len(gold)
    return score * max(0.0, 1.0 - cost)


def _parameters(call: Call) -> dict[str, Hashable]:
    return {key: canonical(value) for key, value in call.arguments.items()}


def _pair_score(gold: Mapping[str, Hashable], found: Mapping[str, Hashable], strict: bool) -> float:
    """r_para + r_value of one pair."""
    common = gold.keys() & found.keys()
    union = len(gold) + len(found) - len(common)
    r_para = len(common) / union if union else 1.0
    if strict and r_para < 1.0:
        r_para = 0.0
    return r_para + sum(gold[key] == found[key] for key in common)


def _assign(scores: list[list[float]]) -> list[tuple[int, int]]:
    """(row, column) pairs of the largest total."""
    if not scores or not scores[0]:
        return []
    if len(scores) == 1:
        return [(0, scores[0].index(max(scores[0])))]
    rows, columns = scipy.optimize.linear_sum_assignment(np.array(scores), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
