"""Supervised runs (SFT, TSFT, RSFT): the loop of train.py without sampling. Same records, checkpoints, metrics, resumption."""

import contextlib
import dataclasses
import time

import jax
import numpy as np

from rest_jax.config import Config, check_supervised
from rest_jax.data.loader import Ahead, SupervisedBatch, sft_loader
from rest_jax.data.tokenize import Prepared, load_training, prepare_supervised
from rest_jax.distributed import activate, check_batch, gather, is_first_process, to_mesh
from rest_jax.errors import UserError
from rest_jax.evaluation.heldout import EvalExample, Evaluator, held_out, report_evaluations
from rest_jax.models.load import Policy
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.regions import label_tokens
from rest_jax.rl.step import init_state
from rest_jax.rl.supervised import GoldBatch, SupervisedConfig, make_supervised_step
from rest_jax.rollout.engine import rollout_cast
from rest_jax.run.folder import Run, TrainingStopped, check_start, not_finite, open_run, save_batch
from rest_jax.run.metrics import Progress
from rest_jax.run.policy import load_policy
from rest_jax.templates import TEMPLATES


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended. Both hold when SIGTERM came in the last evaluation or save, which the run brings to an end."""

    finished: bool  # the last step is done and saved
    stopped: bool  # SIGTERM was received: nothing else may be begun


def run(config: Config, dry_run: bool = False) -> int:
    """Trains; 0 at the end or after SIGTERM. UserError for input that cannot be used; TrainingStopped on NaN."""
    complete(config, dry_run)
    return 0


def complete(config: Config, dry_run: bool = False) -> Ending:
    """`run` that tells how it ended."""
    check_supervised(config)
    policy = load_policy(config.model, config.mesh)
    check_batch("sft.batch_size", config.sft.batch_size, policy.mesh)
    records = load_training(config.data)
    template = TEMPLATES[config.data.template]
    data = prepare_supervised(
        records, policy.tokenizer, template, config.data, config.sft.max_tokens
    )
    if data.size < config.sft.batch_size:
        raise UserError(
            f"data.train: {data.size} records, fewer than sft.batch_size {config.sft.batch_size}"
        )
    epochs = config.train.epochs
    steps = config.train.steps or int(data.size // config.sft.batch_size * epochs)
    if steps == 0:
        raise UserError(f"train.epochs {epochs}: less than one step of {data.size} records")
    held = held_out(config, policy)
    check_start(config, policy.mesh)
    if is_first_process():
        print(
            f"{config.name}: {data.summary()}\n{steps} steps of {config.sft.batch_size} records",
            flush=True,
        )
    if dry_run:
        return Ending(finished=False, stopped=False)
    with contextlib.closing(open_run(config, policy.files)) as opened, activate(policy.mesh):
        loop = Loop(config, policy, data, held, steps, opened)
        with contextlib.closing(loop.batches):
            last = loop.run()
    # Read when the last checkpoint is whole: until then SIGTERM is caught, and no other one will tell of it.
    return Ending(finished=last == steps, stopped=opened.stop.agreed())


class Loop:
    """The compiled function and the state of one supervised run. A resource of `run`."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        data: Prepared,
        held: list[EvalExample],
        steps: int,
        opened: Run,
    ):
        self.config, self.policy, self.steps, self.opened = config, policy, steps, opened
        self.template = TEMPLATES[config.data.template]
        tx = make_optimizer(config.optimizer, steps)
        schedule = Schedule(config.weights, config.curriculum, steps)
        self.state, self.abstract, shardings = init_state(policy, tx, schedule, config.seed)
        step_config = SupervisedConfig(
            config.sft, config.train.max_tokens_per_microbatch, config.loss.vocab_chunk
        )
        self.train_step = make_supervised_step(
            policy.decoder, tx, step_config, policy.mesh, shardings
        )
        self.cast = rollout_cast(policy)
        self.evaluator = Evaluator.of(config, policy, held)
        self.batches = Ahead(
            sft_loader(
                data,
                batch_size=config.sft.batch_size,
                seed=config.seed,
                pad_id=policy.tokenizer.pad_id,
                cfg=config.data,
                num_steps=steps,
            )
        )
        self.pending: tuple[int, dict[str, jax.Array], GoldBatch, float] | None = None

    def run(self) -> int:
        """From the newest checkpoint, or from the start, to the end, or to SIGTERM; the last step that is done."""
        self.state, loader_state, start = self.opened.resume(self.state, self.abstract)
        self.policy = dataclasses.replace(self.policy, params=self.state.params)
        if loader_state is not None:
            self.batches.set_state(loader_state)
        self.progress, self.started = Progress(self.steps, start), time.monotonic()
        if start == 0 and self.config.train.eval_before:
            self.evaluate(0)
        step = start
        for step in range(start + 1, self.steps + 1):
            started = time.monotonic()
            batch, _ = self.batches.take()
            lengths = gather((batch.prompt_length, batch.response_length))
            gold = to_mesh(self.labelled(batch), self.policy.mesh)
            self.state, metrics = self.train_step(self.state, gold, lengths)
            self.flush()
            self.pending = (step, metrics, gold, started)
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
        return step

    def labelled(self, batch: SupervisedBatch) -> GoldBatch:
        """Adds the region of every answer token."""
        tokenizer = self.policy.tokenizer
        ids, length = batch.responses[:, 0], batch.response_length[:, 0]
        text = length - 1  # the last token is the end of the turn
        answers = [
            self.template.parse(tokenizer.bytes_of(row[:n]))
            for row, n in zip(ids, text, strict=True)
        ]
        region = label_tokens(answers, tokenizer.piece_lengths[ids], text, np.ones(len(ids), bool))
        return GoldBatch(
            prompt=batch.prompt,
            prompt_length=batch.prompt_length,
            responses=batch.responses,
            response_length=batch.response_length,
            region=region[:, None],
        )

    def flush(self) -> None:
        """Reads the pending step's metrics, stops on NaN, writes its line."""
        if self.pending is None:
            return
        (step, metrics, gold, started), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if not_finite(values):
            arrays = {f.name: getattr(gold, f.name) for f in dataclasses.fields(gold)}
            raise TrainingStopped(step, values, save_batch(self.opened.folder, step, arrays))
        now = time.monotonic()
        values |= {
            "time/step": now - started,
            "time/tokens_per_second": values["update/tokens"] / (now - started),
            "time/elapsed": now - self.started,
        }
        if is_first_process():
            self.opened.write(step, values)
            self.progress.update(
                step, values["update/loss"], values["time/tokens_per_second"], "loss"
            )

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
