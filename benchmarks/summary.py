"""From the records of single processes to one line a case, and from those to the table.

Run r of ours and run r of the peer follow each other in time. `ratio` is the median of their pairwise ratios,
`ratio_of_medians` what its name says; both must reach the target. Ratios compare tokens per second on the case's clock.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import Case

Record = dict[str, Any]
OURS, PEER, SUMMARY = "rest_jax", "peer", "summary"
_NOTES = {
    "decode_slot_utilisation": "slots {:.1%}",
    "cost_ratio": "{:.2f} of the full cost",
    "gradient_difference": "gradients differ by {:.1e}",
    "responses_per_second": "{:,.0f} responses/s",
    "step_share": "{:.4%} of a 1.7B step on this core",
    "pod_step_share": "{:.1%} of one on 8 x 400 TFLOP/s",
    "pod_rollout_share": "{:.1%} of its rollout",
}
_HEADER = (
    "| case | runs | tokens/s | peer | ratio | of medians | peak GB | peer | ratio | FLOP share | target | met | notes |\n"
    "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --- | --- | --- |\n"
)


def summarise(case: Case, records: Iterable[Record]) -> Record:
    """The summary line of a case. Without a peer's records its ratios are None, and so is what they decide."""
    by_side: dict[str, dict[int, Record]] = {OURS: {}, PEER: {}}
    for record in records:
        if record["case"] == case.name and record["side"] in by_side:
            by_side[record["side"]][record["run"]] = record
    ours, peer = by_side[OURS], by_side[PEER]
    _check_tokens(case, [*ours.values(), *peer.values()])
    middle, other = medians(list(ours.values())), medians(list(peer.values()))
    both = sorted(ours.keys() & peer.keys())
    pairs = [speed(ours[run], case) / speed(peer[run], case) for run in both]
    ratios: Record = {"ratio": None, "ratio_of_medians": None, "memory_ratio": None}
    if both and case.kind not in ("skipping", "host"):
        ratios = {
            "ratio": statistics.median(pairs),
            "ratio_of_medians": speed(middle, case) / speed(other, case),
            "memory_ratio": middle["peak_bytes"] / other["peak_bytes"],
        }
    if both and case.kind == "serve":
        pairs = [(ours[run]["answers"], peer[run]["answers"]) for run in both]
        same = [a == b for run in pairs for a, b in zip(*run, strict=True)]
        ratios["same_answers"] = sum(same) / len(same)
    return {
        "case": case.name,
        "side": SUMMARY,
        "clock": case.clock,
        "runs": len(both) or len(ours),
        **ratios,
        "target": ", ".join(map(str, case.checks)),
        "met": met(case, ratios, middle),
        OURS: middle,
        PEER: other or None,
    }


def met(case: Case, ratios: Record, middle: Record) -> bool | None:
    """Whether every check holds; None when none fails but some cannot be judged."""
    verdicts = []
    for check in case.checks:
        verdicts.append(check.holds(ratios.get(check.metric, middle.get(check.metric))))
        if check.metric == "ratio":
            verdicts.append(check.holds(ratios["ratio_of_medians"]))
    if False in verdicts:
        return False
    return None if None in verdicts else True


def speed(record: Record, case: Case) -> float:
    """Tokens a second on the case's clock."""
    return record["tokens"] / record[case.clock]


def medians(records: Sequence[Record]) -> Record:
    """Median of every number the records hold; yes and no as in the last of them."""
    middle: Record = {}
    for name, last in (records[-1] if records else {}).items():
        if isinstance(last, bool):
            middle[name] = last
        elif isinstance(last, int | float) and name != "run":
            middle[name] = statistics.median(r[name] for r in records if name in r)
    return middle


def table(summaries: Sequence[Record], heading: str) -> str:
    """Markdown: the last summary of every case, in the order the cases came."""
    last = {summary["case"]: summary for summary in summaries}
    rows = "".join(map(_row, last.values()))
    legend = (
        "Runs: processes a side x timed calls in each. "
        "tokens/s: tokens of a call per CPU second (wall second where noted), median of the runs. "
        "Ratio: median of the pairwise ratios. FLOP share: model FLOP/s over those of the fastest matrix product "
        "in the same process.\n"
    )
    return f"{heading}\n\n{_HEADER}{rows}\n{legend}"


def _check_tokens(case: Case, records: Sequence[Record]) -> None:
    counts = sorted({record["tokens"] for record in records})
    if len(counts) > 1:
        raise ValueError(f"{case.name}: the processes did not do the same work: {counts} tokens")


def _row(summary: Record) -> str:
    ours, peer, clock = summary[OURS], summary[PEER] or {}, summary["clock"]
    notes = [text.format(ours[name]) for name, text in _NOTES.items() if name in ours]
    cells = [
        summary["case"],
        f"{summary['runs']} x {ours.get('repeats', '?')}",
        _number(_speed(ours, clock), "{:,.0f}"),
        _number(_speed(peer, clock), "{:,.0f}"),
        _number(summary["ratio"], "{:.2f}"),
        _number(summary["ratio_of_medians"], "{:.2f}"),
        _number(ours["peak_bytes"] / 1e9, "{:.2f}"),
        _number(peer["peak_bytes"] / 1e9 if peer else None, "{:.2f}"),
        _number(summary["memory_ratio"], "{:.2f}"),
        _number(ours["flops_share"] or None, "{:.0%}"),
        summary["target"],
        {True: "yes", False: "no", None: "?"}[summary["met"]],
        "; ".join([*_conditions(summary), *notes]),
    ]
    return f"| {' | '.join(cells)} |\n"


def _conditions(summary: Record) -> list[str]:
    said = {
        "by wall clock": summary["clock"] == "wall_seconds",
        "ours from the compilation cache": summary[OURS].get("compiled_afresh") is False,
        "peer with huge pages": bool((summary[PEER] or {}).get("hugepages")),
    }
    return [text for text, holds in said.items() if holds]


def _speed(middle: Record, clock: str) -> float | None:
    return middle["tokens"] / middle[clock] if middle else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
