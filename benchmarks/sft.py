"""Times a supervised step: weights of the tokens, packed rows, forward, backward and AdamW.

Everything that `rest-jax sft` does with a batch is in it but reading it and labelling its regions. Records are random tokens
of given lengths; tokens = those of prompts and targets.
"""

import argparse
import typing

import jax
import numpy as np

from benchmarks import policies, update
from benchmarks.cases import SFT_RECORDS
from benchmarks.process import Work, positive
from benchmarks.rollout import add_dtype
from rest_jax.config import LossConfig, SftConfig
from rest_jax.distributed import activate, to_mesh
from rest_jax.models.config import Remat
from rest_jax.rl.packing import BatchLengths
from rest_jax.rl.step import abstract_state, init_state, plan_all_groups
from rest_jax.rl.supervised import GoldBatch, make_prepare_gold, make_supervised_update
from rest_jax.run.throughput import update_flops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the case."""
    parser.add_argument("--model", default="model-a", help="model-a, a preset, or an HF folder")
    parser.add_argument("--vocab", type=positive, help="of a random model")
    add_dtype(parser)
    text = "lengths of prompts and targets, as 536+235,500+371"
    parser.add_argument("--records", type=read_records, default=SFT_RECORDS, help=text)
    parser.add_argument("--remat", choices=typing.get_args(Remat), default=update.REMAT)


def read_records(text: str) -> tuple[tuple[int, int], ...]:
    """(prompt, target) of every record."""
    pairs = tuple(tuple(map(positive, record.split("+"))) for record in text.split(","))
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text}: lengths as PROMPT+TARGET,PROMPT+TARGET")
    return pairs  # type: ignore[return-value]


def make_work(args: argparse.Namespace) -> Work:
    """A call is one step."""
    policy = policies.load(args.model, args.vocab, args.remat, args.dtype)
    gold, tx, mesh = (
        random_batch(policy.config.vocab_size, args.records),
        update.optimizer(),
        policy.mesh,
    )
    widths = (gold.prompt.shape[1], gold.responses.shape[2])
    lengths = BatchLengths(gold.prompt_length, gold.response_length, widths)
    with activate(mesh):
        schedule = update.step_config(1).schedule
        _, shardings = abstract_state(policy, tx, schedule)
        state = init_state(policy, tx, schedule, 0, shardings)
    prepare = make_prepare_gold(SftConfig(), mesh)
    step = make_supervised_update(policy.decoder, tx, LossConfig(), mesh, shardings)

    def call(_: int) -> None:
        nonlocal state
        with activate(mesh):
            batch = prepare(to_mesh(gold, mesh))
            state = step(state, batch, plan_all_groups(lengths, None, mesh))[0]
            jax.block_until_ready(state)

    flops = update_flops(policy.config, lengths.prompt_length, lengths.response_length)
    return Work(call, sum(map(sum, args.records)), flops)


def random_batch(vocab: int, records: tuple[tuple[int, int], ...]) -> GoldBatch:
    """Random tokens and regions in records of these lengths, each padded to its longest."""
    rng = np.random.default_rng(0)
    prompt, target = np.array(records, np.int32).T
    shape = (len(records), 1, target.max())
    return GoldBatch(
        prompt=rng.integers(1, vocab, (len(records), prompt.max())).astype(np.int32),
        prompt_length=prompt,
        responses=rng.integers(1, vocab, shape).astype(np.int32),
        response_length=target[:, None],
        region=rng.integers(1, 8, shape).astype(np.int8),
    )
