"""A run made again from what it recorded: `rest-jax reproduce` trains under its config and says where the two first differ.

reproduce(run, name, ...)    0 equal, 1 they differ, the code of the training where that does not come to its end
"""

from collections.abc import Sequence

from rest_jax import config as config_lib
from rest_jax import plugins, sft, train
from rest_jax.audit import TOLERANCE, computed_by, load, override, read_tokens
from rest_jax.config import Config, TrainConfig
from rest_jax.distributed import is_first_process, say
from rest_jax.errors import UserError
from rest_jax.files import Location, absolute
from rest_jax.run.contents import MADE_OF, check_same, digests
from rest_jax.run.metrics import CONFIG_FILE, DIGESTS_FILE, METRICS_FILE, SAMPLES_FILE, TOKENS_FILE
from rest_jax.run.record import (
    Lines,
    Recorded,
    differences,
    launch,
    line_faults,
    read_recorded,
)
from rest_jax.run.trackers import KINDS

_FILES = (METRICS_FILE, DIGESTS_FILE, SAMPLES_FILE, TOKENS_FILE)


def reproduce(
    run: Location,
    name: str | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
    run_plugins: bool = False,
) -> int:
    """Trains the run anew, beside it, as `name`; the same command resumes. UserError when the data or the starting weights are
    not those of the run, with `strict` when versions or devices are not, and for plug-ins unless they may run.
    """
    folder = absolute(run)
    recorded = read_recorded(folder)
    newest = recorded.launch_of(recorded.last)
    told = override(config_lib.load([folder / CONFIG_FILE]), overrides, "reproduce")
    plugins.check_asked(told, run_plugins, "reproduce")
    config = beside(told, recorded, name)
    policy, data = load(config, newest["command"])
    made_of = digests(policy, data, plugins.digests(config))
    check_same(newest[MADE_OF], made_of, f"{folder}: reproduce")
    others = differences(computed_by(newest), computed_by(launch(config, policy.mesh, made_of, "")))
    del policy, data
    if others and strict:
        raise UserError(f"reproduce --strict: {folder}: not what made it: {'; '.join(others)}")
    for text in others:
        say(f"not what made {folder.name}, so that bits may differ: {text}")
    if len({str(one["config"]) for _, one in recorded.launches}) > 1:
        say(f"{folder.name} was resumed under other configs; it is made again under the newest one")
    make = {"train": train.train, "sft": sft.finetune}[newest["command"]]
    code = make(config, fork_of=recorded.origin)
    if code or not is_first_process():
        return code
    found = compare(recorded, read_recorded(config.folder), bool(others))
    say("\n".join(found))
    return int(len(found) > 1)


def beside(config: Config, recorded: Recorded, name: str | None) -> Config:
    """The config of a run beside the recorded one, which no tracker gets: the projects are those of whoever made that one."""
    folder = recorded.folder
    if name == folder.name:
        raise UserError(f"reproduce: {name}: the run itself has that name; choose another one")
    untracked = {key: TrainConfig.model_fields[key].default for key in KINDS}
    section = config.train.model_copy(update=untracked)
    moved = config.model_copy(update={"output": str(folder.parent), "train": section})
    return moved.renamed(name or f"{folder.name}-reproduced", "reproduce")


def compare(recorded: Recorded, made: Recorded, computed_otherwise: bool) -> list[str]:
    """What came of it, as lines: one if all that is recorded was made again."""
    head = f"{recorded.folder} and {made.folder}: steps {recorded.begin + 1} to {recorded.last}"
    first, faults = first_difference(recorded, made.lines, None), line_faults(recorded)
    if first is None and not faults:
        further = f"; the second has steps to {made.last}" if made.last > recorded.last else ""
        return [f"{head} are equal{further}"]
    found = [f"{head} differ", *faults, *([] if first is None else [f"first at {first}"])]
    if computed_otherwise:
        beyond = first_difference(recorded, made.lines, TOLERANCE)
        said = "nothing" if beyond is None else f"first {beyond}"
        found.append(f"beyond the tolerance of other devices and versions: {said}")
    return found


def first_difference(
    recorded: Recorded, here: Lines, tolerance: tuple[float, float] | None
) -> str | None:
    """Step, file, name and values of the first difference in what is recorded; with a tolerance, of the metrics alone."""
    there = recorded.lines
    further = {step for name in _FILES for step in here[name] if step <= recorded.last}
    for step in sorted({step for name in _FILES for step in there[name]} | further):
        for name in _FILES if tolerance is None else (METRICS_FILE,):
            pair = (lines[name].get(step, []) for lines in (there, here))
            # but for "of": they were launched otherwise
            own = ([{key: line[key] for key in line if key != "of"} for line in x] for x in pair)
            if name == TOKENS_FILE:
                own = map(read_tokens, own)
            if found := differences(*own, tolerance=tolerance, path=name):
                return f"step {step}: {found[0]}"
    return None
