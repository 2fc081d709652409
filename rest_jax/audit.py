"""Whether the steps of a run are what they say: `rest-jax audit` repeats some of them and compares, bit for bit.

    audit(run, steps, ...)    prints a certificate and writes it as <run>/audit.json, or where it is told to

A step is repeated by the loop that made it (`train_steps` of `train` and of `sft`), from the nearest checkpoint before it:
what it writes into a temporary folder must be what the run has recorded (`run.record`), times apart. Which steps, the digest of
the run's metrics decides, with a seed that the auditor may choose. On other devices, or under other versions, numbers are
compared by tolerance.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
import tempfile
import types
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rest_jax import config as config_lib
from rest_jax import plugins, sft, train
from rest_jax.config import Config
from rest_jax.data.cache import load_demonstrations, load_prompts
from rest_jax.data.tokenize import Prepared
from rest_jax.distributed import activate, any_process, is_first_process, say
from rest_jax.errors import UserError
from rest_jax.evaluation.heldout import Evaluator, held_out
from rest_jax.files import (
    Location,
    absolute,
    as_path,
    atomic_write,
    check_output,
    file_digest,
    store_errors,
)
from rest_jax.models.hf.remote import checkpoint_path, is_complete
from rest_jax.models.policy import Policy
from rest_jax.rollout.tokens import read_record
from rest_jax.run import checkpoint
from rest_jax.run.contents import (
    MADE_OF,
    STARTS,
    changed,
    check_same,
    digests,
    kept_contents,
    of_sums,
)
from rest_jax.run.folder import EVALUATION, Run, may_change
from rest_jax.run.fork import Start, is_there
from rest_jax.run.load import load_trained
from rest_jax.run.lock import check_free
from rest_jax.run.loop import Loop, total_steps
from rest_jax.run.metrics import (
    CONFIG_FILE,
    DIGESTS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    TOKENS_FILE,
    MetricsWriter,
    run_files,
    summary_table,
)
from rest_jax.run.progress import Progress
from rest_jax.run.record import (
    CERTIFICATE_FILE,
    Lines,
    Recorded,
    certificate_rows,
    differences,
    launch,
    launch_digest,
    line_faults,
    read_files,
    read_recorded,
)
from rest_jax.run.stop import StopRequest
from rest_jax.types import Params, TrainState

# What launches may differ in whose steps are repeated together.
_NEUTRAL = (
    "name",
    "output",
    "distributed.",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.wandb_project",
)
# What an audit may be told: where things lie now and, at the price of equal bits, how a step is computed.
_PLACES = (
    "model.source",
    "model.tokenizer",
    "data.train",
    "data.eval",
    "evaluation.data",
    "lora.adapter",
)
_SIZES = (
    "mesh.",
    "model.remat",
    "rollout.tensor",
    "rollout.decode_slots",
    "rollout.prompt_cache_entries",
    "rollout.cache_tokens",
    "optimizer.moments",
    "lora.base_dtype",
    "train.max_tokens_per_microbatch",
)
# Relative and absolute, of numbers that other devices or versions have computed.
TOLERANCE = 1e-2, 2e-3
EQUAL, CLOSE, SAMPLED, OTHER = "equal", "within tolerance", "sampled otherwise", "differs"
_MOST_NAMED = 20  # differences of a step in the certificate


class Base(NamedTuple):
    """Where a step is repeated from."""

    launch: int  # the number of the launch whose config, versions and devices made it
    step: int | None  # of a checkpoint; None: the start of the run


def audit(
    run: Location,
    steps: int = 3,
    seed: int = 0,
    at: Sequence[int] = (),
    overrides: Sequence[str] = (),
    run_plugins: bool = False,
    output: Location | None = None,
) -> int:
    """Repeats `steps` steps of a run, or those of `at`, prints the certificate and writes it, by default into the run's folder. 0
    when nothing differs, else 1. UserError for a run, or a step, that cannot be repeated, for one with plug-ins unless they may
    run, and for a certificate that cannot be written.
    """
    folder = absolute(run)
    if is_first_process():
        check_free(folder)
    recorded = read_recorded(folder)
    place = folder / CERTIFICATE_FILE if output is None else as_path(output)
    with contextlib.ExitStack() as stack:
        partial = None
        if is_first_process():
            partial = stack.enter_context(certificate_file(folder, place))
        certificate = examine(recorded, steps, seed, at, Repeaters(overrides, run_plugins))
        say(describe(certificate))
        if partial is not None:
            partial.write_text(json.dumps(certificate, indent=1) + "\n")
    say(f"certificate: {place}")
    return int(any_process(certificate["result"] != "passed"))


@contextlib.contextmanager
def certificate_file(folder: epath.Path, place: epath.Path) -> Iterator[pathlib.Path]:
    """A path to write the certificate to, as of `atomic_write`. UserError, before the steps are repeated, when it cannot be."""
    check_output(place, [path for path in run_files(folder) if path != folder / CERTIFICATE_FILE])
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(atomic_write(place))
            partial.touch()
        except OSError as error:
            raise UserError(
                f"{place}: cannot be written ({error.strerror}); --output FILE writes the certificate elsewhere"
            ) from error
        yield partial


class Repeaters:
    """What repeats steps, one for each kind of launch, kept with its compiled functions."""

    def __init__(self, overrides: Sequence[str] = (), run_plugins: bool = True):
        self.overrides, self.run_plugins = overrides, run_plugins
        self.made: dict[str, Repeater] = {}

    def of(self, recorded: Mapping[str, Any]) -> "Repeater":
        """That of a launch; the rest as for `Repeater`."""
        key = launch_digest(recorded)
        if key not in self.made:
            self.made[key] = Repeater(recorded, self.overrides, self.run_plugins)
        return self.made[key]


def examine(
    recorded: Recorded, count: int, seed: int, at: Sequence[int], repeaters: Repeaters
) -> dict[str, Any]:
    """The certificate of an audit; the rest as for `audit`. In processes other than the first it has no steps."""
    folder, launches = recorded.folder, [one for _, one in recorded.launches]
    written = config_lib.load([folder / CONFIG_FILE]).model_dump(mode="json")
    findings = differences(launches[-1]["config"], written, path=CONFIG_FILE)
    findings += line_faults(recorded) + launch_faults(recorded)
    begins = has_start(recorded, repeaters)
    kept = checkpoint.list_steps(folder / checkpoint.FOLDER)
    while True:
        possible = bases(recorded, kept, begins)
        chosen = choose(recorded, list(possible), count, seed, at)
        damaged = [
            c for c in kept if c in {possible[s].step for s in chosen} and not _sound(recorded, c)
        ]
        if not damaged:
            break
        kept = [c for c in kept if c not in damaged]
    segments: dict[Base, list[int]] = {}
    for step in chosen:
        segments.setdefault(possible[step], []).append(step)
    found = []
    # The start first: it takes the starting weights.
    for base in sorted(segments, key=lambda b: (b.launch, b.step is not None, b.step)):
        repeater = repeaters.of(launches[base.launch])
        found += repeater.repeat(recorded, base.step, segments[base])
    passed = not findings and all(one["result"] in (EQUAL, CLOSE) for one in found)
    here = repeaters.of(launches[possible[chosen[-1]].launch])
    return {
        "run": folder.name,
        "result": "passed" if passed else "failed",
        "comparison": f"by tolerance, since other: {here.others}" if here.others else "bit for bit",
        "seed": seed,
        "steps": found,
        "findings": findings,
        "recorded": len(recorded.steps),
        "repeatable": len(possible),
        "metrics": file_digest(folder / METRICS_FILE),
        # All launches have the same, but for adapters that a run which resumed had no use for.
        MADE_OF: launches[0][MADE_OF],
        "recorded_by": computed_by(recorded.launch_of(recorded.last)),
        "repeated_by": computed_by(here.here),
    }


def has_start(recorded: Recorded, repeaters: Repeaters) -> bool:
    """Whether what the run began with is still there: the starting weights, or the checkpoint that a fork came from. False where
    that cannot be asked, as of a store without credentials: the other steps can be repeated all the same.
    """
    if recorded.origin is not None:
        try:
            return is_there(recorded.origin)
        except (UserError, OSError) as error:
            say(f"warning: {recorded.origin} cannot be read and is not used: {error}")
            return False
    return repeaters.of(recorded.launches[0][1]).has_start


def launch_faults(recorded: Recorded) -> list[str]:
    """Where a launch differs from the one before it in what `folder.check_config` or `contents.check_same` would refuse."""
    found = []
    for (_, before), (step, one) in itertools.pairwise(recorded.launches):
        supervised = one["command"] == "sft"
        configs = (config_lib.from_overrides(own["config"]) for own in (before, one))
        keys = (*may_change(*configs), *(config_lib.OF_EVALUATIONS if supervised else ()))
        free = tuple(f"config.{key}" for key in keys)
        found += [
            f"launch behind step {step}: {x.path}: {x.old!r} before, {x.new!r} then"
            for x in config_lib.differences(_bound(before), _bound(one))
            if not x.path.startswith(free)
        ]
    return found


def _bound(launch: Mapping[str, Any]) -> dict[str, Any]:
    """What the launches of a run have in common."""
    # with the defaults of keys that were added
    config = config_lib.from_overrides(launch["config"])
    return {
        "command": launch["command"],
        "config": config.model_dump(mode="json"),
        MADE_OF: kept_contents(launch),
    }


def bases(recorded: Recorded, kept: Sequence[int], begins: bool) -> dict[int, Base]:
    """Where each step that can be repeated is repeated from: the nearest of the checkpoints `kept`, or the start if `begins`.

    No change of what steps are made with may lie between. Under staleness a checkpoint has the batch of the step behind it, which
    would not be sampled again: that step begins with an earlier one.
    """
    firsts = [0]
    for number in range(1, len(recorded.launches)):
        (_, before), (_, one) = recorded.launches[firsts[-1]], recorded.launches[number]
        if not _alike(before, one):
            firsts.append(number)
    found: dict[int, Base] = {}
    begun = [recorded.launches[first][0] for first in firsts]
    for first, begin, end in zip(firsts, begun, [*begun[1:], recorded.last], strict=True):
        ahead = recorded.launches[first][1]["config"]["rollout"]["staleness"]
        for step in (step for step in recorded.steps if begin < step <= end):
            near = [c for c in kept if begin <= c < step - (ahead if c > recorded.begin else 0)]
            if near:
                found[step] = Base(first, max(near))
            elif first == 0 and begins:
                found[step] = Base(0, None)
    return found


def choose(
    recorded: Recorded, possible: Sequence[int], count: int, seed: int, at: Sequence[int]
) -> list[int]:
    """The steps to repeat: `at`, or `count` that follow from the digest of the metrics and the seed."""
    where = (
        "those behind a sound checkpoint can be, and the first ones from unchanged starting weights"
    )
    for step in at:
        if step not in possible:
            span = f"of steps {recorded.begin + 1} to {recorded.last}"
            raise UserError(f"{recorded.folder}: step {step} cannot be repeated: {span} {where}")
    if not possible:
        raise UserError(f"{recorded.folder}: no step can be repeated: {where}")
    text = f"{file_digest(recorded.folder / METRICS_FILE)} {seed}"
    rng = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
    drawn = rng.choice(possible, min(count, len(possible)), replace=False).tolist()
    return sorted(set(at) or drawn)


class Repeater:
    """What repeats the steps of a launch: its policy, data and compiled functions."""

    def __init__(
        self, recorded: Mapping[str, Any], overrides: Sequence[str] = (), run_plugins: bool = True
    ):
        """UserError when the run was made of other contents than are here now, or an override is not of a place or a size."""
        there = config_lib.from_overrides(recorded["config"])
        plugins.check_asked(there, run_plugins, "audit")
        self.config = config = override(there, overrides, "audit")
        given = [one.path for one in config_lib.differences(there, config)]
        self.command: str = recorded["command"]
        self.module: types.ModuleType = {"train": train, "sft": sft}[self.command]
        self.policy, data = load(config, self.command)
        made_of = digests(self.policy, data, plugins.digests(config))
        contents = dict(recorded[MADE_OF])
        starts = {name: contents.pop(name) for name in STARTS if name in contents}
        self.has_start = not changed(starts, made_of)
        check_same(contents, made_of, f"{config.model.source}, {config.data.train}")
        adapted = there.refers_to_adapters or config.refers_to_adapters
        refers = config.loss.kl_coefficient > 0 and (self.policy.frozen is None or adapted)
        if refers and not self.has_start:
            start = f"model.source {config.model.source}: not the weights"
            if adapted:
                start = f"lora.adapter {config.lora.adapter}: not the adapters"
            raise UserError(
                f"{start} that the run began with, to which its KL term refers; name the folder that has them"
            )
        self.here = launch(config, self.policy.mesh, made_of, self.command)
        others = differences(computed_by(recorded), computed_by(self.here))
        # why equal bits cannot be expected; "" if they can
        self.others = "; ".join([*others, *(path for path in given if path.startswith(_SIZES))])
        self.total = total_steps(config, data.size, self.module.BATCH)
        examples = held_out(config, self.policy, keep=False)
        with activate(self.policy.mesh):
            self.evaluate = Evaluator(config, self.policy, examples) if examples else None
            self.trainer = self.module.make_trainer(config, self.policy, data)

    def repeat(
        self, recorded: Recorded, base: int | None, wanted: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What came of each wanted step, in the first process."""
        with tempfile.TemporaryDirectory(prefix="rest-jax-audit-") as folder:
            scratch = as_path(folder)
            with contextlib.ExitStack() as stack:
                writer = MetricsWriter(scratch) if is_first_process() else None
                if writer is not None:
                    stack.callback(writer.close)
                stack.enter_context(activate(self.policy.mesh))
                loop = Replay(self, recorded, base, wanted, writer)
                self.module.train_steps(self.trainer, loop)
            repeated = read_files(scratch)
        begin = recorded.begin if base is None else base
        found = []
        for step in wanted if is_first_process() else ():
            result, others = compare(recorded, repeated, step, not self.others)
            # Other completions make other parameters.
            saved = loop.saved.get(step, []) if result != SAMPLED else []
            others = [*loop.faults, *others, *saved]
            covered = step in loop.saved and result != SAMPLED and not others
            found.append(
                {
                    "step": step,
                    "result": OTHER if others else result,
                    "from": "the start" if base is None else f"checkpoint {base}",
                    "replayed": step - begin,
                    "checkpoint": checkpoint.manifest_digest(_checkpoint(recorded, step))
                    if covered
                    else None,
                    "differences": others[:_MOST_NAMED],
                }
            )
        return found


def override(config: Config, words: Sequence[str], command: str) -> Config:
    """The config of a run with `key=value` words on top. UserError for a key that decides what the run is."""
    told = config_lib.from_overrides(config.model_dump(mode="json"), words)
    given = [one.path for one in config_lib.differences(config, told)]
    if refused := [path for path in given if not path.startswith((*_PLACES, *_SIZES))]:
        may = ", ".join((*_PLACES, *_SIZES))
        raise UserError(
            f"{command}: {', '.join(refused)}: decides what the run is; only {may} may be given"
        )
    return told


def load(config: Config, command: str) -> tuple[Policy, Prepared]:
    """The policy and the records of a run of a command."""
    policy, data = load_trained(config), config.data
    if command == "sft":
        return policy, load_demonstrations(config, policy.tokenizer, keep=False)
    return policy, load_prompts(config, data.train, data.train_limit, policy.tokenizer, keep=False)


class Replay(Loop):
    """The loop over recorded steps, from a checkpoint or the start of the run to the last that is wanted. It writes into a
    temporary folder, evaluates only what is wanted, and saves nothing.
    """

    def __init__(
        self,
        repeater: Repeater,
        recorded: Recorded,
        base: int | None,
        wanted: Sequence[int],
        writer: MetricsWriter | None,
    ):
        config, folder = repeater.config, recorded.folder
        stop = StopRequest(config.distributed)
        files, resources = repeater.policy.files, contextlib.ExitStack()
        run = Run(config, folder, files, None, stop, lambda: None, resources, metrics=writer)
        run.marked = True  # no checkpoint will be there
        super().__init__(run, repeater.total, repeater.evaluate, repeater.module.SHOWN)
        self.recorded, self.base, self.wanted, self.last = recorded, base, wanted, max(wanted)
        self.sums, self.exact = repeater.trainer.sums, not repeater.others
        self.faults: list[str] = []  # of the checkpoint that it begins with
        # those of the checkpoints that are kept of wanted steps
        self.saved: dict[int, list[str]] = {}

    def resume(
        self, fresh: Any, abstract: TrainState, params: Params, start: Start
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the loader's state to begin with."""
        origin = self.recorded.origin
        if self.base is None and origin is None:
            state, loader_state = fresh(), self.run.first_loader_state(start.loader_state)
        else:
            jax.tree.map(lambda x: x.delete(), params)
            if self.base is None:
                assert origin is not None
                state, loader_state = self.run.begin_fork(origin, abstract, start)
            else:
                path = _checkpoint(self.recorded, self.base)
                state, loader_state = checkpoint.read(path, abstract)
                made_of = loader_state.pop(MADE_OF, {})
                self.faults += contents_faults(self.recorded, self.base, made_of)
                self._compare_params(state.params)
        self.state, self.start = state, self.recorded.begin if self.base is None else self.base
        self.done = self.start
        self.evaluation_due = loader_state.pop(EVALUATION, False)
        self.progress = Progress(self.last, self.start)
        return state, loader_state

    def end_step(self, step: int, *rest: Any) -> None:
        super().end_step(step, *rest)
        if step in self.wanted and _is_kept(self.recorded, step):
            params = self.state.params
            self.saved[step] = compare_checkpoint(self.recorded, step, params, self.exact)

    def _compare_params(self, params: Params) -> None:
        """The parameters of a checkpoint must be those behind its step, where that is recorded."""
        found = of_sums(jax.device_get(self.sums({"params": params}))["params"])
        for line in self.recorded.lines[DIGESTS_FILE].get(self.base or 0, []):
            self.faults += differences(
                line["params"], found, path=f"checkpoint {self.base}: params"
            )

    def _evaluate(self, step: int) -> None:
        # That before the first step belongs to it.
        if step in self.wanted or (step == self.recorded.begin and step + 1 in self.wanted):
            super()._evaluate(step)

    def _save(self, step: int) -> None:
        self._flush()

    def _check_finite(self, *_: Any) -> None:
        """What a run does about updates that are not finite is no part of them."""


def compare(recorded: Recorded, repeated: Lines, step: int, exact: bool) -> tuple[str, list[str]]:
    """What came of a step, and its differences to what is recorded of it."""
    there, here = (lines[DIGESTS_FILE].get(step, []) for lines in (recorded.lines, repeated))
    there = [dict(line) for line in there]
    made_by = [line.pop("of", None) for line in there]
    found = differences([launch_digest(recorded.launch_of(step))], made_by, path="launch")
    for line in here:
        line.pop("of", None)
    same = [line.get("ids") for line in there] == [line.get("ids") for line in here]
    if not exact:  # of the digests, only those of the data are the same on every device
        there, here = ([{"prompts": line.get("prompts")} for line in x] for x in (there, here))
    found += differences(there, here, path=DIGESTS_FILE)
    # The evaluation before the first step belongs to it.
    steps = [recorded.begin, step] if step == recorded.begin + 1 else [step]
    for name in (METRICS_FILE, SAMPLES_FILE, TOKENS_FILE) if exact or same else ():
        for number in steps:
            there, here = (lines[name].get(number, []) for lines in (recorded.lines, repeated))
            if name == TOKENS_FILE:
                there, here = read_tokens(there), read_tokens(here)
            found += differences(there, here, None if exact else TOLERANCE, name)
    return EQUAL if exact else CLOSE if same else SAMPLED, found


def compare_checkpoint(recorded: Recorded, step: int, params: Params, exact: bool) -> list[str]:
    """What is wrong with the checkpoint of a step behind which the parameters are these: it is what `export` writes. Every
    process calls it.
    """
    path = _checkpoint(recorded, step)
    try:
        checkpoint.verify(path, thorough=True)
    except checkpoint.DamagedError as error:
        return [f"checkpoint {step}: damaged: {error}"]
    try:
        unequal, distance = checkpoint.params_distance(path, params)
    except UserError as error:
        return [f"checkpoint {step}: {error}"]
    found = contents_faults(recorded, step, checkpoint.read_loader_state(path).get(MADE_OF, {}))
    if unequal and (exact or distance > TOLERANCE[0]):
        found.append(
            f"checkpoint {step}: params: {unequal:,} values are not those behind the repeated step, at a relative distance of "
            f"{distance:.2g}"
        )
    return found


def contents_faults(recorded: Recorded, step: int, made_of: Mapping[str, str]) -> list[str]:
    """The differences in what a checkpoint says that its run was made of."""
    own = kept_contents(recorded.launch_of(max(step, recorded.begin + 1)))
    return differences(own, made_of, path=f"checkpoint {step}: {MADE_OF}")


def describe(certificate: Mapping[str, Any]) -> str:
    """The certificate, readable."""
    rows = [["step", "result", "from", "replayed"], *certificate_rows(certificate)]
    said = [
        f"  {one['step']}: {text}" for one in certificate["steps"] for text in one["differences"]
    ]
    said += [f"  {text}" for text in certificate["findings"]]
    made_of = ", ".join(f"{name} {digest}" for name, digest in certificate[MADE_OF].items())
    by = certificate["repeated_by"]
    versions = ", ".join(f"{name} {version}" for name, version in by["versions"].items())
    return "\n".join(
        [
            f"{certificate['run']}: {certificate['result']}; {certificate['recorded']} steps are recorded, "
            f"{certificate['repeatable']} can be repeated; compared {certificate['comparison']}",
            summary_table(rows),
            *said,
            f"made of {made_of}",
            f"repeated by {versions} on {by['devices']['kind']}, mesh {by['devices']['mesh']}",
        ]
    )


def computed_by(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The versions and devices of a launch."""
    return {name: recorded[name] for name in ("versions", "devices")}


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether steps of two launches are repeated by the same `Repeater`."""
    changes = config_lib.differences(one, other)
    free = tuple(f"config.{name}" for name in _NEUTRAL)
    return all(change.path.startswith(free) for change in changes)


def _checkpoint(recorded: Recorded, step: int | None) -> Any:
    return checkpoint_path(recorded.folder / checkpoint.FOLDER) / str(step)


def _is_kept(recorded: Recorded, step: int) -> bool:
    path = _checkpoint(recorded, step)
    with store_errors(path):
        return path.is_dir() and is_complete(path)


def _sound(recorded: Recorded, step: int) -> bool:
    """Whether a checkpoint matches its manifest; says so if not."""
    try:
        checkpoint.verify(_checkpoint(recorded, step), thorough=True)
    except checkpoint.DamagedError as error:
        say(f"warning: checkpoint {_checkpoint(recorded, step)} is damaged and not used: {error}")
        return False
    return True


def read_tokens(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The tokens of these lines; a line that cannot be read as it is."""
    found: list[Any] = []
    for line in lines:
        try:
            found.append(read_record(dict(line)))
        except (ValueError, zlib.error, KeyError, TypeError):
            found.append(dict(line))
    return found
