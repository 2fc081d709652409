"""BFCL, the Berkeley Function-Calling Leaderboard (Patil et al., ICML 2025), versions 3 and 4, judged by its own package.

    with Bfcl(VERSIONS["bfcl_v4"], venv, categories, limit) as source:     the package, in a process of its own (bfcl_child.py)
        source.begin(folder, template, at_once)                             what the folder has answered is not asked again
        answer_all(source, ...)                                             a source of queries, as any other
        result(source)                                                      items, rates, figures

A figure of the leaderboard is a weighted sum of the rates of categories. Host code without jax.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from rest_jax.child import Child, find_python
from rest_jax.config import nearest
from rest_jax.errors import UserError
from rest_jax.evaluation.statistics import weighted_rates_interval
from rest_jax.files import Location
from rest_jax.run.metrics import summary_table
from rest_jax.run.progress import Progress
from rest_jax.templates import TEMPLATES, Template, toolrl
from rest_jax.tool_calls import Call
from rest_jax.worlds.records import Query, Reply, assistant_message

PROGRAM = pathlib.Path(__file__).with_name("bfcl_child.py")
# What the package imports on the way that is taken here. It asks for much more: the SDK of every vendor.
_NEEDS = (
    "mpmath filelock tenacity overrides python-dotenv tqdm numpy pandas python-dateutil "
    "tree_sitter==0.21.3 tree_sitter_java==0.21.0 tree_sitter_javascript==0.21.4"
)
ENTRY_SECONDS = 60  # of processor time that the calls of an entry may take
_JUDGE_SECONDS = 24 * 3600  # the judge may take as long as all calls did
_LIVE_AST = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
_LIVE = (*_LIVE_AST, "live_irrelevance", "live_relevance")
_MULTI_TURN = tuple(
    f"multi_turn_{kind}" for kind in ("base", "miss_func", "miss_param", "long_context")
)
_AGENTIC = {
    **dict.fromkeys(("web_search_base", "web_search_no_snippet"), "it needs the network"),
    **dict.fromkeys(
        ("memory_kv", "memory_rec_sum"), "its entries begin with files that earlier ones write"
    ),
    "memory_vector": "it needs a model of embeddings",
    "format_sensitivity": "it varies the package's own prompt, which is not used",
}

Weights = Mapping[str, float]  # of categories


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of the benchmark."""

    SCORES: ClassVar = ("correct",)

    name: str
    release: str  # of the package bfcl-eval
    simple: tuple[str, ...]  # its categories of one call in Python, Java, JavaScript
    # categories of it that are not run, and why
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The categories that are run, by the groups that `--categories` takes, too."""
        non_live = (*self.simple, "multiple", "parallel", "parallel_multiple", "irrelevance")
        return {"non_live": non_live, "live": _LIVE, "multi_turn": _MULTI_TURN}

    @property
    def requirement(self) -> str:
        """What pip is to install, without what that requires."""
        return f"--no-deps bfcl-eval=={self.release} {_NEEDS}"

    @staticmethod
    def describe(found: Mapping[str, Any]) -> list[str]:
        """The table of the figures, and lines on what they are of."""
        rows = [["figure", "", "95 % interval"]]
        for figure, value in found["figures"].items():
            cells = ("-", "-")
            if value is not None:
                cells = (f"{value['rate']:.1%}", f"{value['low']:.1%} to {value['high']:.1%}")
            rows.append([figure, *cells])
        lines = [
            summary_table(rows),
            f"judged by bfcl-eval {found['release']}; prompts of the template {found['template']}",
        ]
        if names := found["known"]["unsatisfiable"]:
            lines.append(f"no answer is right, by the judge, for {', '.join(names)}")
        if failed := [item["id"] for item in found["items"] if item["error"]]:
            lines.append(f"{len(failed)} entries were broken off, such as {failed[0]}")
        if found["network"] is not None:
            lines.append(f"calls ran with the network in reach: {found['network']}")
        return lines


VERSIONS = {
    version.name: version
    for version in (
        Version("bfcl_v3", "2025.6.14", ("simple", "java", "javascript")),
        Version(
            "bfcl_v4",
            "2026.3.23",
            ("simple_python", "simple_java", "simple_javascript"),
            _AGENTIC,
        ),
    )
}
# Entries of both versions for which the judge takes no answer for right: it wants a list where it refuses every list, a parameter
# that the truth does not have, or refuses one that it has.
UNSATISFIABLE = (
    *("live_simple_106-63-0", "live_simple_112-68-0"),
    *("live_multiple_862-181-3", "live_multiple_964-207-0"),
)


def chosen(version: Version, names: str | None) -> list[str]:
    """The categories of a list of categories and groups, with commas; all for None. UserError for others."""
    groups = version.groups
    every = [category for group in groups.values() for category in group]
    if names is None:
        return every
    wanted: set[str] = set()
    for name in (word.strip() for word in names.split(",")):
        if name in version.refused:
            raise UserError(f"--categories {name}: not run: {version.refused[name]}")
        if name not in groups and name not in every:
            known = [*groups, *every, *version.refused]
            said = f"unknown category of {version.name}{nearest(name, known)}"
            raise UserError(f"--categories {name}: {said}")
        wanted |= set(groups.get(name, (name,)))
    return [category for category in every if category in wanted]


# --- the process ------------------------------------------------------------------------------------------------------


class Bfcl:
    """The entries of categories as a source of queries (`worlds.records.Source`), and their judge. A resource: it holds the
    process of the package.
    """

    def __init__(
        self,
        version: Version,
        venv: Location | None,
        categories: Sequence[str],
        limit: int | None = None,
    ):
        """`limit`: entries of each category, from the first. UserError unless the virtual environment has the package."""
        self.version, self.categories, self.limit = version, list(categories), limit
        self.template = ""
        self.started: dict[str, Any] = {}  # what the process says of itself and the entries
        self.judged: dict[str, Any] = {}  # what it says at the end
        self.tokens = 0  # drawn by now
        self._tools: dict[str, tuple[Any, ...]] = {}  # of each entry, as they were told last
        self._stack = contextlib.ExitStack()
        python = find_python(venv, "bfcl_eval", version.requirement)
        command = [python, "-I", "-X", "utf8", str(PROGRAM)]
        self._child = self._stack.enter_context(Child(version.name, command))
        found = self._receive()
        said = ""
        if found["package"] != version.release:
            said = f"bfcl-eval {found['package']}; {version.name} is judged by {version.release}"
        elif found["missing"]:
            said = f"bfcl-eval lacks {', '.join(found['missing'])}"
        if said:
            self.close()
            install = f"`pip install {version.requirement}` in an environment of its own"
            raise UserError(f"--data {venv}: {said}: {install}")

    def __enter__(self) -> "Bfcl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._stack.close()

    def begin(self, folder: pathlib.Path, template: str, at_once: int) -> None:
        """Begins to ask, `at_once` entries at a time."""
        self.template = template
        self._child.send(
            {
                "root": str(folder),
                "categories": self.categories,
                "limit": self.limit,
                "functions": template != "toolrl",
                "at_once": at_once,
                "seconds": ENTRY_SECONDS,
            }
        )
        self.started = self._receive()
        total, self._answered = self.started["entries"], self.started["answered"]
        progress = Progress(total, self._answered, unit="entry", at_once=at_once)
        self._progress = self._stack.enter_context(contextlib.closing(progress))

    def poll(self, block: bool) -> list[tuple[Hashable, Query]] | None:
        """`Source.poll`. None once the judge has spoken."""
        queries: list[tuple[Hashable, Query]] = []
        while True:
            if self.judged:
                return queries or None
            message = self._child.receive(block and not queries, _JUDGE_SECONDS)
            if message is None:
                return queries
            if "key" in message:
                key = message["key"]
                if "tools" in message:
                    self._tools[key] = tuple(message["tools"])
                queries.append((key, Query(tuple(message["messages"]), self._tools[key])))
            elif "answered" in message:
                self._answered += message["answered"]
                self._progress.update(self._answered, f"{self.tokens:,} tokens")
            else:
                self.judged = message

    def reply(self, key: Hashable, reply: Reply) -> None:
        """`Source.reply`. Every call that can be read is made."""
        self.tokens += len(reply.ids)
        if not len(reply.ids):
            reason = (
                f"the prompt of {reply.prompt_tokens:,} tokens leaves no token for a completion"
            )
            self._child.send({"key": key, "error": reason})
            return
        calls = [call for call in reply.answer.calls if not self._declines(call)]
        answer = dataclasses.replace(reply.answer, calls=tuple(calls))
        said = assistant_message(answer)
        if not calls and answer.response is None:
            said = {"role": "assistant", "content": reply.text}
        self._child.send(
            {
                "key": key,
                "message": said,
                "calls": [{call.name: call.arguments} for call in calls],
                "text": reply.text,
                "tokens": len(reply.ids),
                "prompt_tokens": reply.prompt_tokens,
                "truncated": reply.truncated,
            }
        )

    def _declines(self, call: Call) -> bool:
        """Whether it is the call by which `toolrl_template` lets a model say that no tool applies."""
        return self.template == "toolrl" and call.name.strip().lower() == "none"

    def _receive(self) -> dict[str, Any]:
        message = self._child.receive()
        assert message is not None  # it waits
        return message


# --- prompts ----------------------------------------------------------------------------------------------------------

# Words of ToolRL's handler for the package (qiancheng0/ToolRL, benchmarks/BFCL/rlla_qwen.py).
ONE_TURN = (
    "If there's no appropriate tools to apply or required parameters are missing, please directly inform me in your response "
    "without any tool call, or call the tool with the name as 'None'. Otherwise, you should use one or more necessary tool calls "
    "to complete the given task in this turn."
)
AFTER_RESULTS = (
    "<user> If you think you have completed the current task, or the task cannot be finished, please respond directly without "
    "additional tool calls. If you encounter an error during tool execution or the task remains unfinished, retry with the one "
    "or more necessary tool calls according to your thought and plan until completion. Based on the tool execution feedback, "
    "reflect on if understanding or selectioin of tool is wrong, what tool calling step is missing, and how to achieve the task "
    "goal from now on. </user>"
)


def template(name: str) -> Template:
    """The template of that name, as this benchmark uses it: `toolrl` is what ToolRL's own handler makes of a dialogue."""
    found = TEMPLATES[name]
    if name != "toolrl":
        return found
    return dataclasses.replace(found, render_prompt=toolrl_prompt)


def toolrl_prompt(
    tools: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], brief: bool = False
) -> list[dict[str, str]]:
    """The dialogue in one user message, each turn with the words that ToolRL adds; system messages are left out."""
    system, _ = toolrl.render_prompt(tools, [], brief)
    text = "**Dialogue Records History**\n"
    for message in history:
        role, content = message["role"], (message.get("content") or "").strip()
        if role == "user":
            text += f"<user> {content}\n{ONE_TURN} </user>\n"
        elif role == "tool":
            text += f"<obs> {content} </obs>\n"
        elif role == "assistant":
            _, turn = toolrl.render_prompt((), [message], brief=True)
            text += f"\n{turn['content']}\n"
    if history and history[-1]["role"] == "tool":
        text += f"\n{AFTER_RESULTS}\n"
    return [
        {"role": "system", "content": system["content"] + "\n"},
        {"role": "user", "content": text.strip()},
    ]


# --- results ----------------------------------------------------------------------------------------------------------


def result(source: Bfcl) -> dict[str, Any]:
    """What a result file has of the benchmark, but for the rates. The judge has spoken."""
    version, items = source.version, [_item(line) for line in source.judged["items"]]
    asked = {item["id"] for item in items}
    scores = source.judged["scores"]
    return {
        "benchmark": version.name,
        "release": version.release,
        "template": source.template,
        "network": source.started["network"],
        "resumed": source.started["answered"],
        "prompts_sha256": source.started["sha256"],
        "known": {"unsatisfiable": [name for name in UNSATISFIABLE if name in asked]},
        "figures": figures(version, {name: _count(score) for name, score in scores.items()}),
        "leaderboard": source.judged["leaderboard"],
        "items": items,
    }


def figures(
    version: Version, counts: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, float] | None]:
    """The figures of the leaderboard, each with its interval, from the (right, asked) entries of categories. None for a figure of
    a category that was not asked.
    """
    asked = {name: count for name, (_, count) in counts.items()}
    found: dict[str, dict[str, float] | None] = {}
    for figure, make in _FIGURES.items():
        try:
            weights = make(version, asked)
        except KeyError:
            found[figure] = None
            continue
        rate = sum(w * counts[name][0] / counts[name][1] for name, w in weights.items())
        parts = [(w, *counts[name]) for name, w in weights.items()]
        low, high = weighted_rates_interval(parts)
        found[figure] = {"rate": rate, "low": low, "high": high}
    return found


def _item(line: Mapping[str, Any]) -> dict[str, Any]:
    replies = line["replies"]
    return {
        "id": line["id"],
        "group": line["group"],
        "completions": [reply["text"] for reply in replies],
        "tokens": sum(reply["tokens"] for reply in replies),
        "truncated": any(reply["truncated"] for reply in replies),
        "correct": line["correct"],
        "error": line["error"],
    }


def _count(score: Mapping[str, Any]) -> tuple[int, int]:
    return score["correct_count"], score["total_count"]


def _mean(*parts: Weights) -> Weights:
    """Of figures that are equally important."""
    return _sum(*((1 / len(parts), part) for part in parts))


def _sum(*parts: tuple[float, Weights]) -> Weights:
    total: dict[str, float] = {}
    for factor, part in parts:
        for name, weight in part.items():
            total[name] = total.get(name, 0.0) + factor * weight
    return total


def _pooled(asked: Mapping[str, int], names: Sequence[str]) -> Weights:
    """Of entries that are equally important. KeyError for a category that was not asked."""
    counts = {name: asked[name] for name in names}
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def _means(asked: Mapping[str, int], names: Sequence[str]) -> Weights:
    return _mean(*(_pooled(asked, [name]) for name in names))


def _parts(version: Version, asked: Mapping[str, int]) -> list[Weights]:
    """The kinds of calls that the leaderboard tells apart without live ones."""
    return [_means(asked, version.simple)] + [
        _pooled(asked, [name]) for name in ("multiple", "parallel", "parallel_multiple")
    ]


def _overall_v3(version: Version, asked: Mapping[str, int]) -> Weights:
    irrelevance = _pooled(asked, ["irrelevance"])
    return _mean(
        _mean(*_parts(version, asked), irrelevance),
        _pooled(asked, _LIVE),
        _means(asked, _MULTI_TURN),
    )


def _overall_v4(version: Version, asked: Mapping[str, int]) -> Weights:
    return _sum(
        (0.1, _mean(*_parts(version, asked))),
        (0.1, _pooled(asked, _LIVE_AST)),
        (0.1, _means(asked, _IRRELEVANCE)),
        (0.3, _means(asked, _MULTI_TURN)),
    )


_IRRELEVANCE = ("irrelevance", "live_irrelevance")
_FIGURES: dict[str, Callable[[Version, Mapping[str, int]], Weights]] = {
    "multi-turn": lambda _, asked: _means(asked, _MULTI_TURN),
    "non-live AST": lambda version, asked: _mean(*_parts(version, asked)),
    "live AST": lambda _, asked: _pooled(asked, _LIVE_AST),
    "relevance": lambda _, asked: _pooled(asked, ["live_relevance"]),
    "irrelevance": lambda _, asked: _means(asked, _IRRELEVANCE),
    "overall by v3": _overall_v3,
    "overall by v4, agentic as 0": _overall_v4,
    "overall by v4, without agentic": lambda *them: _sum((1 / 0.6, _overall_v4(*them))),
}
