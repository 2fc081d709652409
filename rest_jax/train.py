"""The RL loop, top to bottom: load, sample, score, update, evaluate, save. No maths in here.

`run(config)` trains to the end, or to SIGTERM, and is started again by the same command. Step s reads its metrics while
step s + 1 runs; a step with an evaluation or a checkpoint reads its own first.
"""

import contextlib
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.answer import Target
from rest_jax.config import Config
from rest_jax.data.loader import make_loader
from rest_jax.data.prepare import Prepared, load_split, prepare
from rest_jax.errors import UserError
from rest_jax.evaluation.heldout import Evaluator, Held, held_out, report_evaluations
from rest_jax.hosts import is_first_process, to_host, to_mesh
from rest_jax.metrics import Progress
from rest_jax.optimizer import make_optimizer
from rest_jax.policy import Policy, init_state, load_policy
from rest_jax.rewards import Score
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.logprobs import Sampling
from rest_jax.rl.scoring import score_rollout
from rest_jax.rl.step import StepConfig, make_logprobs, make_train_step
from rest_jax.rollout.engine import RolloutSettings, make_rollout
from rest_jax.run import Run, TrainingStopped, check_start, open_run, save_batch
from rest_jax.sharding import activate, check_batch
from rest_jax.templates import TEMPLATES
from rest_jax.types import PromptBatch, RolloutBatch, ScoredBatch


@dataclasses.dataclass
class Pending:
    """A step whose metrics are still on the device, with its batch for the case that they are NaN."""

    step: int
    metrics: dict[str, jax.Array]
    host: dict[str, float]
    scored: ScoredBatch
    samples: list[dict[str, Any]]
    started: float
    ended: float | None = None  # when the next step began; None: not yet


def run(config: Config, dry_run: bool = False) -> int:
    """Trains; 0 at the end or after SIGTERM. UserError for input that cannot be used; TrainingStopped on NaN."""
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
        Loop(config, policy, train, held, steps, opened).run()
    return 0


def check_sizes(config: Config, policy: Policy) -> None:
    """Every batch axis must divide over the mesh; UserError with both numbers."""
    rollout, update = (
        config.rollout,
        config.train.prompts_per_update or config.rollout.prompts_per_step,
    )
    check_batch(
        "rollout.prompts_per_call",
        rollout.prompts_per_call or rollout.prompts_per_step,
        policy.mesh,
    )
    check_batch("train.micro_prompts", config.train.micro_prompts or update, policy.mesh)


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
    records = load_split(config.data.train, config.data, config.data.train_limit)
    return prepare(records, policy.tokenizer, TEMPLATES[config.data.template], config.data)


def describe(config: Config, policy: Policy, train: Prepared, held: list[Held], steps: int) -> None:
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
        held: list[Held],
        steps: int,
        opened: Run,
    ):
        self.config, self.policy, self.steps, self.opened = config, policy, steps, opened
        r, t = config.rollout, config.train
        update = t.prompts_per_update or r.prompts_per_step
        updates = r.prompts_per_step // update
        sampling = Sampling(r.temperature, r.top_k, r.top_p)
        self.step_config = StepConfig(
            loss=config.loss,
            schedule=Schedule(config.weights, config.curriculum, steps),
            sampling=sampling,
            updates=updates,
            micro=update // (t.micro_prompts or update),
            fixed_length=r.max_response_tokens,
            importance_cap=r.importance_cap,
        )
        tx = make_optimizer(config.optimizer, steps * updates)
        # The reference is the starting policy; without a KL term nothing keeps a second copy of the weights.
        self.reference = (
            jax.tree.map(jnp.copy, policy.params) if config.loss.kl_coefficient > 0 else None
        )
        self.state, self.abstract, shardings = init_state(
            policy, tx, self.step_config.schedule, config.seed
        )
        self.cast = policy.rollout_cast()
        self.train_step = make_train_step(
            policy.decoder, tx, self.step_config, policy.mesh, shardings
        )
        self.logprobs = make_logprobs(
            policy.decoder, self.step_config, policy.mesh, shardings.params
        )
        settings = RolloutSettings(
            r.group_size,
            r.max_response_tokens,
            policy.tokenizer.stop_ids,
            policy.tokenizer.pad_id,
            sampling,
        )
        self.sample = make_rollout(
            policy.decoder, settings, policy.mesh, policy.shardings("rollout")
        )
        self.template = TEMPLATES[config.data.template]
        self.evaluator = Evaluator.of(config, policy, held)
        self.batches = make_loader(
            train,
            batch_prompts=r.prompts_per_step,
            seed=config.seed,
            pad_id=policy.tokenizer.pad_id,
            cfg=config.data,
            num_steps=steps,
        )
        self.pending: Pending | None = None

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
        report_evaluations(self.opened.folder)

    def step(self, step: int) -> None:
        """Sample, score, update; hands the metrics of the step before to the files."""
        started = time.monotonic()
        if self.pending is not None:
            self.pending.ended = started
        batch, records = next(self.batches)
        loaded = time.monotonic()
        rollout = self.rollout(batch, step - 1)
        host = jax.tree.map(np.asarray, to_host(rollout)).validate()
        sampled = time.monotonic()
        progress = self.reward_progress(step - 1)
        scored, scores = score_rollout(
            host,
            [r.target for r in records],
            self.policy.tokenizer,
            self.template,
            self.config.reward,
            progress,
        )
        done = time.monotonic()
        old, logp_ref = self.second_looks(rollout)
        on_mesh = ScoredBatch(
            rollout, *to_mesh((scored.region, scored.reward, scored.format_score), self.policy.mesh)
        )
        self.state, metrics = self.train_step(self.state, on_mesh, old, logp_ref)
        self.flush()
        tokens = int(np.sum(host.response_length))
        self.pending = Pending(
            step=step,
            metrics=metrics,
            host={"rollout/truncated": truncated(host, self.policy.tokenizer.stop_ids)}
            | reward_metrics(scores, [r.target for r in records], progress)
            | {"rollout/tokens": tokens, "time/data": loaded - started, "time/rollout": sampled - loaded,
               "time/score": done - sampled},
            scored=scored,
            samples=self.samples(step, scored, scores, records),
            started=started,
        )  # fmt: skip

    def rollout(self, batch: PromptBatch, step: int) -> RolloutBatch:
        """All prompts of the step, `prompts_per_call` at a time."""
        params = self.cast(self.state.params)
        calls = self.config.rollout.prompts_per_step // (
            self.config.rollout.prompts_per_call or self.config.rollout.prompts_per_step
        )
        parts = [
            jax.tree.map(lambda x, i=i: np.array_split(x, calls)[i], batch) for i in range(calls)
        ]
        index = jnp.int32(step)
        out = [
            self.sample(params, to_mesh(p, self.policy.mesh), self.state.rng, index) for p in parts
        ]
        if len(out) == 1:
            return out[0]
        return to_mesh(
            jax.tree.map(lambda *x: np.concatenate(x), *map(to_host, out)), self.policy.mesh
        )

    def second_looks(self, rollout: RolloutBatch) -> tuple[Any, Any]:
        """The trainer's own old log-probs and the reference's, each only when asked for."""
        old = (
            self.logprobs(self.state.params, rollout)
            if self.config.rollout.recompute_logp
            else None
        )
        if self.reference is None:
            return old, None
        return old, self.logprobs(self.reference, rollout).logp

    def reward_progress(self, step: int) -> float:
        """Progress mu of the dynamic reward scale."""
        return min(1.0, step / (self.config.reward.progress_steps or self.steps))

    def samples(
        self, step: int, scored: ScoredBatch, scores: list[list[Score]], records: Any
    ) -> list[dict[str, Any]]:
        """The first response of the first few prompts, readable."""
        found = []
        for i, record in enumerate(records[: self.config.train.samples_per_step]):
            ids = scored.rollout.responses[i, 0, : int(scored.rollout.response_length[i, 0])]
            prompt = scored.rollout.prompt[i, : int(scored.rollout.prompt_length[i])]
            found.append(
                {"split": "train", "id": record.id, "prompt": self.policy.tokenizer.text(prompt),
                 "response": self.policy.tokenizer.text(ids), **dataclasses.asdict(scores[i][0])}
            )  # fmt: skip
        return found

    def flush(self) -> None:
        """Reads the pending step's metrics, stops on NaN, writes its lines."""
        if self.pending is None:
            return
        p, self.pending = self.pending, None
        values = {name: float(value) for name, value in p.metrics.items()}
        elapsed = (p.ended or time.monotonic()) - p.started
        if not (math.isfinite(values["update/loss"]) and math.isfinite(values["update/grad_norm"])):
            raise self.stopped(p, values)
        spent = sum(p.host[f"time/{part}"] for part in ("data", "rollout", "score"))
        values |= p.host | {
            "time/step": elapsed,
            "time/update": elapsed - spent,
            "time/tokens_per_second": p.host["rollout/tokens"] / elapsed,
            "time/elapsed": time.monotonic() - self.started,
        }
        if is_first_process():
            self.opened.write(p.step, values, p.samples)
            self.progress.update(p.step, values["reward/mean"], values["time/tokens_per_second"])

    def stopped(self, p: Pending, values: dict[str, float]) -> TrainingStopped:
        """Saves the batch; the last checkpoint is from before the step."""
        r = p.scored.rollout
        arrays = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)}
        arrays |= {"region": p.scored.region, "reward": p.scored.reward}
        return TrainingStopped(p.step, values, save_batch(self.opened.folder, p.step, arrays))

    def after(self, step: int, last: bool) -> None:
        """Evaluation and checkpoint, when due; both read the step's metrics first."""
        t = self.config.train
        if (last and step == self.steps) or (t.eval_every and step % t.eval_every == 0):
            self.flush()
            self.evaluate(step)
        if last or step % t.checkpoint_every == 0:
            self.flush()
            self.opened.save(step, self.state, self.batches.get_state())

    def evaluate(self, step: int) -> None:
        """Greedy rates on the held-out prompts, as a line of its own."""
        if self.evaluator is not None:
            params = self.cast(self.state.params)
            self.progress.message(self.evaluator.record(self.opened, step, params))


def truncated(rollout: RolloutBatch, stop_ids: tuple[int, ...]) -> float:
    """Share of the responses whose last token does not end the turn."""
    last = np.take_along_axis(rollout.responses, rollout.response_length[..., None] - 1, axis=-1)
    return float(np.mean(~np.isin(last, stop_ids)))


def reward_metrics(
    scores: list[list[Score]], targets: list[Target], progress: float
) -> dict[str, float]:
    """Means over the sampled answers of what the host found."""
    flat = [s for group in scores for s in group]
    spurious = [
        s.spurious for group, t in zip(scores, targets, strict=True) for s in group if not t.calls
    ]
    return {
        "reward/progress": progress,
        "reward/format_part": float(np.mean([s.format_part for s in flat])),
        "reward/correctness_part": float(np.mean([s.correctness_part for s in flat])),
        "reward/accuracy": float(np.mean([s.accuracy for s in flat])),
        "reward/exact": float(np.mean([s.exact for s in flat])),
        "reward/spurious": float(np.mean(spurious)) if spurious else 0.0,
    }
