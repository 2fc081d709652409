"""The metrics of a run: the table of their names, the files they are written to, and reading those back.

One JSON line a step goes to `<run>/metrics.jsonl`, and to the trackers that are asked for; sampled completions go to
`<run>/samples.jsonl`, what the token viewer shows to `<run>/tokens.jsonl`, and what an audit compares to `<run>/digests.jsonl`
(`run.record`). A name that METRICS does not have is an error, but for those of a
plug-in's parts (`reward/part/NAME`, `eval/part/NAME`).
Prefixes: data, reward, rollout, update, router (of models with experts), region/<name>, curriculum, eval (held-out prompts,
greedy), time. Wall-clock values are under `time/` alone, so that all other values of a run that was broken off and resumed equal
those of an unbroken one bit for bit. All are of the global batch, and times are those of the slowest process.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rest_jax.config import Config, nearest
from rest_jax.errors import UserError, full_disk
from rest_jax.files import Location, as_path, download, is_url, store_errors, upload
from rest_jax.run.trackers import Trackers, lasting_name, wanted
from rest_jax.texts import printable
from rest_jax.tool_calls import Region

# of a run's folder; here, since what lists runs does not import jax
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TOKENS_FILE = "tokens.jsonl"
DIGESTS_FILE = "digests.jsonl"
STEPS_FILE = (
    ".steps"  # {"steps": of the run in all, "complete": whether they are done, evaluated and saved}
)
_MAX_STEP, _MAX_VALUE = 2**53, 1e150  # what curves and intervals can be made of
FILES = (METRICS_FILE, SAMPLES_FILE, TOKENS_FILE, DIGESTS_FILE)
# of `run.fork`, `run.record`, `run.folder` and `run.checkpoint`
_OF_OTHERS = ("fork.json", "audit.json", "model", "checkpoints")


class Metric(NamedTuple):
    """Unit ("" for a pure number) and meaning of a metric."""

    unit: str
    meaning: str


_OF_A_REGION = {
    "entropy": ("nats", "mean entropy of the policy on the tokens of the region"),
    "gini": ("", "mean 1 - sum_v p_v^2 on the tokens of the region"),
    "base": ("", "weight of the region in force, before normalisation"),
    "weight": ("", "mean weight of the tokens of the region, after normalisation"),
    "weight_share": ("fraction", "share of the region in the total weight"),
    "count": ("tokens", "tokens of the region in the batch"),
    "change_positive": (
        "nats",
        "mean change of log-prob by the step, tokens of positive advantage (train.measure_change)",
    ),
    "change_negative": ("nats", "the same, tokens of negative advantage"),
}

REGION_NAMES = tuple(region.name.lower() for region in Region if region is not Region.NONE)

# In the order of the lines.
_TABLE = {
    "data/epoch": ("epochs", "passes over the training records that were begun"),
    "data/dropped": ("records", "records dropped because they are longer than the limit"),
    "reward/mean": ("", "mean reward of the completions"),
    "reward/std": ("", "standard deviation of the rewards over the batch"),
    "reward/min": ("", "least reward of the batch"),
    "reward/max": ("", "greatest reward of the batch"),
    "reward/group_std": ("", "mean over groups of the standard deviation within the group"),
    "reward/equal_groups": ("fraction", "groups whose rewards are all equal: no advantage"),
    "reward/format_part": ("", "mean format part of the reward, scaled"),
    "reward/correctness_part": ("", "mean correctness part of the reward, scaled"),
    "reward/plugin_part": ("", "mean of what reward.plugin adds"),
    "reward/plugin_failures": ("completions", "those that reward.plugin has failed for"),
    "reward/format_score": ("fraction", "completions in the required format"),
    "reward/accuracy": ("", "mean match of the calls with the gold ones (S_acc), in [0, 1]"),
    "reward/exact": (
        "fraction",
        "completions in the format with exactly the gold calls (none where gold has none); texts are not compared",
    ),
    "reward/exact_sampled": ("fraction", "the same of all groups sampled in the step"),
    "reward/spurious": ("fraction", "completions with a call where none is right"),
    "reward/progress": ("", "progress mu of the dynamic reward scale, in [0, 1]"),
    "rollout/tokens": ("tokens", "tokens sampled in the step"),
    "rollout/groups_sampled": ("groups", "groups sampled in the step, with those replaced"),
    "rollout/prompt_tokens": ("tokens", "mean length of the prompts"),
    "rollout/response_tokens": ("tokens", "mean length of the completions"),
    "rollout/response_tokens_max": ("tokens", "greatest length of a completion"),
    "rollout/truncated": ("fraction", "completions that did not end within the limit"),
    "rollout/entropy": ("nats", "mean entropy of the policy on the sampled tokens"),
    "rollout/gini": ("", "mean 1 - sum_v p_v^2 on the sampled tokens"),
    "rollout/logp": ("nats", "mean log-probability of the sampled tokens"),
    "rollout/logp_mismatch": ("nats", "mean |log-prob of the sampler - of the trainer|"),
    "rollout/ratio_max": ("", "greatest ratio of the two probabilities, either way"),
    "rollout/marked": ("fraction", "tokens of the phrases that a rule looks for (method/hicra)"),
    "rollout/decode_slot_utilisation": (
        "fraction",
        "mean share of the decode slots that drew a token",
    ),
    "rollout/staleness": ("steps", "age of the weights that sampled, at the update"),
    "update/loss": ("", "loss, mean over the updates of the step"),
    "update/policy_loss": ("", "loss without the KL and entropy terms"),
    "update/balance_loss": ("", "load-balance loss of the experts; experts of a token: even"),
    "update/nll": ("nats", "supervised loss with all tokens alike"),
    "update/kl": ("nats", "estimated KL divergence from the reference policy"),
    "update/entropy": ("nats", "mean entropy during the update"),
    "update/logp_difference": ("nats", "mean |log-prob now - of the policy that sampled|"),
    "update/approx_kl": ("nats", "estimated KL divergence from the policy that sampled"),
    "update/ratio_mean": ("", "mean probability ratio to the policy that sampled"),
    "update/ratio_max": ("", "greatest probability ratio to the policy that sampled"),
    "update/clip_fraction": ("fraction", "tokens whose ratio was clipped, both sides"),
    "update/clip_low_fraction": ("fraction", "tokens clipped at 1 - clip_low"),
    "update/clip_high_fraction": ("fraction", "tokens clipped at 1 + clip_high"),
    "update/dual_clip_fraction": ("fraction", "tokens at the dual clip"),
    "update/phantom_gradient": (
        "fraction",
        "sum of |weight x advantage| in groups without any exact completion",
    ),
    "update/effective_tokens": (
        "fraction",
        "effective sample size of weight x advantage, (sum |c|)^2 / sum c^2, over the tokens",
    ),
    "update/tis_weight_mean": ("", "mean truncated importance weight (rollout.tis_cap)"),
    "update/tokens": ("tokens", "tokens that carried loss"),
    "update/accuracy": ("fraction", "supervised tokens that are the most probable ones"),
    "update/grad_norm": ("", "global norm of the gradient, before clipping"),
    "update/grad_variance": ("", "trace of the gradient's covariance (train.measure_noise)"),
    "update/grad_noise": ("", "the same over its squared norm; 1: nothing but noise"),
    "update/update_norm": ("", "global norm of the change of the parameters"),
    "update/param_norm": ("", "global norm of the parameters"),
    "update/not_finite": ("fraction", "updates skipped because loss or gradient was not finite"),
    "update/learning_rate": ("", "learning rate, mean over the updates of the step"),
    "update/skipped_groups": ("fraction", "groups without advantage: no forward pass"),
    "update/micro_batches": ("micro-batches", "micro-batches of the step"),
    "update/padding": ("fraction", "positions of the micro-batches that were padding"),
    "router/load_max": ("", "greatest load of an expert over the mean load, mean over layers"),
    "router/unused_experts": ("fraction", "experts of a layer that got no token"),
    "router/entropy": ("nats", "mean entropy of the routers' probabilities"),
    "router/agreement": (
        "fraction",
        "experts of the routers' own choice that were taken (1 unless replayed)",
    ),
    **{
        f"region/{name}/{kind}": metric
        for name in REGION_NAMES
        for kind, metric in _OF_A_REGION.items()
    },
    "curriculum/nu": ("", "progress of the curriculum, in [0, 1]"),
    "curriculum/format_score": ("", "moving average of the format score"),
    "eval/reward": ("", "mean reward on held-out prompts, greedy, at the final scale"),
    "eval/format": ("fraction", "held-out completions in the required format"),
    "eval/exact": (
        "fraction",
        "held-out completions in the format with exactly the gold calls (none where gold has none); texts are not compared",
    ),
    "eval/spurious": ("fraction", "held-out prompts without gold calls that got one"),
    "eval/accuracy": ("", "mean match of their calls with the gold ones (S_acc), in [0, 1]"),
    "eval/response_tokens": ("tokens", "mean length of the held-out completions"),
    "eval/truncated": ("fraction", "held-out completions that did not end within the limit"),
    "eval/prompts": ("prompts", "held-out prompts"),
    "eval/prompts_without_calls": ("prompts", "those whose gold answer has no call"),
    "eval/reward_std": ("", "standard deviation of the reward over the held-out prompts"),
    "eval/accuracy_std": ("", "standard deviation of S_acc over the held-out prompts"),
    "eval/plugin_part": ("", "mean of what reward.plugin adds on held-out prompts"),
    "eval/plugin_failures": ("completions", "held-out ones that reward.plugin has failed for"),
    "eval/api_bank/soft": ("fraction", "API-Bank, greedy, by the published rule"),
    "eval/api_bank/strict": ("fraction", "API-Bank, greedy: one call, in its block, and right"),
    "eval/api_bank/items": ("items", "items of API-Bank"),
    "time/step": ("s", "wall-clock time of the step, evaluation and saving apart"),
    "time/cpu": ("s", "CPU time of all processes in the step, all threads"),
    "time/data": ("s", "waiting for the loader"),
    "time/rollout": ("s", "sampling"),
    "time/score": ("s", "parsing, rewards and regions; beside the sampling"),
    "time/score_wait": ("s", "waiting for them after the sampling"),
    "time/update": ("s", "the optimiser updates"),
    "time/eval": ("s", "held-out evaluation"),
    "time/checkpoint": ("s", "handing over the checkpoint before this step"),
    "time/tokens_per_second": ("tokens/s", "sampled (supervised: target) tokens a second"),
    "time/processed_tokens_per_second": (
        "tokens/s",
        "supervised: prompt and target tokens a second",
    ),
    "time/rollout_tokens_per_second": ("tokens/s", "sampled tokens a second of the rollout"),
    "time/reward_responses_per_second": ("completions/s", "completions scored a second of scoring"),
    "time/reward_tokens_per_second": ("tokens/s", "completion tokens scored a second of scoring"),
    "time/update_tokens_per_second": (
        "tokens/s",
        "G x prompt + completion tokens a second of the update",
    ),
    "time/rollout_mfu": ("fraction", "FLOP/s of the model over the published peak, in the rollout"),
    "time/update_mfu": ("fraction", "the same in the update"),
    "time/host_memory": ("GiB", "most memory of a process so far"),
    "time/device_memory": ("GiB", "most memory of a device so far, where it says"),
    "time/elapsed": ("s", "since this process began to train"),
}

METRICS = {name: Metric(unit, meaning) for name, (unit, meaning) in _TABLE.items()}
# whether a metric is of a part of what a plug-in adds
is_part = re.compile(r"(?:reward|eval)/part/[A-Za-z0-9_.-]+").fullmatch


def run_files(folder: Location) -> list[epath.Path]:
    """What a run, or an audit, writes into its folder and reads again, files and folders: no other output may take its place."""
    return [as_path(folder) / name for name in (CONFIG_FILE, *FILES, *_OF_OTHERS)]


def metric(name: str) -> Metric:
    """What a name stands for. ValueError for one that runs do not write."""
    if is_part(name):
        return Metric("", "mean of this part of what reward.plugin adds")
    if name not in METRICS:
        known = nearest(name, list(METRICS))
        raise ValueError(f"metric {name!r} is not in run.metrics.METRICS{known}; add it there")
    return METRICS[name]


def shown_value(name: str, value: float | None) -> str:
    """A value of that metric for people: fractions in per cent, others with four digits, None as "-"."""
    if value is None:
        return "-"
    return f"{value:.1%}" if metric(name).unit == "fraction" else f"{value:.4g}"


def in_order(names: Iterable[str]) -> list[str]:
    """The names in the order of METRICS, parts of a plug-in last; others are left out."""
    given = set(names)
    return [name for name in METRICS if name in given] + sorted(filter(is_part, given))


class MetricsWriter:
    """Appends to the files of one run. A resource: one process writes it, `close` at the end.

    A store cannot append: the files of a run in one are written to a temporary folder here and put whole at every `sync`, so
    that a reader sees the lines up to the newest checkpoint. With a config the trackers that it asks for get the lines, too.
    """

    def __init__(self, run_dir: Location, config: Config | None = None):
        self._url = as_path(run_dir) if is_url(run_dir) else None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._stored: dict[str, tuple[int, int]] = {}
        if self._url is not None:
            self._temporary = tempfile.TemporaryDirectory(prefix="rest-jax-")
            run_dir = self._temporary.name
            with store_errors(self._url):
                for file in FILES:
                    if (self._url / file).exists():
                        download(self._url / file, pathlib.Path(run_dir, file))
        self._folder = run_dir = pathlib.Path(run_dir)
        with full_disk(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._trackers = None
            if config is not None and wanted(config):
                metrics = run_dir / METRICS_FILE
                begun = metrics.exists() and metrics.stat().st_size > 0
                name = lasting_name(config, self._url or run_dir, begun)
                self._trackers = Trackers(config, run_dir, name)
            self._files = {name: (run_dir / name).open("a", encoding="utf-8") for name in FILES}

    def write(
        self,
        step: int,
        values: Mapping[str, Any],
        samples: Iterable[Mapping[str, Any]] = (),
        tokens: Mapping[str, Any] | None = None,
        digests: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends {"step": step, ...} as one line, keys in the order of METRICS, one line a sample (any JSON values), the line of
        the token viewer, and that of the digests.

        Values are numbers (Python, NumPy or JAX scalars), floats written with all their digits. NaN and infinities
        are written as null: JSON has no word for them. ValueError for a name that METRICS does not have.
        """
        for name in values.keys() - METRICS.keys():
            metric(name)
        line = {name: _number(values[name]) for name in in_order(values)}
        self._append(METRICS_FILE, {"step": int(step), **line})
        for sample in samples:
            self._append(SAMPLES_FILE, {"step": int(step), **sample})
        if tokens is not None:
            self._append(TOKENS_FILE, {"step": int(step), **tokens})
        if digests is not None:
            self._append(DIGESTS_FILE, {"step": int(step), **digests})
        if self._trackers is not None:
            self._trackers.write(int(step), line)

    def write_launch(self, step: int, launch: Mapping[str, Any]) -> None:
        """Appends to the digests how a process continues behind a step."""
        self._append(DIGESTS_FILE, {"step": int(step), "launch": launch})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        # A model's output may hold lone surrogates: as \u escapes they are ASCII and always writable.
        with full_disk(self._folder / name):
            self._files[name].write(json.dumps(record, allow_nan=False) + "\n")
            self._files[name].flush()

    def truncate_after(self, step: int, evaluated: bool = True) -> None:
        """Cuts all files before the first line of a later step (or of the evaluation of this one, unless `evaluated`), and
        before what nobody can read in front of it or at the end, as a lost machine leaves it: a resumed run writes them again.
        """
        for file in self._files.values():
            kept = end = 0
            # What follows the last line end is a half-written line.
            for line in pathlib.Path(file.name).read_bytes().split(b"\n")[:-1]:
                end += len(line) + 1
                record = _parse(line)
                if record is None:
                    continue
                if record["step"] > step or (
                    record["step"] == step and not evaluated and _is_evaluation(record)
                ):
                    break
                kept = end
            file.truncate(kept)

    def sync(self) -> None:
        """Forces the lines written so far to the disk or the store; call it before a checkpoint of the same step."""
        with full_disk(self._folder / METRICS_FILE):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        if self._url is not None:
            if self._trackers is not None:
                self._trackers.flush()
            with store_errors(self._url):
                self._put(self._url)

    def _put(self, url: epath.Path) -> None:
        """Puts the files that have changed since they were put."""
        for file in sorted(self._folder.rglob("*")):
            name, found = file.relative_to(self._folder).as_posix(), file.stat()
            state = (found.st_size, found.st_mtime_ns)
            if file.is_file() and self._stored.get(name) != state:
                upload(file, url / name)
                self._stored[name] = state

    def close(self) -> None:
        """Syncs and closes the files, and closes what was opened on request."""
        with full_disk(self._folder), contextlib.ExitStack() as stack:
            if self._temporary is not None:
                stack.callback(self._temporary.cleanup)
            if self._trackers is not None:
                stack.callback(self._trackers.close)
            for file in self._files.values():
                stack.callback(file.close)
            self.sync()


def read_lines(path: Location, missing_ok: bool = False) -> list[dict[str, Any]]:
    """The lines of a JSONL file written by `MetricsWriter`; a half-written last line is left out.

    UserError when another line is not a JSON object, when a metric is no finite number (a run writes null for those), or when
    the file is missing; with `missing_ok` that is no line.
    """
    path = as_path(path)
    with store_errors(path):
        if not path.is_file():
            if missing_ok:
                return []
            raise UserError(f"{path}: no such file; is {path.parent} the folder of a run?")
        lines = path.read_bytes().split(b"\n")
    return parse_lines(path, lines[:-1])


def last_step(path: Location) -> int:
    """The step of the last line of such a file that can be read, whatever the others are; -1 where none can."""
    lines = map(_parse, reversed(as_path(path).read_bytes().split(b"\n")[:-1]))
    return next((line["step"] for line in lines if line is not None), -1)


def parse_lines(path: Location, lines: Iterable[bytes], first: int = 1) -> list[dict[str, Any]]:
    """Lines of such a file, the first of which has that number. UserError as for `read_lines`."""
    found = []
    for number, line in enumerate(lines, start=first):
        record = _parse(line)
        if record is None:
            raise UserError(f"{path}, line {number}: not a JSON object with a step")
        if as_path(path).name == METRICS_FILE:
            for name, value in record.items():
                if not (value is None or _is_value(value)):
                    said = f"{name} is {json.dumps(value)[:80]}, and not a finite number or null"
                    raise UserError(f"{path}, line {number}: {said}, as a run writes them")
        found.append(record)
    return found


def summary_table(rows: Sequence[Sequence[Any]]) -> str:
    """Text table; the first row is the header. Numbers are right-aligned with 4 digits, what is not known (None, NaN) is "-"."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [all(isinstance(v, str) for v in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a line of the metrics or the samples is of a held-out evaluation."""
    return record.get("split") == "eval" or any(map(is_eval, record))


def is_eval(metric: str) -> bool:
    """Whether a metric is one of evaluations."""
    return metric.startswith("eval/")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and abs(step) < _MAX_STEP else None


def _is_value(value: Any) -> bool:
    """Whether it is a number whose square is finite; a run measures no greater ones."""
    return isinstance(value, int | float) and abs(value) < _MAX_VALUE


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return (
        f"{value:.4g}" if isinstance(value, float) else " ".join(printable(str(value)).split("\n"))
    )
