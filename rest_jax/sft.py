"""The supervised loop (SFT, TSFT, RSFT), top to bottom: gold responses, loss, update. No sampling, no maths in here.

`finetune(config)` trains to the end, or until it is told to stop, and resumes when the same command is run again. Records,
checkpoints, metrics and the loop around the step are those of train.py; a run's folder is a start for `rest-jax train`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rest_jax.analysis.closing import print_closing_table
from rest_jax.config import Config, check_command
from rest_jax.data.cache import load_demonstrations
from rest_jax.data.loader import Loader, TargetBatch, bucketed
from rest_jax.data.tokenize import Prepared
from rest_jax.distributed import (
    activate,
    check_batch,
    gather,
    is_first_process,
    local_shards,
    rows_of_shards,
    to_mesh,
)
from rest_jax.errors import UNFINISHED
from rest_jax.evaluation.heldout import Evaluator, Examples, describe_data, held_out
from rest_jax.files import Location
from rest_jax.models.policy import Policy, check_positions
from rest_jax.planning.banner import banner
from rest_jax.planning.memory import check_memory
from rest_jax.planning.programs import memory_programs
from rest_jax.planning.setup import HeldOut, Lengths, Setup
from rest_jax.rewards.plugin import check_plugin
from rest_jax.rl.balance import check_experts
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import Optimizer, make_optimizer
from rest_jax.rl.packing import BatchLengths, packing_metrics
from rest_jax.rl.regions import label_tokens
from rest_jax.rl.step import (
    Update,
    abstract_state,
    combine_updates,
    init_state,
    make_advance,
    plan_all_groups,
)
from rest_jax.rl.supervised import (
    GoldBatch,
    SupervisedBatch,
    make_prepare_gold,
    make_supervised_update,
)
from rest_jax.run.contents import digests
from rest_jax.run.folder import SUPERVISED_FINITE, check_start, open_run
from rest_jax.run.fork import Origin, Start, check_origin
from rest_jax.run.load import load_trained
from rest_jax.run.loop import Loop, PendingStep, total_steps
from rest_jax.run.preflight import check_store
from rest_jax.run.record import launch, make_sums
from rest_jax.templates import TEMPLATES
from rest_jax.terminal import print_fields
from rest_jax.types import TrainState

BATCH = "sft.batch_size"  # the records of a step
SHOWN = {"loss": "update/loss", "accuracy": "update/accuracy"}  # in the line of progress


def finetune(
    config: Config,
    dry_run: bool = False,
    restart: bool = False,
    fork_of: Location | Origin | None = None,
) -> int:
    """Trains, with `restart` anew, with `fork_of` (the folder of another run, or a checkpoint of it) from there on; 0 at the end,
    UNFINISHED when told to stop before it. UserError for input that cannot be used; RunStopped on NaN.
    """
    check_command(config, supervised=True)
    check_plugin(config.reward)
    check_store(config)
    origin = check_start(config, restart, fork_of)
    policy = load_trained(config)
    check_batch(BATCH, config.sft.batch_size, policy.mesh)
    check_experts(config, policy.config)
    data = load_demonstrations(config, policy.tokenizer, keep=not dry_run)
    steps = total_steps(config, data.size, BATCH)
    last = int(np.argmax(data.prompts.lengths + data.targets.lengths))
    prompt, target = int(data.prompts.lengths[last]), int(data.targets.lengths[last])
    check_positions(policy.config, prompt, target, "sft.max_tokens")
    examples = held_out(config, policy, keep=not dry_run)
    setup = make_setup(config, policy, data, examples, steps)
    described = [
        *describe_data(config, data, examples),
        (
            "method",
            f"supervised: tool calls weigh {config.sft.tool_call_weight:g}, reasoning {config.sft.reasoning_weight:g}",
        ),
        ("steps", f"{steps} steps of {config.sft.batch_size} records"),
    ]
    if is_first_process():
        print_fields(banner(setup, described))
    if origin is not None:
        check_origin(origin, policy.trained, steps)
    if dry_run:
        return 0
    with (
        contextlib.closing(
            open_run(config, policy.files, restart, origin, policy.tokenizer)
        ) as run,
        activate(policy.mesh),
    ):
        check_memory(lambda: memory_programs(setup, setup.widths), policy.mesh)
        evaluator = Evaluator(config, policy, examples, run.stop.check) if examples else None
        run.launch = launch(config, policy.mesh, digests(policy, data), "sft")
        trainer = make_trainer(config, policy, data)
        finished = train_steps(trainer, Loop(run, steps, evaluator, SHOWN))
        if finished:
            print_closing_table(run.folder)
    return 0 if finished else UNFINISHED


def train_steps(trainer: "Trainer", loop: Loop) -> bool:
    """All steps of a loop, from where it resumes; whether it came to the last one."""
    config, policy, data, batches = trainer.config, trainer.policy, trainer.data, trainer.batches
    mesh, check = policy.mesh, loop.run.stop.check
    state, loader_state = loop.resume(
        trainer.fresh, trainer.abstract, policy.trained, trainer.start
    )
    batches.set_state(loader_state)
    with loop.stoppable():
        for step in loop.steps():
            rows, _ = next(batches)
            lengths = gather_lengths(rows, mesh)
            gold = to_mesh(label_regions(rows, policy, config.data.template), mesh)
            dispatched = time.monotonic()
            batch = trainer.prepare(gold)
            plan = plan_all_groups(lengths, config.train.max_tokens_per_microbatch, mesh)
            state, totals = trainer.update(state, batch, plan, policy.frozen, check)
            state = dataclasses.replace(state, step=trainer.advance(state.step))
            tokens, prompts = int(lengths.response_length.sum()), int(lengths.prompt_length.sum())
            host = packing_metrics([plan], len(lengths.prompt_length)) | {
                "data/epoch": int(rows.row.max()) // data.size + 1,
                "data/dropped": data.dropped,
                "update/tokens": tokens,
            }
            pending = PendingStep(
                device=([totals],),
                read=combine_updates,
                host=host,
                rates=functools.partial(token_rates, tokens, tokens + prompts),
                must_be_finite=SUPERVISED_FINITE,
                batch={f.name: getattr(gold, f.name) for f in dataclasses.fields(gold)},
                dispatched=dispatched,
                sums=trainer.sums(recorded_gold(gold, batch) | {"params": state.params}),
            )
            loop.end_step(step, pending, state, functools.partial(dict, batches.get_state()))
    return loop.finished


def method(config: Config, steps: int) -> tuple[Optimizer, Schedule]:
    """The optimiser of a run, and the schedule of the weights, which its state has as that of `train.py` does."""
    return make_optimizer(config.optimizer, steps), Schedule.of(config, steps)


def make_setup(
    config: Config, policy: Policy, data: Prepared, examples: Examples | None, steps: int
) -> Setup:
    """What the programs of the run are made of, for the check of its memory and for what is said of it."""
    tx, schedule = method(config, steps)
    abstract, _ = abstract_state(policy, tx, schedule, config.optimizer.moments)
    longest = Lengths(bucketed(data.prompts), bucketed(data.targets))
    evaluated = examples and HeldOut(len(examples.prompts), bucketed(examples.prompts))
    return Setup(config, policy.with_trained(abstract.params), None, tx, longest, evaluated)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What the steps of a run are made with."""

    config: Config
    policy: Policy
    data: Prepared
    batches: Loader[TargetBatch]
    prepare: Callable[[GoldBatch], SupervisedBatch]
    update: Update
    advance: Callable[[jax.Array], jax.Array]  # from one step index to the next
    fresh: Callable[[], TrainState]  # the state before the first step; takes what the policy trains
    abstract: TrainState
    start: Start
    sums: Callable[[Any], Any]  # `record.make_sums`

    def close(self) -> None:
        """There is nothing to end."""


def make_trainer(config: Config, policy: Policy, data: Prepared) -> Trainer:
    """Compiles the functions of a run's steps."""
    mesh, steps = policy.mesh, total_steps(config, data.size, BATCH)
    tx, schedule = method(config, steps)
    abstract, shardings = abstract_state(policy, tx, schedule, config.optimizer.moments)
    batches = Loader(
        data,
        TargetBatch,
        batch=config.sft.batch_size,
        seed=config.seed,
        pad_id=policy.tokenizer.pad_id,
        cfg=config.data,
        num_steps=steps,
        rows=rows_of_shards(config.sft.batch_size, local_shards(mesh), mesh),
    )
    return Trainer(
        config,
        policy,
        data,
        batches,
        prepare=make_prepare_gold(config.sft, mesh),
        update=make_supervised_update(policy.decoder, tx, config.loss, mesh, shardings),
        advance=make_advance(mesh),
        fresh=functools.partial(init_state, policy, tx, schedule, config.seed, shardings),
        abstract=abstract,
        start=Start(batches.get_state(), updates=1),
        sums=make_sums(mesh),
    )


def recorded_gold(gold: GoldBatch, batch: SupervisedBatch) -> dict[str, Any]:
    """The arrays of a step whose digests are recorded, the parameters apart."""
    return {
        "prompts": (gold.prompt, gold.prompt_length),
        "ids": (gold.responses, gold.response_length),
        "regions": gold.region,
        "weights": batch.loss_weight,
    }


def token_rates(tokens: int, processed: int, times: Mapping[str, float]) -> dict[str, float]:
    """Target tokens, and all tokens (prompts too), for each second of a step."""
    return {
        "time/tokens_per_second": tokens / times["time/step"],
        "time/processed_tokens_per_second": processed / times["time/step"],
    }


def gather_lengths(rows: TargetBatch, mesh: Mesh) -> BatchLengths:
    """Lengths of the batch of all processes."""
    prompts, targets = gather((rows.prompt_length, rows.target_length[:, None]), mesh)
    return BatchLengths(prompts, targets, (rows.prompt.shape[1], rows.target.shape[1]))


def label_regions(rows: TargetBatch, policy: Policy, template: str) -> GoldBatch:
    """Groups of one gold response, with the region of every token."""
    tokenizer = policy.tokenizer
    parse = TEMPLATES[template].behind(tokenizer.thought_open).parse
    ids = rows.target
    text = rows.target_length - 1  # the last token is the end of the turn
    parsed = [parse(tokenizer.bytes_of(row[:n])) for row, n in zip(ids, text, strict=True)]
    region = label_tokens(parsed, tokenizer.piece_lengths[ids], text, np.ones(len(ids), bool))
    return GoldBatch(
        prompt=rows.prompt,
        prompt_length=rows.prompt_length,
        responses=ids[:, None],
        response_length=rows.target_length[:, None],
        region=region[:, None],
    )
