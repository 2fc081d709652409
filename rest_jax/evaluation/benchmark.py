"""Public benchmarks: every item is answered once and scored once, and a result file keeps what is needed to check the figures.

    BENCHMARKS[name]   a module: load(folder, limit) -> items (id, group, messages, ...), score(item, text) -> {score: bool},
                       SCORES (their names), report(items) -> what is known of the items themselves; or a version of BFCL, or
                       tau2, whose items are dialogues
    scored(name, load(name, folder, limit), complete) -> the result, with any function from messages to completions
    evaluate_benchmark(...), compare_results(a, b)   the commands `rest-jax evaluate --benchmark` and `--compare`

A rate has its 95 % interval, of all items (micro average) and of each group. Two results of one benchmark are compared item by
item.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rest_jax import __version__
from rest_jax.cache_folder import user_cache
from rest_jax.config import Config, nearest
from rest_jax.data.loader import bucketed, pad
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Encoder
from rest_jax.distributed import is_first_process, num_data_shards, platform, say
from rest_jax.errors import UserError
from rest_jax.evaluation import api_bank, bfcl, tau2
from rest_jax.evaluation.dialogues import Settings, answer_all
from rest_jax.evaluation.statistics import (
    estimate,
    least_difference,
    mcnemar,
    mean_rate,
    paired_differences,
    resolvable_difference,
)
from rest_jax.files import (
    Location,
    absolute,
    as_path,
    atomic_write,
    check_output,
    is_url,
    list_files,
    store_errors,
)
from rest_jax.models.policy import Policy, check_positions
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.requests import Piece, Request, check_capacity, make_stream
from rest_jax.rollout.scheduler import make_sampler
from rest_jax.rollout.scoring import truncated
from rest_jax.run import checkpoint
from rest_jax.run.load import is_run, load_policy, model_files, result_place
from rest_jax.run.metrics import summary_table
from rest_jax.run.progress import Progress
from rest_jax.run.results import files_digest
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target
from rest_jax.types import PromptBatch, RolloutBatch, Sampling
from rest_jax.worlds.dialogues import Dialogues
from rest_jax.worlds.records import Source

BENCHMARKS: dict[str, Any] = {"api_bank": api_bank, **bfcl.VERSIONS, "tau2": tau2}
FORMAT = 1  # of result files
ALL = "all"  # the group of all items
# what completions of records are compared by -> the field of their lines
_OF_RECORDS = {"exact": "exact", "format": "format_score"}
# of a comparison; `gained` and `lost` count the items that only the second, or only the first, has right, and of shares
# those that have risen or fallen
_COLUMNS = (
    *("score", "items", "first", "second", "difference", "95 % interval"),
    *("gained", "lost", "p", "resolvable"),
)

Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote, without the token that ends the turn, and how many tokens that took, with it."""

    text: str
    tokens: int = 0
    truncated: bool = False  # it did not end within the limit


Complete = Callable[[Sequence[Messages]], Sequence[Completion]]


def load(name: str, folder: Location, limit: int | None) -> Sequence[Any]:
    """The items, of each group `limit` at most. UserError for a folder that is not the benchmark's own."""
    return BENCHMARKS[name].load(folder, limit)


def scored(name: str, items: Sequence[Any], complete: Complete) -> dict[str, Any]:
    """The items with completions and scores, the rates, and what is known of the items."""
    benchmark = BENCHMARKS[name]
    lines = score_items(name, items, complete([item.messages for item in items]))
    asked = [[item.id, [dict(message) for message in item.messages]] for item in items]
    return {
        "benchmark": name,
        "format": FORMAT,
        "version": __version__,
        "prompts_sha256": _digest(asked),
        "rates": {score: rates(lines, score) for score in benchmark.SCORES},
        "known": benchmark.report(items),
        "items": lines,
    }


def score_items(
    name: str, items: Sequence[Any], completions: Sequence[Completion]
) -> list[dict[str, Any]]:
    """The lines of a result file, one an item."""
    return [
        {"id": item.id, "group": item.group}
        | {"completion": found.text, "tokens": found.tokens, "truncated": found.truncated}
        | BENCHMARKS[name].score(item, found.text)
        for item, found in zip(items, completions, strict=True)
    ]


def rates(lines: Sequence[Mapping[str, Any]], score: str) -> dict[str, dict[str, Any]]:
    """For each group, and all: the count, the rate of a score, and its interval."""
    found = {}
    for group, members in _groups(lines).items():
        rate, low, high = mean_rate([line[score] for line in members])
        found[group] = {"count": len(members), "rate": rate, "low": low, "high": high}
    return found


@dataclasses.dataclass(frozen=True)
class Options:
    """Which items of a benchmark are asked, and how often."""

    folder: Location | None = None  # its files, or the virtual environment of its package
    limit: int | None = None  # items of each group
    categories: str | None = None  # of BFCL
    samples: int = 1  # dialogues with each task of tau2


def evaluate_benchmark(
    config: Config,
    name: str,
    options: Options,
    *,
    greedy: bool = True,
    output: Location | None = None,
) -> str:
    """The table of rates of a model, whose result file is written to `output`: by default into the folder of the run, or into the
    working directory for a model that is no run. Of many processes the first has the table and writes the file.
    UserError for an unknown benchmark, for a folder that is not its own, and for a model that cannot be used.
    """
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark {name}: unknown{nearest(name, list(BENCHMARKS))}")
    source, r = config.model.source, config.rollout
    if output is None:
        place = absolute(source)
        output = result_place(source, f"{name}.json") or f"{place.name}-{name}.json"
    sampling = Sampling(r.temperature, r.top_k, r.top_p, greedy)
    _check_options(name, options, sampling)
    check_output(output, [*model_files(source), *filter(None, [options.folder])])
    with contextlib.ExitStack() as stack:
        # Whatever can be wrong is found before hours of sampling: the data, and the folder of the file.
        measure = stack.enter_context(_PREPARE[name](config, name, options))
        partial = None
        if is_first_process():
            partial = stack.enter_context(atomic_write(output))
            partial.touch()
        policy = load_policy(config.model, config.mesh, r.tensor)
        about = {
            "model": source,
            "checkpoint_sha256": _model_digest(source, policy),
            "template_sha256": policy.tokenizer.digest(),
            "sampling": dataclasses.asdict(sampling)
            | {"max_response_tokens": r.max_response_tokens, "seed": config.seed},
            "device": platform(policy.mesh),
            "dtype": str(policy.config.dtype),
        }
        asked = {"benchmark": name, "template": config.data.template}
        result = about | measure(policy, sampling, _answers(output, about | asked))
        if partial is None:
            return ""
        partial.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    return f"{describe(result)}\n{output}"


def _check_options(name: str, options: Options, sampling: Sampling) -> None:
    """UserError for options that the benchmark has no use for."""
    if options.categories is not None and name not in bfcl.VERSIONS:
        raise UserError(f"--benchmark {name}: has no --categories")
    if options.samples > 1 and name != "tau2":
        raise UserError(f"--benchmark {name}: has no --samples; it answers every item once")
    if options.samples > 1 and sampling.greedy:
        raise UserError(
            f"--samples {options.samples}: greedy samples are all the same; sample them with --temperature"
        )
    if options.folder is None and name == "api_bank":
        raise UserError(f"evaluate --benchmark {name}: --data FOLDER is needed")
    if name != "api_bank" and sampling.top_k:
        raise UserError(f"--benchmark {name}: rollout.top_k {sampling.top_k}: leave it at 0")
    if name != "api_bank" and jax.process_count() > 1:
        raise UserError(f"--benchmark {name}: runs in one process, not in {jax.process_count()}")


# What measures a policy, given how it is sampled and where its answers may be kept until all are scored.
Measure = Callable[[Policy, Sampling, pathlib.Path], dict[str, Any]]


@contextlib.contextmanager
def _prompts(config: Config, name: str, options: Options) -> Iterator[Measure]:
    """How a benchmark of prompts measures a policy."""
    items = load(name, str(options.folder), options.limit)
    kept: list[_Kept] = []

    def measure(policy: Policy, sampling: Sampling, answers: pathlib.Path) -> dict[str, Any]:
        complete = Completer(config, policy, sampling)
        if jax.process_count() == 1:
            complete.kept = _Kept(answers / "completions.jsonl")
            kept.append(complete.kept)
        result = scored(name, items, complete)
        known = {"resumed": complete.resumed}
        return _speed(complete.seconds, complete.tokens) | known | result

    yield measure
    for one in kept:  # the result file has them
        one.remove()


# A tokenizer that makes no prompts is known before anything is asked.
_GREETING = StepRecord("", "", (), ({"role": "user", "content": "Hello"},), Target())


@contextlib.contextmanager
def _entries(config: Config, name: str, options: Options) -> Iterator[Measure]:
    """How BFCL measures a policy."""
    version = bfcl.VERSIONS[name]
    names = bfcl.chosen(version, options.categories)
    with bfcl.Bfcl(version, options.folder, names, options.limit) as source:

        def measure(policy: Policy, sampling: Sampling, answers: pathlib.Path) -> dict[str, Any]:
            template = config.data.template
            encoder = Encoder(policy.tokenizer, bfcl.template(template))
            encoder([_GREETING])
            source.begin(answers, template, _at_once(config, policy))
            seconds = _answer_all(source, encoder, policy, config, sampling)
            return _speed(seconds, source.tokens) | scored_dialogues(source)

        yield measure


@contextlib.contextmanager
def _tickets(config: Config, name: str, options: Options) -> Iterator[Measure]:
    """How tau2 measures a policy."""
    with tau2.Tau2(options.folder) as package:
        items = package.load(options.limit)

        def measure(policy: Policy, sampling: Sampling, _: pathlib.Path) -> dict[str, Any]:
            data = config.data
            encoder = Encoder(policy.tokenizer, TEMPLATES[data.template], data.brief_prompt)
            tasks = tau2.tasks(items, options.samples)
            at_once = _at_once(config, policy)
            progress = Progress(len(tasks), unit="dialogue", at_once=at_once)
            with contextlib.closing(progress):
                source = Dialogues(package.world, tasks, at_once, progress.update)
                seconds = _answer_all(source, encoder, policy, config, sampling)
            lines = tau2.lines(items, source.finished, options.samples)
            tokens = sum(line["tokens"] for line in lines)
            about = {"template": data.template, "samples": options.samples}
            return _speed(seconds, tokens) | about | scored_tasks(items, lines)

        yield measure


_PREPARE = {"api_bank": _prompts, **dict.fromkeys(bfcl.VERSIONS, _entries), "tau2": _tickets}


def _at_once(config: Config, policy: Policy) -> int:
    """Dialogues for all decode slots."""
    return config.rollout.decode_slots * num_data_shards(policy.rollout_mesh)


def _answer_all(
    source: Source, encoder: Encoder, policy: Policy, config: Config, sampling: Sampling
) -> float:
    """Answers every query of a source; the seconds that it took."""
    r = config.rollout
    # else dialogues would end the sooner, the fewer are decoded at once
    stream = make_stream(policy, r, longest=policy.config.max_positions)
    settings = Settings(
        max_tokens=r.max_response_tokens,
        max_length=min(policy.config.max_positions, stream.capacity),
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_p=sampling.top_p,
        seed=config.seed,
        keep_segments=False,
    )
    begun = time.monotonic()
    answer_all(source, stream, encoder, settings)
    return time.monotonic() - begun


def scored_tasks(items: Sequence[tau2.Item], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result of dialogues with tasks, whose lines `tau2.lines` gives."""
    scores = [key for key in lines[0] if key.startswith("pass^")]
    return {
        "benchmark": "tau2",
        "format": FORMAT,
        "version": __version__,
        "release": tau2.REQUIREMENT,
        "prompts_sha256": _digest([[item.id, list(item.messages)] for item in items]),
        "rates": {score: rates(lines, score) for score in scores},
        "items": lines,
    }


def scored_dialogues(source: bfcl.Bfcl) -> dict[str, Any]:
    """The result of a source whose entries are judged."""
    result = bfcl.result(source)
    rated = {score: rates(result["items"], score) for score in source.version.SCORES}
    return {"format": FORMAT, "version": __version__, "rates": rated} | result


def _speed(seconds: float, tokens: int) -> dict[str, float]:
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


def _answers(output: Location, about: Mapping[str, Any]) -> pathlib.Path:
    """Where the answers of this model, so sampled, are kept until all are scored."""
    place = as_path(output)
    beside = user_cache() if is_url(output) else pathlib.Path(place.parent)
    return beside / f"{place.stem}-answers" / _digest(about)[:16]


class _Kept:
    """Completions of an evaluation that is not done, in a file: the same command resumes behind them."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.found: dict[str, Completion] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # one half written
                known = json.loads(line)
                prompt = known.pop("prompt")
                self.found[prompt] = Completion(**known)
        if text and not text.endswith("\n"):
            self._append("")

    def add(self, prompt: str, found: Completion) -> None:
        """Under the digest of a prompt."""
        self._append(json.dumps({"prompt": prompt, **dataclasses.asdict(found)}))

    def _append(self, line: str) -> None:
        # Each time: the same command at another terminal removes the folder when it is done.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def remove(self) -> None:
        """The file, and its folders as far as they are empty."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()


class Completer:
    """Completions of a policy to messages, as they go through its chat template, each drawn once."""

    kept: _Kept | None = None

    def __init__(self, config: Config, policy: Policy, sampling: Sampling):
        self.config, self.policy, self.sampling = config, policy, sampling
        self.seconds = 0.0  # of sampling, compilation included
        self.tokens = self.resumed = 0  # drawn here; completions that were kept

    def __call__(self, prompts: Sequence[Messages]) -> list[Completion]:
        """Every process has all of them. UserError for prompts that the model cannot take."""
        ids = encode(self.policy.tokenizer, prompts)
        most = max(map(len, ids))
        limit = self.config.rollout.max_response_tokens
        check_positions(self.policy.config, most, limit, "--max-response-tokens")
        say(f"{len(ids)} prompts of at most {most:,} tokens")
        # a stream prefills what prompts begin with once; it runs on one process, and cuts off by top-p alone
        streams = jax.process_count() == 1 and not self.sampling.top_k
        begun = time.monotonic()
        # a completion is drawn by its place among the prompts, and by their ids
        keys = [_digest([row, prompt.tolist()]) for row, prompt in enumerate(ids)]
        known = self.kept.found if self.kept else {}
        before = {row: known[key] for row, key in enumerate(keys) if key in known}
        progress = Progress(len(ids), len(before), unit="completion")
        with contextlib.closing(progress):
            found = (
                self._by_stream(ids, keys, before, progress)
                if streams
                else self._by_sampler(ids, keys, before, progress)
            )
        self.seconds += time.monotonic() - begun
        self.resumed += len(before)
        self.tokens += sum(one.tokens for row, one in enumerate(found) if row not in before)
        return found

    def _by_stream(
        self,
        ids: Sequence[np.ndarray],
        keys: Sequence[str],
        before: Mapping[int, Completion],
        progress: Progress,
    ) -> list[Completion]:
        r, sampling, tokenizer = self.config.rollout, self.sampling, self.policy.tokenizer
        longest = max(map(len, ids)) + r.max_response_tokens
        stream = make_stream(self.policy, r, longest=longest)
        check_capacity(stream, longest, "evaluate", "--max-response-tokens")
        temperature = 0.0 if sampling.greedy else sampling.temperature
        found = dict(before)
        drawn: dict[int, list[Piece]] = {}
        rows: dict[int, int] = {}
        # those that begin alike follow one another
        for row in sorted(set(range(len(ids))) - found.keys(), key=lambda row: ids[row].tolist()):
            number = stream.submit(
                Request(
                    ids[row],
                    r.max_response_tokens,
                    temperature,
                    sampling.top_p,
                    seed=self.config.seed,
                    sample=row,
                )
            )
            rows[number], drawn[row] = row, []
        while stream.pending:
            for piece in stream.step():
                row = rows[piece.request]
                drawn[row].append(piece)
                if piece.finish is None:
                    continue
                tokens = np.concatenate([one.ids for one in drawn.pop(row)])
                found[row] = completion(tokens, piece.finish == "length", tokenizer)
                self._keep(keys[row], found[row])
                progress.update(len(found), f"{len(tokens)} tokens")
        return [found[row] for row in range(len(ids))]

    def _by_sampler(
        self,
        ids: Sequence[np.ndarray],
        keys: Sequence[str],
        before: Mapping[int, Completion],
        progress: Progress,
    ) -> list[Completion]:
        policy, found = self.policy, dict(before)
        left = [row for row in range(len(ids)) if row not in before]
        if left:
            sampler = make_sampler(policy, self.config.rollout, 1, self.sampling)
            # as wide as all prompts, which is how the completions before were drawn
            padded = pad([ids[row] for row in left], bucketed(ids), policy.tokenizer.pad_id)
            batch = PromptBatch(*padded, np.array(left, np.int32))
            params = rollout_cast(policy)(policy.params)

            def keep(index: int, rows: RolloutBatch) -> None:
                row = left[index]
                (found[row],) = completions(rows, policy.tokenizer)
                self._keep(keys[row], found[row])
                progress.update(len(found), f"{found[row].tokens} tokens")

            # Of several processes none knows of the others' completions.
            on_group = keep if jax.process_count() == 1 else None
            out = sampler.sample_all(params, batch, jax.random.key(self.config.seed), on_group)
            found |= dict(zip(left, completions(out, policy.tokenizer), strict=True))
        return [found[row] for row in range(len(ids))]

    def _keep(self, key: str, one: Completion) -> None:
        if self.kept is not None:
            self.kept.add(key, one)


def completion(ids: np.ndarray, cut: bool, tokenizer: Tokenizer) -> Completion:
    """What the tokens of a response say; the last one ends the turn, unless it was cut."""
    # A thought that the prompt has opened is part of what the model says.
    opened = "<think>" if tokenizer.thought_open else ""
    return Completion(opened + tokenizer.text(ids if cut else ids[:-1]), len(ids), cut)


def completions(rollout: RolloutBatch, tokenizer: Tokenizer) -> list[Completion]:
    """What a rollout of one response a prompt says."""
    cut = truncated(rollout, tokenizer.stop_ids)[:, 0]
    rows = zip(rollout.responses[:, 0], rollout.response_length[:, 0], cut, strict=True)
    return [completion(row[:length], bool(is_cut), tokenizer) for row, length, is_cut in rows]


def encode(tokenizer: Tokenizer, prompts: Sequence[Messages]) -> list[np.ndarray]:
    """int32 [T] each: the messages through the chat template, as they are. UserError where it is missing or refuses them."""
    # A record without a history is its messages, whatever the template.
    records = [
        StepRecord(str(i), "", (), (), Target(), tuple(dict(m) for m in messages))
        for i, messages in enumerate(prompts)
    ]
    (ids,) = Encoder(tokenizer, TEMPLATES["toolrl"])(records)
    return ids


def _model_digest(source: str, policy: Policy) -> str:
    """`checkpoint_digest`, or that of the folder that the model was read from. Every process calls it."""
    if is_run(source):
        folder, names = checkpoint.newest_params(source)[0].parent, [checkpoint.MANIFEST]
    else:
        folder, names = policy.files, sorted(list_files(policy.files))
    return files_digest(folder, names) if is_first_process() else ""


def read_result(path: Location) -> dict[str, Any]:
    """A result file. UserError for anything else."""
    try:
        with store_errors(path):
            result = json.loads(as_path(path).read_text())
        parts = {"id", "group", *result["rates"]}
        complete = all(parts <= line.keys() for line in result["items"])
        whole = complete and result["items"] and result["prompts_sha256"]
        if result["format"] != FORMAT or not whole:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: neither a result file of `rest-jax evaluate --benchmark`, format {FORMAT}, nor what `rest-jax evaluate "
            "--output` writes of records"
        ) from error
    return result


def describe(result: Mapping[str, Any]) -> str:
    """The tables of the rates, in percent, and lines on what is known of the items, the model and the speed."""
    scores, items = list(result["rates"]), result["items"]
    rows: list[list[Any]] = [[result["benchmark"], "items"]]
    for score in scores:
        rows[0] += [score, "95 % interval"]
    for group, first in result["rates"][scores[0]].items():
        rows.append([group, first["count"]])
        for score in scores:
            found = result["rates"][score][group]
            rows[-1] += [f"{found['rate']:.1%}", f"{found['low']:.1%} to {found['high']:.1%}"]
    drawn = round(result["seconds"] * result["tokens_per_second"])
    cut = sum(bool(x["truncated"]) for x in items)
    before = result.get("resumed", 0)
    return "\n".join(
        [
            summary_table(rows),
            *BENCHMARKS[result["benchmark"]].describe(result),
            *([f"{before} items were answered before"] if before else []),
            f"{drawn:,} tokens in {result['seconds']:.0f} s, {result['tokens_per_second']:.1f} tokens/s; "
            f"{cut} items with an answer cut at {result['sampling']['max_response_tokens']} tokens",
        ]
    )


def read_compared(path: Location) -> dict[str, Any]:
    """What a comparison needs of a result file, or of the scored completions of records that `rest-jax evaluate --output` wrote.
    Records are the same by their order, ids and gold answers; the path of a data set and the prompt differ between two machines
    and two chat templates. UserError for anything else.
    """
    try:
        with store_errors(path):
            lines = [json.loads(line) for line in as_path(path).read_text().splitlines()]
        items = [_record_item(i, line) for i, line in enumerate(lines)]
        if not items:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return read_result(path)
    sets = {spec: number for number, spec in enumerate(dict.fromkeys(x["data"] for x in lines))}
    asked = [(sets[line["data"]], line["id"], line["gold"]) for line in lines]
    return {
        "benchmark": "records",
        "prompts_sha256": _digest(asked),
        "items": items,
        "rates": {score: rates(items, score) for score in _OF_RECORDS},
    }


def _record_item(number: int, line: Mapping[str, Any]) -> dict[str, Any]:
    """Of a scored completion. KeyError or TypeError for a line that is none."""
    kind = "with a call" if line["gold"]["calls"] else "without a call"
    scores = {score: float(line[field]) for score, field in _OF_RECORDS.items()}
    return {"id": number, "group": f"{line['data']} {kind}", **scores}


def compare_results(first: Location, second: Location) -> str:
    """The table of differences, `second` less `first`, item by item. UserError for files that did not answer the same items."""
    a, b = read_compared(first), read_compared(second)
    ids, others = ({line["id"] for line in result["items"]} for result in (a, b))
    if a["prompts_sha256"] != b["prompts_sha256"] or ids != others:
        said = (f"{x['benchmark']} with {len(x['items'])} items" for x in (a, b))
        raise UserError(
            f"--compare {first} {second}: not the same items ({', '.join(said)}); "
            "evaluate both on the same data or --benchmark, with the same --limit"
        )
    # groups of records have the names of their data sets
    groups = {line["id"]: line["group"] for line in a["items"]}
    b["items"] = [line | {"group": groups[line["id"]]} for line in b["items"]]
    rows: list[list[Any]] = [list(_COLUMNS)]
    for score in (score for score in a["rates"] if score in b["rates"]):
        found = [rates(result["items"], score) for result in (a, b)]
        for group, members in _groups(a["items"]).items():
            before, after = ({x["id"]: float(x[score]) for x in r["items"]} for r in (a, b))
            both = (f"{by_group[group]['rate']:.1%}" for by_group in found)
            cells = _compared(before, after, [x["id"] for x in members])
            rows.append([f"{score}, {group}", len(members), *both, *cells])
    return (
        f"first: {first}\nsecond: {second}\n{summary_table(rows)}\n"
        "p: McNemar's exact test, of shares Student's t test; resolvable: the least difference that it finds in 80 % of samples "
        "of this size"
    )


def _compared(
    first: Mapping[str, float], second: Mapping[str, float], ids: Sequence[str]
) -> list[Any]:
    """The cells of one comparison, from the difference on."""
    gained = sum(second[i] > first[i] for i in ids)
    lost = sum(second[i] < first[i] for i in ids)
    differences = paired_differences({i: second[i] for i in ids}, first)
    found = estimate(differences)
    p = least = None
    if all(values[i] in (0, 1) for values in (first, second) for i in ids):
        p, least = mcnemar(gained, lost), resolvable_difference(len(ids), gained + lost)
    elif not math.isnan(found.p):
        # McNemar's test would take every share that differs for a whole item.
        p, least = found.p, least_difference(float(np.std(differences, ddof=1)), len(ids))
    return [
        f"{found.mean:+.1%}",
        "-" if len(ids) < 2 else f"{found.low:+.1%} to {found.high:+.1%}",
        gained,
        lost,
        p,
        # a t test of a few items would find none that rates can have
        "-" if least is None or least > 1 else f"{least:.1%}",
    ]


def _groups(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The items of each group, in order of appearance, and all."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["group"], []).append(line)
    return groups | {ALL: list(lines)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
