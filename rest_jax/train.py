"""The RL loop, top to bottom: load, sample, score, update, evaluate, save. No maths in here.

`run(config)` trains to the end, or to SIGTERM, and is started again by the same command. Step s reads its metrics while
step s + 1 runs; a step with an evaluation or a checkpoint reads its own first.
"""

import concurrent.futures
import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from rest_jax.config import Config
from rest_jax.data.loader import Ahead, make_loader
from rest_jax.data.tokenize import Prepared, load_training, prepare
from rest_jax.distributed import activate, check_batch, is_first_process, num_data_shards, to_mesh
from rest_jax.errors import UserError
from rest_jax.evaluation.heldout import EvalExample, Evaluator, held_out, report_evaluations
from rest_jax.models.load import Policy
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.step import (
    BatchLengths,
    StepConfig,
    active_groups,
    init_state,
    make_logprobs,
    make_train_step,
    plan_all,
    plan_step,
)
from rest_jax.rollout.engine import rollout_cast
from rest_jax.rollout.experience import Collector, Experience, gather_lengths
from rest_jax.run.folder import RL_FINITE, Run, check_start, open_run
from rest_jax.run.policy import load_policy
from rest_jax.run.profile import Tracer
from rest_jax.run.progress import Progress
from rest_jax.run.step_metrics import step_metrics
from rest_jax.run.throughput import Speed, mesh_peak_flops, reward_rates
from rest_jax.templates import TEMPLATES
from rest_jax.types import RolloutBatch, Sampling, ScoredBatch


@dataclasses.dataclass
class Pending:
    """A step whose metrics are still on the device, with its batch for the case that they are NaN."""

    step: int
    metrics: dict[str, jax.Array]
    host: dict[str, float]
    whole: BatchLengths
    scored: ScoredBatch
    samples: list[dict[str, Any]]
    started: float
    cpu: float  # CPU seconds of this process when it began
    dispatched: float  # when the update was handed to the device
    done: concurrent.futures.Future[float]  # when the device was done with it
    ended: tuple[float, float] | None = (
        None  # time and CPU time when the next step began; None: not yet
    )


def run(config: Config, dry_run: bool = False, profile: int | None = None) -> int:
    """Trains, and writes a trace of step `profile`; 0 at the end or after SIGTERM. UserError for input that cannot be used;
    RunStopped on NaN.
    """
    policy = load_policy(config.model, config.mesh)
    check_sizes(config, policy)
    train = training_prompts(config, policy)
    held = held_out(config, policy)
    steps = total_steps(config, train.size)
    check_start(config, policy.mesh)
    describe(config, policy, train, held, steps)
    if dry_run:
        return 0
    with contextlib.closing(open_run(config, policy.files)) as opened, activate(policy.mesh):
        loop = Loop(config, policy, train, held, steps, opened, profile)
        with contextlib.closing(loop):
            loop.run()
    return 0


def check_sizes(config: Config, policy: Policy) -> None:
    """A mini-batch must divide over the mesh; UserError with both numbers."""
    name = "train.prompts_per_update"
    if config.train.prompts_per_update is None:
        name = "rollout.prompts_per_step"
    size = config.train.prompts_per_update or config.rollout.prompts_per_step
    check_batch(name, size, policy.mesh)
    ways = num_data_shards(policy.mesh)
    if config.train.measure_noise and size <= ways:
        raise UserError(
            f"train.measure_noise: {name} {size} on {ways} ways is one micro-batch, which has no variance; raise {name}"
        )


def total_steps(config: Config, prompts: int) -> int:
    """`train.steps`, or the whole steps in `train.epochs`."""
    if prompts < config.rollout.prompts_per_step:
        raise UserError(
            f"data.train {config.data.train}: {prompts} prompts, fewer than "
            f"rollout.prompts_per_step {config.rollout.prompts_per_step}; lower it or add data"
        )
    epochs = config.train.epochs
    steps = config.train.steps or int(prompts // config.rollout.prompts_per_step * epochs)
    if steps == 0:
        raise UserError(f"train.epochs {epochs}: less than one step of {prompts} prompts; raise it")
    return steps


def training_prompts(config: Config, policy: Policy) -> Prepared:
    """The training prompts that fit, tokenised."""
    records = load_training(config.data)
    return prepare(records, policy.tokenizer, TEMPLATES[config.data.template], config.data)


def describe(
    config: Config, policy: Policy, train: Prepared, held: list[EvalExample], steps: int
) -> None:
    """What is about to run, in a few lines."""
    if not is_first_process():
        return
    count = sum(x.size for x in jax.tree.leaves(policy.params))
    r = config.rollout
    print(
        f"{config.name}: {policy.config.family} policy, {count / 1e6:,.1f} M parameters, mesh {dict(policy.mesh.shape)}\n"
        f"train: {train.summary()}\nheld out: {len(held)} records\n"
        f"{steps} steps of {r.prompts_per_step} prompts x {r.group_size} responses, "
        f"{r.prompts_per_step // (config.train.prompts_per_update or r.prompts_per_step)} update(s) a step",
        flush=True,
    )


class Loop:
    """The compiled functions and the state of one run. A resource of `run`."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        train: Prepared,
        held: list[EvalExample],
        steps: int,
        opened: Run,
        profile: int | None = None,
    ):
        self.config, self.policy, self.steps, self.opened = config, policy, steps, opened
        r, t = config.rollout, config.train
        mini_batch = t.prompts_per_update or r.prompts_per_step
        updates = r.prompts_per_step // mini_batch
        self.step_config = StepConfig(
            loss=config.loss,
            schedule=Schedule(config.weights, config.curriculum, steps),
            sampling=Sampling(r.temperature, r.top_k, r.top_p),
            updates=updates,
            max_tokens_per_microbatch=t.max_tokens_per_microbatch,
            fixed_length=r.max_response_tokens,
            tis_cap=r.tis_cap,
            noise_groups=mini_batch if t.measure_noise else None,
        )
        tx = make_optimizer(config.optimizer, steps * updates)
        # The reference is the starting policy; without a KL term nothing keeps a second copy of the weights.
        self.reference = (
            jax.tree.map(jnp.copy, policy.params) if config.loss.kl_coefficient > 0 else None
        )
        self.state, self.abstract, shardings = init_state(
            policy, tx, self.step_config.schedule, config.seed
        )
        self.cast = rollout_cast(policy)
        self.train_step = make_train_step(
            policy.decoder, tx, self.step_config, policy.mesh, shardings
        )
        self.logprobs = make_logprobs(
            policy.decoder, self.step_config, policy.mesh, shardings.params
        )
        self.evaluator = Evaluator.of(config, policy, held)
        self.batches = Ahead(
            make_loader(
                train,
                batch_prompts=r.prompts_per_step,
                seed=config.seed,
                pad_id=policy.tokenizer.pad_id,
                cfg=config.data,
                num_steps=steps,
            )
        )
        self.collector = Collector(config, policy, self.batches, steps)
        peak = mesh_peak_flops(policy.mesh.devices.flat, policy.config.dtype)
        self.speed = Speed(policy.config, peak)
        self.tracer = Tracer(opened.folder, profile)
        self.watch = concurrent.futures.ThreadPoolExecutor(1, "watch")
        self.pending: Pending | None = None
        self.ahead: Experience | None = None  # the next step's, under staleness

    def close(self) -> None:
        """Ends the threads."""
        self.collector.close()
        self.watch.shutdown()

    def run(self) -> None:
        """From the newest checkpoint, or from the start, to the end."""
        self.state, loader_state, start = self.opened.resume(self.state, self.abstract)
        self.policy = dataclasses.replace(self.policy, params=self.state.params)
        if loader_state is not None:
            self.batches.set_state(loader_state)
        self.progress = Progress(self.steps, start)
        self.started = time.monotonic()
        if start == 0 and self.config.train.eval_before:
            self.evaluate(0)
        for step in range(start + 1, self.steps + 1):
            with self.tracer.step(step, lambda: jax.block_until_ready(self.state.params)):
                self.step(step)
            stopping = self.opened.stop.agreed()
            self.after(step, step == self.steps or stopping)
            if stopping:
                self.progress.message(
                    f"SIGTERM: saved at step {step}; run the same command to go on"
                )
                break
        self.flush()
        self.progress.close()
        self.tracer.report(self.progress.message)
        report_evaluations(self.opened.folder)

    def step(self, step: int) -> None:
        """Sample, score, update; hands the metrics of the step before to the files."""
        started, cpu = time.monotonic(), time.process_time()
        if self.pending is not None:
            self.pending.ended = (started, cpu)
        now, self.ahead = self.ahead or self.collect(step), None
        if self.samples_ahead(step):
            self.ahead = self.collect(step + 1, staleness=1)
        whole = gather_lengths(now.scored)
        plan = plan_step(whole, self.step_config, num_data_shards(self.policy.mesh))
        on_mesh = to_mesh(now.scored, self.policy.mesh)
        old, logp_ref = self.second_looks(on_mesh.rollout, whole)
        dispatched = time.monotonic()
        with jax.profiler.TraceAnnotation("update"):
            self.state, metrics = self.train_step(self.state, on_mesh, old, logp_ref, plan)
        self.loader_state = now.loader_state
        self.flush()
        self.pending = Pending(
            step=step,
            metrics=metrics,
            host=step_metrics(now, whole, plan, self.policy.tokenizer.stop_ids)
            | self.speed.of_rollout(
                whole.prompt_length, whole.response_length, now.seconds["time/rollout"]
            )
            | reward_rates(now.scored.rollout.response_length, now.seconds["time/score"]),
            whole=whole,
            scored=now.scored,
            samples=self.samples(step, now),
            started=started,
            cpu=cpu,
            dispatched=dispatched,
            done=self.watch.submit(_when_ready, metrics),
        )

    def collect(self, step: int, staleness: int = 0) -> Experience:
        """The experience of a step, sampled with the weights as they are."""
        params = self.cast(self.state.params)
        return self.collector.collect(params, self.state.rng, step - 1, staleness)

    def samples_ahead(self, step: int) -> bool:
        """Under staleness: whether the next step is sampled before this step's update. Not over a checkpoint, since a run
        that goes on from it has no older weights: so both do the same.
        """
        stale = self.config.rollout.staleness == 1
        return stale and step < self.steps and step % self.config.train.checkpoint_every != 0

    def second_looks(self, rollout: RolloutBatch, whole: BatchLengths) -> tuple[Any, Any]:
        """The trainer's own old log-probs and the reference's, each only when asked for."""
        old = logp_ref = None
        recompute = self.config.rollout.recompute_logprobs
        if recompute or self.reference is not None:
            plan = plan_all(whole, self.step_config, num_data_shards(self.policy.mesh))
            old = self.logprobs(self.state.params, rollout, plan) if recompute else None
            if self.reference is not None:
                logp_ref = self.logprobs(self.reference, rollout, plan).logp
        return old, logp_ref

    def samples(self, step: int, now: Experience) -> list[dict[str, Any]]:
        """The first response of the first few prompts, readable."""
        found, rollout, tokenizer = [], now.scored.rollout, self.policy.tokenizer
        for i, record in enumerate(now.records[: self.config.train.samples_per_step]):
            ids = rollout.responses[i, 0, : int(rollout.response_length[i, 0])]
            prompt = rollout.prompt[i, : int(rollout.prompt_length[i])]
            found.append(
                {"split": "train", "id": record.id, "prompt": tokenizer.text(prompt),
                 "response": tokenizer.text(ids), **dataclasses.asdict(now.scores[i][0])}
            )  # fmt: skip
        return found

    def flush(self) -> None:
        """Reads the pending step's metrics, stops on NaN, writes its lines."""
        if self.pending is None:
            return
        p, self.pending = self.pending, None
        values = {name: float(value) for name, value in p.metrics.items()}
        ended, cpu_ended = p.ended or (time.monotonic(), time.process_time())
        elapsed = ended - p.started
        self.opened.check_finite(p.step, values, RL_FINITE, batch_arrays(p.scored))
        update = p.done.result() - p.dispatched
        wanted = active_groups(p.whole.reward, self.step_config)
        lengths = p.whole.prompt_length, p.whole.response_length
        values |= p.host | self.speed.of_update(*lengths, wanted, update)
        values |= {
            "time/step": elapsed,
            "time/cpu": cpu_ended - p.cpu,
            "time/update": update,
            "time/tokens_per_second": p.host["rollout/tokens"] / elapsed,
            "time/elapsed": time.monotonic() - self.started,
        }
        if is_first_process():
            self.opened.write(p.step, values, p.samples)
            shown = f"reward {values['reward/mean']:.3f}"
            self.progress.update(
                p.step, f"{shown}, {values['time/tokens_per_second']:,.0f} tokens/s"
            )

    def after(self, step: int, last: bool) -> None:
        """Evaluation and checkpoint, when due; both read the step's metrics first."""
        t = self.config.train
        if (last and step == self.steps) or (t.eval_every and step % t.eval_every == 0):
            self.flush()
            self.evaluate(step)
        if last or step % t.checkpoint_every == 0:
            self.flush()
            self.opened.save(step, self.state, self.loader_state)

    def evaluate(self, step: int) -> None:
        """Greedy rates on the held-out prompts, as a line of its own."""
        if self.evaluator is not None:
            params = self.cast(self.state.params)
            self.progress.message(self.evaluator.record(self.opened, step, params))


def _when_ready(metrics: dict[str, jax.Array]) -> float:
    """The time at which the device has made them."""
    jax.block_until_ready(metrics)
    return time.monotonic()


def batch_arrays(scored: ScoredBatch) -> dict[str, Any]:
    """What is saved of a batch that made a number NaN."""
    r = scored.rollout
    arrays = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)}
    return arrays | {"region": scored.region, "reward": scored.reward}
