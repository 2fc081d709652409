"""Times a rollout: random prompts, `group` responses each, with log-probs, entropies and Gini as training needs them.

--lengths FILE: a JSON list with the length of every response, group after group; `decode-slots` of them are decoded at once,
and a slot takes the next response as soon as its own has ended. tokens = those sampled.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

from benchmarks import policies
from benchmarks.process import Work, positive
from rest_jax.distributed import activate
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.scheduler import Sampler
from rest_jax.run.throughput import rollout_flops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the case."""
    parser.add_argument("--model", default="model-a", help="model-a, a preset, or an HF folder")
    parser.add_argument("--vocab", type=positive, help="of a random model")
    add_dtype(parser)
    parser.add_argument("--prompts", type=positive, default=2)
    parser.add_argument("--group", type=positive, default=8, help="responses to a prompt")
    parser.add_argument("--prompt-tokens", type=positive, default=128)
    parser.add_argument("--new-tokens", type=positive, default=128)
    add_decode_slots(parser)
    parser.add_argument("--lengths", type=read_lengths, metavar="FILE")


def add_decode_slots(parser: argparse.ArgumentParser) -> None:
    """The argument --decode-slots."""
    text = "responses decoded at once"
    parser.add_argument("--decode-slots", type=positive, default=128, help=text)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The argument --dtype."""
    kinds = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=kinds, default=kinds[0], help="of the computation")


def read_lengths(path: str) -> np.ndarray:
    """The list of positive response lengths in a JSON file."""
    try:
        lengths = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    valid = isinstance(lengths, list) and all(type(n) is int and n > 0 for n in lengths)
    if not valid or not lengths:
        raise argparse.ArgumentTypeError(f"{path}: a JSON list of positive integers is needed")
    return np.array(lengths, np.int32)


def make_work(args: argparse.Namespace) -> Work:
    """A call is one rollout; weights are in the rollout layout beforehand."""
    lengths = response_lengths(args)
    policy = policies.load(args.model, args.vocab, dtype=args.dtype)
    prompts = policies.random_prompts(policy, len(lengths), args.prompt_tokens)
    sampler = policies.sampler_of(policy, lengths.shape[1], int(lengths.max()), args.decode_slots)
    with activate(policy.mesh):
        params = rollout_cast(policy)(policy.params)

    def call(number: int) -> None:
        with activate(policy.mesh):
            out = sampler(params, prompts, jax.random.key(1), number, limits=lengths)
        if (out.response_length != lengths).any():
            raise ValueError("a response did not run to its length")

    flops = rollout_flops(policy.config, prompts.length, lengths)  # type: ignore[arg-type]
    return Work(call, int(lengths.sum()), flops, lambda: utilisation(sampler))


def response_lengths(args: argparse.Namespace) -> np.ndarray:
    """[P, G]: the tokens of each response. ValueError when the file does not hold complete groups."""
    if args.lengths is None:
        return np.full((args.prompts, args.group), args.new_tokens, np.int32)
    if len(args.lengths) % args.group:
        raise ValueError(f"{len(args.lengths)} lengths are not complete groups of {args.group}")
    return args.lengths.reshape(-1, args.group)


def utilisation(sampler: Sampler) -> dict[str, float]:
    """What the decode slots did in the last rollout."""
    stats = sampler.stats
    return {"decode_slot_utilisation": stats.utilisation, "decode_calls": stats.calls}
