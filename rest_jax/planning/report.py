"""A plan as text and as a picture of memory. Both read the JSON of `planning.plan.make_plan`."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GIB = 2**30
# In the order of the bars.
NAMES: tuple[str, ...] = (
    "parameters", "base", "optimiser", "reference", "batch", "gradient", "rollout weights", "cache", "temporaries", "outputs",
    "other arguments",
)  # fmt: skip
_SHOWN = 8


def table(plan: Mapping[str, Any]) -> str:
    """Everything that a plan says, in plain text."""
    mesh = " ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    packages = " ".join(f"{name} {version}" for name, version in plan["packages"].items())
    devices = f"{plan['topology']} ({plan['devices']} x {plan['device_kind']})"
    title = f"{plan['name']} on {devices}, rest-jax {plan['command']}, mesh {mesh}; {packages}"
    blocks = [title, memory_table(plan["memory"]), program_table(plan), collective_table(plan)]
    blocks.append(step_table(plan))
    blocks.append(verdict(plan))
    return "\n\n".join(block for block in blocks if block)


def memory_table(memory: Mapping[str, Any]) -> str:
    """GiB of one device by program and name, against the limit."""
    programs, limit = memory["programs"], memory["limit"]
    names = [name for name in NAMES if any(name in parts for parts in programs.values())]
    rows = [["memory, GiB a device", *names, "total", "of limit"]]
    for program, parts in programs.items():
        cells = [f"{parts[name] / GIB:.2f}" if name in parts else "" for name in names]
        share = f"{100 * parts['total'] / limit:.0f} %"
        rows.append([program, *cells, f"{parts['total'] / GIB:.2f}", share])
    return f"{columns(rows)}\nlimit {limit / GIB:.2f} GiB"


def program_table(plan: Mapping[str, Any]) -> str:
    """FLOPs, bytes and estimated time of each program of a step, and of each token that it draws."""
    if "programs" not in plan:
        return ""
    step, lengths = plan["step"], plan["lengths"]
    title = f"a device, prompt {lengths['prompt']}, response {lengths['response']}"
    rows = [[title, "times", "TFLOP", "GB", "ms", "s a step"]]
    for name, program in plan["programs"].items():
        calls = plan["calls"][name]
        for kind, times in (("call", calls["calls"]), ("token", calls["tokens"])):
            if times:
                work = program[kind]
                ms = seconds = ""
                if step:
                    cost = step["costs"][name][kind]
                    ms, seconds = f"{1e3 * cost:.2f}", f"{times * cost:.2f}"
                label = name if kind == "call" else f"{name}, a token"
                flops, nbytes = f"{work['flops'] / 1e12:.3f}", f"{work['bytes'] / 1e9:.2f}"
                rows.append([label, f"{times:.4g}", flops, nbytes, ms, seconds])
    return columns(rows)


def collective_table(plan: Mapping[str, Any]) -> str:
    """Collectives by program, kind and place."""
    rows = [["collectives", "kind", "where", "part", "devices", "times", "GB a device"]]
    apart = "hosts" if plan["topology"].startswith("h100") else "slices"
    for name, program in plan.get("programs", {}).items():
        for one in sorted(program["collectives"], key=lambda c: -c["nbytes"])[:_SHOWN]:
            beside = ", overlaps" if one["overlaps"] else ""
            across = f", across {apart}" if one["crosses"] else ""
            rows.append(
                [name, one["kind"], f"{one['place']}{beside}", one["part"], f"{one['group']}{across}",
                 str(one["count"]), f"{one['nbytes'] / 1e9:.3f}"]
            )  # fmt: skip
    return columns(rows) if len(rows) > 1 else ""


def step_table(plan: Mapping[str, Any]) -> str:
    """Seconds of a step, MFU, tokens a second, and what takes the time."""
    step = plan.get("step")
    if not step:
        return ""
    parts = [
        (seconds, f"{program}: {part}")
        for program, inner in step["parts"].items()
        for part, seconds in inner.items()
    ]
    top = sorted(parts, reverse=True)[:_SHOWN]
    most = ", ".join(f"{name} {100 * s / step['seconds']:.0f} %" for s, name in top)
    mfu = ", ".join(
        f"{name} {100 * step[f'{name}_mfu']:.1f} %"
        for name in ("update", "rollout")
        if f"{name}_mfu" in step
    )
    stages = f" = rollout {step['rollout_seconds']:.1f} + update {step['update_seconds']:.1f}"
    return (
        f"step, estimated: {step['seconds']:.1f} s{stages if step['rollout_seconds'] else ''}; "
        f"{step['tokens_per_second']:,.0f} tokens/s, {step['tokens_per_second_per_device']:,.0f} a device; MFU {mfu}\n"
        f"what takes the time: {most}"
    )


def verdict(plan: Mapping[str, Any]) -> str:
    """Whether it fits, and what would."""
    programs, limit = plan["memory"]["programs"], plan["memory"]["limit"]
    name = max(programs, key=lambda program: programs[program]["total"])
    share = 100 * programs[name]["total"] / limit
    said = f"{name} needs the most, {programs[name]['total'] / GIB:.2f} GiB, {share:.0f} % of the limit"
    if plan["fits"]:
        return f"it fits: {said}"
    change, not_compiled = plan["change"], plan["not_compiled"]
    if change is None and not_compiled:
        return (
            f"it does not fit: {said}; {len(not_compiled)} of the changes that were tried could not be compiled, and no other "
            f"does: {not_compiled[-1]}"
        )
    if change is None:
        return f"it does not fit: {said}; nothing that was tried does: take more devices"
    needs = change["memory"]["programs"]
    most = max(parts["total"] for parts in needs.values())
    time = f", a step of {change['step']['seconds']:.1f} s" if change.get("step") else ""
    words = " ".join(change["values"])
    return f"it does not fit: {said}\nit fits with {words}: {most / GIB:.2f} GiB{time}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def draw(plan: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the picture of memory as PNG: a bar for each program, its parts, and the limit."""
    from rest_jax.analysis import plotting

    programs, limit = plan["memory"]["programs"], plan["memory"]["limit"]
    greys = plotting.GREY, plotting.BLACK, plotting.LIGHT
    # a plan has one of the two, or a small reference beside the base
    alike = {"base": "reference"}
    names = [name for name in NAMES if name not in alike]
    colours = dict(zip(names, (*plotting.PALETTE, *greys), strict=True))
    colours |= {name: colours[other] for name, other in alike.items()}
    figure = plotting.new_figure(8, 1.2 + 0.4 * len(programs))
    axes = figure.subplots()
    left = dict.fromkeys(programs, 0.0)
    for name in _used(programs.values()):
        sizes = [parts.get(name, 0) / GIB for parts in programs.values()]
        axes.barh(list(programs), sizes, left=list(left.values()), color=colours[name], label=name)
        left = {p: left[p] + s for p, s in zip(programs, sizes, strict=True)}
    axes.axvline(limit / GIB, color=plotting.BLACK, linestyle="--")
    at = limit / GIB, len(programs) - 0.4
    away = {"xytext": (-4, 0), "textcoords": "offset points"}
    axes.annotate("limit", at, ha="right", fontsize="small", **away)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of one device")
    axes.set_title(f"{plan['name']} on {plan['topology']}", fontsize="medium")
    plotting.tidy(axes)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    plotting.save(figure, path)


def _used(programs: Iterable[Mapping[str, int]]) -> list[str]:
    found = list(programs)
    return [name for name in NAMES if any(name in parts for parts in found)]
