"""What the token viewer shows of a step: its first groups, token by token, as one line of `<run>/tokens.jsonl`.

    token_record(...) -> {"tokens": base64 of zlib of JSON}, which a browser can read as it is

The JSON: {"progress", "format_bounds", "correctness_bounds", "prompts": [{"id", "prompt", "prompt_tokens", "gold_calls",
"gold_response", "completions"}]}; a completion has one list entry a token (text, id, region, weight, log-prob, entropy,
trainer's log-prob less the sampler's), its score, and its calls beside the gold ones. A step is bounded: `MOST_TOKENS`.
"""

import base64
import codecs
import dataclasses
import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from rest_jax.config import RewardConfig
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rewards.score import correctness_bounds, format_bounds
from rest_jax.rewards.tool_call import canonical, pair_calls, r_name
from rest_jax.rl.prepare import TokenValues
from rest_jax.rollout.experience import Experience
from rest_jax.rollout.scoring import truncated
from rest_jax.templates import Template
from rest_jax.tool_calls import Answer, Call, Target

MOST_TOKENS = 2**16  # of a step: completions are cut, all alike, so that they have no more together
MOST_STEPS = 500  # of a run, evenly spaced
_PROMPT, _VALUE = 20_000, 1000  # characters of a prompt, and of an argument


def is_shown(step: int, steps: int) -> bool:
    """Whether the tokens of step `step` (from 1) of `steps` are written: the first, and every k-th so that MOST_STEPS suffice."""
    return step == 1 or step % -(-steps // MOST_STEPS) == 0


def token_record(
    values: TokenValues,
    experience: Experience,
    tokenizer: Tokenizer,
    template: Template,
    cfg: RewardConfig,
) -> dict[str, str]:
    """The line of the first n groups of this process, whose `values` (NumPy) the device has made."""
    rollout = experience.scored.rollout
    count, group, _ = values.weight.shape
    most = MOST_TOKENS // max(1, count * group)
    cut = truncated(rollout, tokenizer.stop_ids)
    prompts = []
    for i, record in enumerate(experience.records[:count]):
        completions = []
        for j in range(group):
            length = int(rollout.response_length[i, j])
            ids = rollout.responses[i, j, :length]
            ended = length - (not cut[i, j] and length > 0)
            answer = template.parse(tokenizer.bytes_of(ids[:ended]))
            shown = slice(0, min(length, most))
            sampled = rollout.logp[i, j, shown]
            own = {
                "text": list(token_texts(tokenizer, ids[shown])),
                "id": ids[shown].tolist(),
                "region": experience.scored.region[i, j, shown].tolist(),
                "weight": _rounded(values.weight[i, j, shown]),
                "logp": _rounded(sampled),
                "entropy": _rounded(rollout.entropy[i, j, shown]),
            }
            if values.logp is not None:
                own["mismatch"] = _rounded(values.logp[i, j, shown] - sampled, "{:.2g}")
            completions.append(
                {
                    "length": length,
                    "truncated": bool(cut[i, j]),
                    "advantage": _rounded(values.advantage[i, j : j + 1], "{:.4g}")[0],
                    "score": dataclasses.asdict(experience.scores[i][j]),
                    "blocks": list(answer.blocks),
                    **compare_answers(record.target, answer, cfg),
                    "tokens": own,
                }
            )
        prompt = rollout.prompt[i, : int(rollout.prompt_length[i])]
        prompts.append(
            {
                "id": record.id,
                "prompt": _shortened(tokenizer.text(prompt), _PROMPT),
                "prompt_tokens": len(prompt),
                "gold_calls": len(record.target.calls),
                "gold_response": _shortened(record.target.response, _PROMPT),
                "completions": completions,
            }
        )
    step = {
        "progress": experience.progress,
        "format_bounds": format_bounds(cfg, experience.progress),
        "correctness_bounds": correctness_bounds(cfg, experience.progress),
        "prompts": prompts,
    }
    return write_record(step)


def write_record(step: dict[str, Any]) -> dict[str, str]:
    """The line of the JSON above."""
    text = json.dumps(step, allow_nan=False, separators=(",", ":"))
    return {"tokens": base64.b64encode(zlib.compress(text.encode())).decode()}


def read_record(line: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `write_record`; ValueError (or zlib.error) for a line that it did not make."""
    return json.loads(zlib.decompress(base64.b64decode(line["tokens"], validate=True)))


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterable[str]:
    """The text of each token. A character of several tokens is the last one's; bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids = list(ids)
    for number, token in enumerate(ids, start=1):
        yield decoder.decode(tokenizer.bytes_of([int(token)]), final=number == len(ids))


def compare_answers(target: Target, answer: Answer, cfg: RewardConfig) -> dict[str, Any]:
    """The calls of an answer beside the gold ones, as the reward pairs them: a pair has one name; what is left over on both
    sides is put side by side, in order, and counts for nothing.

    Returns {"calls": [{"gold", "predicted", "right", "parameters": [[name, gold value, predicted value, right]]}],
    "broken_calls", "response", "names", "matched"}; a side that is missing is None, values are JSON text; names is r_name and
    matched r_para + r_value of each gold call (of a target without calls both are absent).
    """
    gold, found = target.calls, answer.calls
    pairs = pair_calls(gold, found, cfg.strict_match)
    partners = {i: j for i, (j, _) in pairs.items()}
    spare = [j for j in range(len(found)) if j not in partners.values()]
    rows = []
    for i, call in enumerate(gold):
        own = i in partners
        j = partners[i] if own else spare.pop(0) if spare else None
        rows.append(_row(call, None if j is None else found[j], own))
    rows += [_row(None, found[j], False) for j in spare]
    made = {
        "calls": rows,
        "broken_calls": answer.broken_calls,
        "response": _shortened(answer.response, _PROMPT),
    }
    if gold:
        matched = [pairs[i][1] if i in pairs else 0.0 for i in range(len(gold))]
        names = r_name(gold, found, answer.broken_calls, cfg.count_extra_calls, cfg.strict_match)
        made |= {"names": round(names, 4), "matched": [round(x, 4) for x in matched]}
    return made


def _row(gold: Call | None, found: Call | None, right: bool) -> dict[str, Any]:
    here, there = (call.arguments if call else {} for call in (gold, found))
    parameters = [
        [
            _shortened(name, _VALUE),
            _json(here[name]) if name in here else None,
            _json(there[name]) if name in there else None,
            right
            and name in here
            and name in there
            and canonical(here[name]) == canonical(there[name]),
        ]
        for name in {**here, **there}
    ]
    names = [_shortened(call.name, _VALUE) if call else None for call in (gold, found)]
    return {"gold": names[0], "predicted": names[1], "right": right, "parameters": parameters}


def _json(value: Any) -> str:
    return _shortened(json.dumps(value, ensure_ascii=False), _VALUE) or ""


def _shortened(text: str | None, most: int) -> str | None:
    """The ends of a text that is longer than `most` characters."""
    left_out = len(text or "") - most
    if text is None or left_out <= 0:
        return text
    return f"{text[: most // 2]}\n[... {left_out} characters left out ...]\n{text[-(most // 2) :]}"


def _rounded(values: np.ndarray, digits: str = "{:.3f}") -> list[float | None]:
    """With so many digits, which compress well; what is not finite becomes None."""
    found = (float(digits.format(x)) for x in values.tolist())
    return [x + 0.0 if math.isfinite(x) else None for x in found]
