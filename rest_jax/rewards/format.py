"""S_format in {0, 1} (docs/method.md section 6): does the answer have the blocks its kind of gold answer needs?

Gold kinds: calls only, response only, both, think only (neither). A think block is required by
toolrl, optional elsewhere. strict: the blocks are exactly those, so that text outside them,
repeated blocks and broken tags fail. Not strict (the released rule): the required blocks occur, in
order, and toolrl has no response block where gold has none.
"""

import re

from rest_jax.tool_calls import Answer, Block, Target

_LETTER = {
    Block.THINK: "T",
    Block.CALLS: "C",
    Block.RESPONSE: "R",
    Block.TEXT: "x",
    Block.BROKEN: "x",
}

# (gold has calls, gold has a response) -> all blocks of a well-formed answer
_TOOLRL = {(True, False): "TC", (False, True): "TR", (True, True): "TCR", (False, False): "T"}
_PROSE = {(True, False): "T?C+", (False, True): "T?R", (True, True): "T?RC+", (False, False): "T"}


def format_score(answer: Answer, target: Target, template_name: str, strict: bool) -> float:
    """1.0 if the blocks of `answer` are in the form that `target` calls for in this template, else
    0.0.
    """
    kind = (bool(target.calls), target.response is not None)
    written = "".join(map(_LETTER.__getitem__, answer.blocks))
    toolrl = template_name == "toolrl"
    pattern = (_TOOLRL if toolrl else _PROSE)[kind]
    if strict:
        return float(re.fullmatch(pattern, written) is not None)
    if toolrl and not kind[1] and "R" in written:
        return 0.0
    return float(_occur_in_order(pattern.replace("T?", "").replace("+", ""), written))


def _occur_in_order(required: str, written: str) -> bool:
    pos = 0
    for letter in required:
        pos = written.find(letter, pos) + 1
        if pos == 0:
            return False
    return True
