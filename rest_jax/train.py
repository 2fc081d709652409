"""The RL loop, top to bottom: sample, score, prepare, update, log, evaluate, save. No maths in here.

`train(config)` trains to the end, or until it is told to stop, and resumes when the same command is run again. From the step
to the loss: `train_steps` -> `rl.step.Update` -> `rl.update.micro_gradient` -> `rl.update.policy_loss` ->
`rl.loss.policy_token_loss` -> `rl.rules.loss.clip`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rest_jax import plugins
from rest_jax.analysis.closing import print_closing_table
from rest_jax.config import Config, check_command
from rest_jax.data.cache import load_prompts
from rest_jax.data.loader import bucketed
from rest_jax.data.records import gold
from rest_jax.data.tokenize import Prepared
from rest_jax.distributed import (
    activate,
    check_batch,
    gather,
    is_first_process,
    local_shards,
    move_rows,
    num_data_shards,
    rows_of_shards,
)
from rest_jax.errors import UNFINISHED, UserError
from rest_jax.evaluation.heldout import Evaluator, Examples, describe_data, held_out
from rest_jax.files import Location
from rest_jax.models.decoder import with_adapters
from rest_jax.models.policy import Policy, check_positions
from rest_jax.planning.banner import banner
from rest_jax.planning.memory import check_memory
from rest_jax.planning.programs import memory_programs
from rest_jax.planning.setup import HeldOut, Lengths, Setup
from rest_jax.rewards.plugin import check_plugin
from rest_jax.rl.balance import check_experts
from rest_jax.rl.optimizer import Optimizer, make_optimizer
from rest_jax.rl.packing import BatchLengths, MicroBatch, assign_minibatches, packing_metrics
from rest_jax.rl.plugins import check_traces
from rest_jax.rl.prepare import (
    StepConfig,
    TokenValues,
    active_groups,
    minibatch_prompts,
    step_config,
)
from rest_jax.rl.rules import check_rules
from rest_jax.rl.step import (
    Step,
    abstract_state,
    copy_to_host,
    init_state,
    make_step,
    plan_minibatches,
    policy_metrics,
)
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.experience import Collector, Experience
from rest_jax.rollout.tokens import is_shown, token_record
from rest_jax.run.contents import digests
from rest_jax.run.folder import RL_FINITE, check_start, open_run
from rest_jax.run.fork import Origin, Start, check_origin
from rest_jax.run.load import load_trained
from rest_jax.run.loop import Loop, PendingStep, check_profile, total_steps
from rest_jax.run.preflight import check_store
from rest_jax.run.record import launch, make_sums, recorded_arrays
from rest_jax.run.throughput import Speed, mesh_peak_flops, reward_rates
from rest_jax.terminal import print_fields
from rest_jax.types import Params, ScoredBatch, TrainState

BATCH = "rollout.prompts_per_step"  # the prompts of a step
SHOWN = {"reward": "reward/mean", "exact": "reward/exact"}  # in the line of progress


def train(
    config: Config,
    dry_run: bool = False,
    profile: int | None = None,
    restart: bool = False,
    fork_of: Location | Origin | None = None,
) -> int:
    """Trains, and writes a trace of step `profile`; `restart` forgets the run in the folder first, `fork_of` is the folder of
    another run to continue from, or a checkpoint of it. 0 at the end, UNFINISHED when told to stop before it. UserError for input
    that cannot be used; RunStopped on NaN.
    """
    check_command(config, supervised=False)
    check_rules(config)
    check_traces(config)
    check_plugin(config.reward)
    check_store(config)
    origin = check_start(config, restart, fork_of)
    policy = load_trained(config)
    check_sizes(config, policy)
    check_experts(config, policy.config)
    data, keep = config.data, not dry_run
    prompts = load_prompts(config, data.train, data.train_limit, policy.tokenizer, keep)
    longest = int(prompts.prompts.lengths.max())
    check_positions(policy.config, longest, config.rollout.max_response_tokens)
    examples = held_out(config, policy, keep)
    steps = total_steps(config, prompts.size, BATCH)
    check_profile(profile, steps)
    setup = make_setup(config, policy, prompts, examples, steps)
    if is_first_process():
        print_fields(banner(setup, describe(config, prompts, examples, steps)))
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
        made_of = digests(policy, prompts, plugins.digests(config))
        run.launch = launch(config, policy.mesh, made_of, "train")
        trainer = make_trainer(config, policy, prompts, run.stop.check)
        with contextlib.closing(trainer):
            loop = Loop(run, steps, evaluator, SHOWN, profile)
            finished = train_steps(trainer, loop)
        if finished:
            print_closing_table(run.folder)
    return 0 if finished else UNFINISHED


def train_steps(trainer: "Trainer", loop: Loop) -> bool:
    """All steps of a loop, from where it resumes; whether it came to the last one."""
    policy, collector, cfg, rl = trainer.policy, trainer.collector, trainer.cfg, trainer.rl
    config, check = trainer.config, loop.run.stop.check
    mesh, rollout_mesh = policy.mesh, policy.rollout_mesh
    minibatch = assign_minibatches(config.rollout.prompts_per_step, cfg.updates)
    with loop.stoppable():
        state, loader_state = loop.resume(
            trainer.fresh, trainer.abstract, policy.trained, trainer.start
        )
        collector.resume(loader_state)
        for step in loop.steps():
            if cfg.updates > 1:
                # The first update ends the state that a request to stop goes back to.
                loop.keep(copy_to_host(state))
            # sample and score
            experience = collector.collect(trainer.rollout_params(state.params), state.rng, step)
            lengths, active = gather_lengths(experience.scored, cfg, rollout_mesh)
            scored = move_rows(experience.scored, rollout_mesh, mesh)
            dispatched = time.monotonic()
            with jax.profiler.TraceAnnotation("update"):
                # advantages, token weights, global denominators
                recomputed = logp_ref = None
                if config.rollout.recompute_logprobs:
                    weights = with_adapters(state.params, policy.frozen)
                    recomputed = rl.logprobs(weights, scored.rollout, lengths, check)
                if trainer.reference is not None:
                    # Its routers choose for themselves: a route belongs to the policy that sampled.
                    own = dataclasses.replace(scored.rollout, routes=None)
                    logp_ref = rl.logprobs(trainer.reference, own, lengths, check).logp
                batch, curriculum, prepared, shown = rl.prepare(
                    scored, recomputed, logp_ref, minibatch, state.curriculum
                )
                # loss, gradient, optimiser
                plan, updates = plan_minibatches(lengths, active, cfg, mesh), []
                for micro_batches in plan:
                    state, totals = rl.update(state, batch, micro_batches, policy.frozen, check)
                    updates.append(totals)
                if config.train.measure_change:
                    weights, rollout = with_adapters(state.params, policy.frozen), scored.rollout
                    after = rl.logprobs(weights, rollout, lengths).logp
                    prepared |= rl.change(after, batch, scored.region, rollout.mask)
            state = dataclasses.replace(state, step=rl.advance(state.step), curriculum=curriculum)
            # log the step before; keep the metrics of this one
            pending = PendingStep(
                device=(prepared, updates),
                read=policy_metrics,
                host=trainer.host.of_step(experience, lengths, plan),
                rates=functools.partial(trainer.host.rates, experience, lengths, active),
                must_be_finite=RL_FINITE,
                batch=experience.arrays(),
                dispatched=dispatched,
                samples=sample_lines(experience, policy, config.train.samples_per_step),
                tokens=token_line(shown, experience, collector)
                if is_shown(step, collector.steps)
                else None,
                sums=trainer.sums(recorded_arrays(scored, batch) | {"params": state.params}),
            )
            loop.end_step(step, pending, state, collector.snapshot())
    return loop.finished


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What the steps of a run are made with. A resource: it holds the collector."""

    config: Config
    policy: Policy
    cfg: StepConfig
    collector: Collector
    rl: Step
    rollout_params: Callable[[Params], Params]
    reference: Params | None  # the starting policy, which the KL term refers to
    fresh: Callable[[], TrainState]  # the state before the first step; takes what the policy trains
    abstract: TrainState
    start: Start
    host: "HostMetrics"
    sums: Callable[[Any], Any]  # `record.make_sums`

    def close(self) -> None:
        """Ends the collector's thread."""
        self.collector.close()


def make_trainer(
    config: Config, policy: Policy, prompts: Prepared, check: Callable[[], None] = lambda: None
) -> Trainer:
    """Compiles the functions of a run's steps. `check` as of `Collector`."""
    steps = total_steps(config, prompts.size, BATCH)
    cfg, tx = method(config, policy, steps)
    reference = copy_reference(config, policy)
    abstract, shardings = abstract_state(policy, tx, cfg.schedule, config.optimizer.moments)
    collector = Collector(config, policy, prompts, steps, check)
    return Trainer(
        config,
        policy,
        cfg,
        collector,
        rl=make_step(policy.decoder, tx, cfg, policy.mesh, shardings),
        rollout_params=rollout_cast(policy),
        reference=reference,
        fresh=functools.partial(init_state, policy, tx, cfg.schedule, config.seed, shardings),
        abstract=abstract,
        start=Start(collector.batches.get_state(), cfg.updates),
        host=HostMetrics(policy, prompts),
        sums=make_sums(policy.mesh),
    )


class HostMetrics:
    """The metrics of a step that the host knows: lengths, packing, speed."""

    def __init__(self, policy: Policy, prompts: Prepared):
        self.prompts = prompts
        peak = mesh_peak_flops(policy.mesh.devices.flat, policy.config.dtype)
        self.speed = Speed(policy.config, peak)

    def of_step(
        self,
        experience: Experience,
        lengths: BatchLengths,
        plan: Sequence[Sequence[MicroBatch]],
    ) -> dict[str, float]:
        """Of a step whose updates are dispatched; `lengths` and `plan` are those of the global batch."""
        return (
            experience.metrics()
            | packing_metrics(plan, len(lengths.prompt_length))
            | {
                "data/epoch": int(experience.row.max()) // self.prompts.size + 1,
                "data/dropped": self.prompts.dropped,
            }
        )

    def rates(
        self,
        experience: Experience,
        lengths: BatchLengths,
        active: np.ndarray,
        times: Mapping[str, float],
    ) -> dict[str, float]:
        """Tokens a second and utilisation of all processes, from the times of the step's stages."""
        prompts, responses = lengths.prompt_length, lengths.response_length
        every = experience.sampled
        sampled = (every.prompt_length, every.response_length) if every else (prompts, responses)
        return (
            self.speed.of_rollout(*sampled, times["time/rollout"])
            | self.speed.of_update(prompts, responses, active, times["time/update"])
            | reward_rates(sampled[1], times["time/score"])
            | {"time/tokens_per_second": float(sampled[1].sum()) / times["time/step"]}
        )


def copy_reference(config: Config, policy: Policy) -> Params | None:
    """The starting policy, which the KL term refers to: a second copy of the weights, or with LoRA the frozen ones themselves,
    with a copy of the adapters of a folder; fresh ones add nothing. None without that term.
    """
    if config.loss.kl_coefficient == 0:
        return None
    if policy.frozen is not None and not config.refers_to_adapters:
        return policy.frozen
    return with_adapters(jax.tree.map(jnp.copy, policy.trained), policy.frozen)


def gather_lengths(
    scored: ScoredBatch, cfg: StepConfig, mesh: Mesh
) -> tuple[BatchLengths, np.ndarray]:
    """Lengths and `active_groups` of the batch of all processes."""
    own = BatchLengths.of(scored.rollout)
    prompts, responses, active = gather(
        (own.prompt_length, own.response_length, np.asarray(active_groups(scored, cfg))), mesh
    )
    return BatchLengths(prompts, responses, own.widths), active


def sample_lines(experience: Experience, policy: Policy, count: int) -> list[dict[str, Any]]:
    """The first completion of the first `count` prompts, readable, with the gold answer and its score."""
    rollout, tokenizer = experience.scored.rollout, policy.tokenizer
    lines = []
    for i, record in enumerate(experience.records[:count]):
        completion = rollout.responses[i, 0, : int(rollout.response_length[i, 0])]
        prompt = rollout.prompt[i, : int(rollout.prompt_length[i])]
        texts = {"prompt": tokenizer.text(prompt), "response": tokenizer.text(completion)}
        score = dataclasses.asdict(experience.scores[i][0])
        line = {"split": "train", "id": record.id, **texts, "gold": gold(record.target), **score}
        lines.append(line)
    return lines


def shown_groups(config: Config, policy: Policy) -> tuple[int, ...]:
    """Rows of the global batch whose tokens are written: the first that the first process samples."""
    mesh, count = policy.rollout_mesh, config.rollout.prompts_per_step
    rows = rows_of_shards(count, local_shards(mesh, process=0), mesh)
    return tuple(rows[: config.train.samples_per_step].tolist())


def token_line(
    shown: TokenValues, experience: Experience, collector: Collector
) -> Callable[[], dict[str, Any]] | None:
    """What makes the line of the token viewer, once the device is done; None where no groups are asked for."""
    if not len(shown.weight):
        return None
    tokenizer, template = collector.policy.tokenizer, collector.template
    reward = collector.config.reward
    return lambda: token_record(jax.device_get(shown), experience, tokenizer, template, reward)


def check_sizes(config: Config, policy: Policy) -> None:
    """The prompts of a step must divide over the mesh, and leave room for responses; UserError with both numbers."""
    longest = config.rollout.max_response_tokens
    if longest >= policy.config.max_positions:  # behind any prompt: no data need be read to know
        check_positions(policy.config, config.data.max_prompt_tokens, longest)
    check_batch(BATCH, config.rollout.prompts_per_step, policy.mesh)
    if jax.process_count() > 1:  # each of them samples equally many
        check_batch(BATCH, config.rollout.prompts_per_step, policy.rollout_mesh)
    size, shards = minibatch_prompts(config), num_data_shards(policy.mesh)
    if config.train.measure_noise and size <= shards:
        name = "train.prompts_per_update" if config.train.prompts_per_update else BATCH
        raise UserError(
            f"train.measure_noise: {name} {size} on {shards} data shards is one micro-batch, which has no variance; "
            f"raise {name}"
        )


def method(config: Config, policy: Policy, steps: int) -> tuple[StepConfig, Optimizer]:
    """The static side of the steps of a run, and its optimiser."""
    shown = shown_groups(config, policy)
    cfg = dataclasses.replace(step_config(config, steps), shown_groups=shown)
    return cfg, make_optimizer(config.optimizer, steps * cfg.updates)


def make_setup(
    config: Config, policy: Policy, prompts: Prepared, examples: Examples | None, steps: int
) -> Setup:
    """What the programs of the run are made of, for the check of its memory and for what is said of it."""
    cfg, tx = method(config, policy, steps)
    abstract, _ = abstract_state(policy, tx, cfg.schedule, config.optimizer.moments)
    longest = Lengths(bucketed(prompts.prompts), config.rollout.max_response_tokens)
    evaluated = examples and HeldOut(len(examples.prompts), bucketed(examples.prompts))
    return Setup(config, policy.with_trained(abstract.params), cfg, tx, longest, evaluated)


def describe(
    config: Config, prompts: Prepared, examples: Examples | None, steps: int
) -> list[tuple[str, str]]:
    """The data and the steps of a run, as fields of the banner."""
    r = config.rollout
    updates = r.prompts_per_step // minibatch_prompts(config)
    files = plugins.named(config).items()
    return [
        *describe_data(config, prompts, examples),
        ("method", describe_method(config)),
        (
            "steps",
            f"{steps} steps of {r.prompts_per_step} prompts x {r.group_size} completions, {updates} update(s) a step",
        ),
        *((key, f"{word}: SHA-256 {plugins.read(word, key).digest}") for key, word in files),
    ]


def describe_method(config: Config) -> str:
    """The rules of a run: of the advantage, the token weights and the loss."""
    weights, loss = config.weights, config.loss
    rule = weights.rule_used
    placebo = "" if weights.placebo == "none" else f", placebo {weights.placebo}"
    moved = "" if rule == "uniform" else f" (curriculum {config.curriculum.shape}{placebo})"
    zero = f", none on {' and '.join(weights.zero)}" if weights.zero else ""
    return f"advantage {loss.advantage_used}, token weights {rule}{moved}{zero}, loss {loss.policy_used}"
