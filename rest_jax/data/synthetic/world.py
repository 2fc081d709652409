"""A small synthetic world of tool use: seeded step records for tests, the quickstart and its supervised start.

Every record offers 2 to 4 tools under masked names, new in every record: tool names are random, only the description tells
what a tool does; parameter names are a word and a random ending, which has to be copied. A record asks for calls of one or two
of them, for something none of them does, or for the second step of a dialogue. `world` answers correctly. `demonstrations` are
the same requests answered by a demonstrator with the bad habits of the table `HABITS`; a policy that imitates it makes those
mistakes about as often, and reinforcement has something to mend.
At level `reasoned` every call is thought through before it is made (`reasoning.py`). At level `inferred` the thought names no
tool: which one does what is asked has to be inferred while its name is written, so that names are uncertain, too.
Tools are split into training and held-out ones by `words.split_of`; record i depends on (split, seed, level, i) only.
"""

import dataclasses
import random
from typing import Any, Literal

from rest_jax.data.records import StepRecord
from rest_jax.data.synthetic.reasoning import REASONED_HABITS, Task, answer
from rest_jax.data.synthetic.words import CODE, SYLLABLES, Split, Tool, pairs, value, words
from rest_jax.tool_calls import Call, Target

Level = Literal["single", "mixed", "reasoned", "inferred"]

# share of each kind of record, by level
KINDS: dict[str, dict[str, float]] = {
    "single": {"single": 0.8, "none": 0.2},
    "mixed": {
        "single": 0.40,
        "parallel": 0.22,
        "none": 0.14,
        "first": 0.08,
        "second": 0.10,
        "final": 0.06,
    },
    "reasoned": {
        "single": 0.15,
        "parallel": 0.40,
        "none": 0.10,
        "first": 0.12,
        "second": 0.15,
        "final": 0.08,
    },
    "inferred": {"single": 0.55, "parallel": 0.30, "none": 0.15},
}
# what the sloppy demonstrator does, with its probability where the habit applies. Above a half the greedy answer of an imitator
# is wrong, while four samples nearly always hold a right one (1 - 0.6^4 = 87 %).
HABITS: dict[str, float] = {
    "stringly": 0.60,  # writes integers, numbers and booleans as strings; decided once a record
    "forgets_second": 0.60,  # makes only the first of two parallel calls, though the thought names both
    "spurious_call": 0.60,  # calls the nearest tool where none fits
    "chatty": 0.25,  # adds a response to calls, which the format does not allow there
}
# the same at level `inferred`
INFERRED_HABITS: dict[str, float] = {
    "forgets_second": 0.40,
    "stringly": 0.40,
    "chatty": 0.15,
}
NO_TOOL = "No tool fits this request."
CHATTER = "Working on it."
_OPENINGS = ("please", "i want to", "can you", "i need to", "now", "could you")


@dataclasses.dataclass(frozen=True)
class Draft:
    """A record in the making: `tempting` is what a careless demonstrator answers where no tool fits."""

    tools: list[Tool]
    history: list[dict[str, Any]]
    target: Target
    tasks: tuple[Task, ...]
    done: str = ""  # what a later step's thought begins with
    tempting: Target | None = None


def world(split: Split, seed: int, size: int, level: Level = "mixed") -> list[StepRecord]:
    """`size` records with correct answers; `split` "eval" holds other tools than "train"."""
    return [_record(split, seed, i, level, sloppy=False) for i in range(size)]


def demonstrations(split: Split, seed: int, size: int, level: Level = "mixed") -> list[StepRecord]:
    """The same requests as `world`, answered with the mistakes of `HABITS`, or of the level's own."""
    return [_record(split, seed, i, level, sloppy=True) for i in range(size)]


def _record(split: Split, seed: int, index: int, level: Level, sloppy: bool) -> StepRecord:
    name = f"{split}-{seed}-{level}-{index}"
    rng = random.Random(name)
    kind = rng.choices(list(KINDS[level]), list(KINDS[level].values()))[0]
    maker = Maker(rng, split)
    draft = getattr(maker, kind)()
    rng.shuffle(draft.tools)
    known, answered = _ANSWERS.get(level, (HABITS, _plain_answer))
    habits = _striking(known, random.Random(f"habits-{name}")) if sloppy else set()
    target = answered(draft, habits)
    return StepRecord(
        id=f"synthetic-{name}-{kind}",
        source="synthetic",
        tools=tuple(tool.schema() for tool in draft.tools),
        history=tuple(draft.history),
        target=_misspelt(target, habits),
    )


def _striking(habits: dict[str, float], rng: random.Random) -> set[str]:
    """The habits that strike in one record."""
    return {habit for habit, probability in habits.items() if rng.random() < probability}


def _plain_answer(draft: Draft, habits: set[str]) -> Target:
    """The draft's answer; the habits may spoil the choice of its calls."""
    target = draft.target
    if "spurious_call" in habits and draft.tempting is not None:
        target = draft.tempting
    if "forgets_second" in habits:
        target = dataclasses.replace(target, calls=target.calls[:1])
    return target


def _reasoned_answer(draft: Draft, habits: set[str]) -> Target:
    """The thought-through answer; the habits may spoil the thought."""
    report = draft.target.response or ""
    return answer(draft.tasks, draft.tools, draft.done, report, NO_TOOL, habits)


def _inferred_answer(draft: Draft, habits: set[str]) -> Target:
    """The answer behind a thought that says what is to be done, not by which tool; the habits may spoil the choice."""
    does = [task.does for task in draft.tasks]
    calls = list(draft.target.calls)
    if "forgets_second" in habits:
        del calls[1:], does[1:]
    think = f"need to {'; '.join(does)}"
    return dataclasses.replace(draft.target, calls=tuple(calls), think=think)


_ANSWERS = {
    "reasoned": (REASONED_HABITS, _reasoned_answer),
    "inferred": (INFERRED_HABITS, _inferred_answer),
}


def _misspelt(target: Target, habits: set[str]) -> Target:
    """The habits that spoil the writing of a call, not the choice of it."""
    if "stringly" in habits:
        calls = tuple(
            Call(c.name, {k: _as_string(v) for k, v in c.arguments.items()}) for c in target.calls
        )
        target = dataclasses.replace(target, calls=calls)
    if "chatty" in habits and target.calls:
        target = dataclasses.replace(target, response=CHATTER)
    return target


def _as_string(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (int, float)) else value


class Maker:
    """Draws the parts of one record; holds its random state and the names already used."""

    def __init__(self, rng: random.Random, split: Split):
        self.rng = rng
        self.pairs = pairs(split)
        self.used: set[tuple[str, str]] = set()
        self.names: set[str] = set()

    # kinds of records

    def single(self) -> Draft:
        tool = self.tool()
        clause, call = self._request(tool)
        return self._draft(
            [tool], self._say(clause), [(tool, call)], distractors=self.rng.randint(1, 3)
        )

    def parallel(self) -> Draft:
        twice = self.rng.random() < 0.4
        first = self.tool(least=1 if twice else 0, most=2)
        second = first if twice else self.tool(most=2)
        (clause1, call1), (clause2, call2) = self._request(first), self._request(second)
        while call2 == call1:
            clause2, call2 = self._request(second)
        tools = [first] if twice else [first, second]
        history = self._say(f"{clause1} and {clause2}")
        return self._draft(
            tools, history, [(first, call1), (second, call2)], distractors=self.rng.randint(1, 2)
        )

    def none(self) -> Draft:
        wanted = self.tool()
        clause, call = self._request(wanted)
        near = self.similar(wanted, parameters=list(wanted.parameters))
        masks = dict(zip(wanted.parameters.values(), near.parameters.values(), strict=True))
        nearest = Call(near.name, {masks[mask]: v for mask, v in call.arguments.items()})
        others = [self.tool(most=2) for _ in range(self.rng.randint(1, 2))]
        target = Target(response=NO_TOOL, think=f"need to {wanted.does}: no tool fits")
        return Draft(
            tools=[near, *others],
            history=self._say(clause),
            target=target,
            tasks=(_task(wanted, call),),
            tempting=Target(calls=(nearest,), think=thought((wanted.does, near))),
        )

    def first(self) -> Draft:
        one, other, clause, call, _ = self._two_steps()
        draft = self._draft([one, other], self._say(clause), [(one, call)], distractors=1)
        later = Task(other.action, other.thing, {}, waits=True)
        return dataclasses.replace(draft, tasks=(*draft.tasks, later))

    def second(self) -> Draft:
        one, other, clause, call, code = self._two_steps()
        history = [*self._say(clause), *self._done(call, code)]
        last = Call(other.name, {other.parameters[CODE]: code})
        draft = self._draft([one, other], history, [(other, last)], distractors=1)
        return dataclasses.replace(draft, done=f"{one.does} is done: {CODE} {code}.")

    def final(self) -> Draft:
        tool = self.tool(most=2)
        clause, call = self._request(tool)
        code, _ = value(self.rng, CODE)
        history = [*self._say(clause), *self._done(call, code)]
        target = Target(response=f"Done: {CODE} {code}.", think=f"{tool.does} is done: report it")
        done = f"{tool.does} is done: {CODE} {code}."
        return Draft([tool, self._distractor(tool)], history, target, tasks=(), done=done)

    # parts

    def _draft(
        self, tools: list[Tool], history: list, wanted: list[tuple[Tool, Call]], distractors: int
    ) -> Draft:
        others = [self._distractor(tools[0]) for _ in range(min(distractors, 4 - len(tools)))]
        target = Target(
            calls=tuple(call for _, call in wanted),
            think=thought(*((tool.does, tool) for tool, _ in wanted)),
        )
        tasks = tuple(_task(tool, call) for tool, call in wanted)
        return Draft([*tools, *others], history, target, tasks)

    def _two_steps(self) -> tuple[Tool, Tool, str, Call, str]:
        one, other = self.tool(most=2), self.tool(parameters=[CODE])
        clause, call = self._request(one)
        code, _ = value(self.rng, CODE)
        clause += f", then {other.action} the {other.thing} with the {CODE} you get"
        return one, other, clause, call, code

    def _say(self, clause: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"{self.rng.choice(_OPENINGS)} {clause}"}]

    def _done(self, call: Call, code: str) -> list[dict[str, Any]]:
        return [
            {"role": "assistant", "content": None, "calls": [dataclasses.asdict(call)]},
            {"role": "tool", "content": f"{CODE} {code}"},
        ]

    def _request(self, tool: Tool) -> tuple[str, Call]:
        """A clause that asks for one call of the tool, its parameters in any order, and that call."""
        values = {word: value(self.rng, word) for word in tool.parameters}
        said = [f"{word} {spoken}" for word, (_, spoken) in values.items()]
        self.rng.shuffle(said)
        clause = f"{tool.action} the {tool.thing}" + (f" with {', '.join(said)}" if said else "")
        return clause, Call(
            tool.name, {tool.parameters[word]: v for word, (v, _) in values.items()}
        )

    def _distractor(self, wanted: Tool) -> Tool:
        return self.similar(wanted) if self.rng.random() < 0.5 else self.tool(most=2)

    def similar(self, wanted: Tool, parameters: list[str] | None = None) -> Tool:
        """A tool that shares the action or the object, not both."""
        near = [
            p
            for p in self.pairs
            if (p[0] == wanted.action) != (p[1] == wanted.thing) and p not in self.used
        ]
        return self.tool(self.rng.choice(near), parameters=parameters, most=2)

    def tool(
        self,
        pair: tuple[str, str] | None = None,
        parameters: list[str] | None = None,
        least: int = 0,
        most: int = 3,
    ) -> Tool:
        """A tool not offered yet, under a fresh name; `parameters` fixes its words, else `least` to `most` are drawn."""
        while pair is None or pair in self.used:
            pair = self.rng.choice(self.pairs)
        self.used.add(pair)
        if parameters is None:
            parameters = words(self.rng, self.rng.randint(least, most))
        masks = {word: f"{word}_{self.name(1)}" for word in parameters}
        return Tool(*pair, name=self.name(2), parameters=masks)

    def name(self, syllables: int) -> str:
        while True:
            name = "".join(self.rng.sample(SYLLABLES, syllables))
            if name not in self.names:
                self.names.add(name)
                return name


def _task(tool: Tool, call: Call) -> Task:
    values = {word: call.arguments[mask] for word, mask in tool.parameters.items()}
    return Task(tool.action, tool.thing, values)


def thought(*chosen: tuple[str, Tool]) -> str:
    """The thought: what is needed, and the tool that does it, in the words of the tool list."""
    return "need to " + "; ".join(
        f'{does}: "{tool.name}" ({tool.signature})' for does, tool in chosen
    )
