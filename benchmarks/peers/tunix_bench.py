"""Time one rollout, update or GRPO step of google-tunix on a small random Qwen3 model.

In:  a case and its sizes on the command line; run it with an interpreter that has google-tunix.
Out: one JSON line on stdout with the tokens of one call, the median CPU and wall seconds of a
     call, tokens per CPU second, the peak resident bytes and the warm-up seconds. Everything
     else goes to stderr. The caller pins the process to a core.

rollout  tunix's own Sampler, called as its VanillaRollout calls it (temperature 1, top_p 1, no
         log-probs). The prompts are fixed ids behind a stub tokenizer whose decode is free; the
         pad and eos ids lie outside the vocabulary, so every row runs to its full length. The
         KV cache holds exactly prompt + new tokens unless --cache-size says otherwise.
         tokens = rows * new_tokens.

rollout --lengths FILE   FILE is a JSON list of response lengths. A static-batch sampler frees no
         row before all of the batch is done, so the responses run in batches of --rows in the
         given order and each batch decodes max(lengths in the batch) steps: that is what this
         peer pays for uneven lengths. An eos cannot be scheduled with random weights, so the
         stop is set on the sampler's own loop bound, which is not compiled in. The token buffer
         and cache, which are, are rounded up to a multiple of 64 steps to bound the number of
         compilations (one sampler for each size, compiled in the warm-up); the steps run are
         not rounded. A last batch that is short is filled up with idle rows, to the same end.
         tokens = sum(lengths).

update   tunix's rl Trainer.train on one batch, with its registered "grpo" loss set up as its
         GRPOLearner does (beta 0, so no reference model; one iteration, so the old log-probs
         are the stopped gradient of the new), optax.adamw, float32, remat as its model config
         defaults (none). tokens = rows * (prompt_tokens + response_tokens).

step     a rollout, a trivial reward, tunix's group advantages, and an update on what was
         sampled, with the new weights handed back to the sampler.
         tokens = rows * (prompt_tokens + response_tokens).
"""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import resource
import statistics
import sys
import time

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.generate import sampler as sampler_lib
from tunix.models.qwen3 import model as qwen3
from tunix.rl import algo_core, function_registry
from tunix.rl import trainer as trainer_lib
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer

BUCKET = 64


class StubTokenizer:
    """Map the prompt strings "0", "1", ... to fixed ids; pad and eos are never sampled."""

    def __init__(self, prompts, vocab):
        self._prompts = [row.tolist() for row in prompts]
        self._vocab = vocab

    def encode(self, text):
        return self._prompts[int(text)]

    def decode(self, ids):
        return ""

    def bos_id(self):
        return 0

    def pad_id(self):
        return self._vocab

    def eos_id(self):
        return self._vocab + 1


class StoppingSampler(sampler_lib.Sampler):
    """A Sampler whose decoding loop ends after stop_after new tokens, as if all had met eos."""

    stop_after = None

    def init_sample_state(self, all_input_ids, **kwargs):
        state = super().init_sample_state(all_input_ids, **kwargs)
        if self.stop_after is None:
            return state
        return state.replace(total_sampling_steps=all_input_ids.shape[1] + self.stop_after)


def build_model(vocab, seed):
    """Return model A with random weights (tunix initialises the MLP kernels to zero)."""
    config = qwen3.ModelConfig(
        num_layers=4,
        vocab_size=vocab,
        embed_dim=256,
        hidden_dim=768,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(seed))
    keys = jax.random.split(jax.random.PRNGKey(seed), 3)
    for layer in model.layers:
        for key, name in zip(keys, ("gate_proj", "up_proj", "down_proj"), strict=True):
            kernel = getattr(layer.mlp, name).kernel
            kernel[...] = 0.02 * jax.random.normal(key, kernel.shape, kernel.dtype)
    return model


def make_prompts(args):
    """Return rows x prompt_tokens ids: rows / group random prompts, each repeated group times."""
    rng = np.random.default_rng(args.seed)
    shape = (args.rows // args.group, args.prompt_tokens)
    distinct = rng.integers(1, args.vocab, shape, dtype=np.int32)
    return np.repeat(distinct, args.group, axis=0)


def make_sampler(model, prompts, args, new_tokens):
    """Return a sampler for prompts + new_tokens, with the smallest cache that holds them."""
    config = model.config
    cache = sampler_lib.CacheConfig(
        cache_size=args.cache_size or args.prompt_tokens + new_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    return StoppingSampler(model, StubTokenizer(prompts, args.vocab), cache)


def sample(sampler, args, new_tokens, seed):
    """Sample new_tokens for every row and return the sampler's output."""
    return sampler(
        [str(row) for row in range(args.rows)],
        max_generation_steps=new_tokens,
        max_prompt_length=args.prompt_tokens,
        echo=False,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        seed=seed,
        pad_output=False,
    )


def rollout_case(args):
    """Return (tokens, call) for a rollout in which every row has the same length."""
    model, prompts = build_model(args.vocab, args.seed), make_prompts(args)
    sampler = make_sampler(model, prompts, args, args.new_tokens)

    def call(seed):
        output = sample(sampler, args, args.new_tokens, seed)
        check_lengths(output.tokens, [args.new_tokens] * args.rows)

    return args.rows * args.new_tokens, call


def check_lengths(tokens, lengths):
    """Raise if a row came back shorter than asked for."""
    for row, length in zip(tokens, lengths, strict=False):
        if len(row) < length:
            raise ValueError(f"a row stopped after {len(row)} of {length} tokens")


def lengths_case(args, lengths):
    """Return (tokens, call) for a rollout in static batches over uneven response lengths."""
    model, prompts = build_model(args.vocab, args.seed), make_prompts(args)
    batches = [lengths[i : i + args.rows] for i in range(0, len(lengths), args.rows)]
    sizes = [-(-max(batch) // BUCKET) * BUCKET for batch in batches]
    samplers = {size: make_sampler(model, prompts, args, size) for size in set(sizes)}
    for size, sampler in samplers.items():
        sampler.stop_after = 1
        sample(sampler, args, size, args.seed)

    def call(seed):
        for i, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            samplers[size].stop_after = max(batch)
            output = sample(samplers[size], args, size, seed + i)
            check_lengths(output.tokens, batch)

    return sum(lengths), call


def make_trainer(model, args):
    """Return tunix's RL trainer with its GRPO loss, set up as GRPOLearner sets it up."""
    config = grpo_learner.GRPOConfig(num_generations=args.group, num_iterations=1, beta=0.0)
    config.temperature = 1.0
    loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)
    trainer = trainer_lib.Trainer(
        model,
        optax.adamw(args.learning_rate),
        peft_trainer.TrainingConfig(eval_every_n_steps=sys.maxsize),
        custom_checkpoint_metadata_fn=dict,
    )
    trainer.is_managed_externally = True
    pad, eos = args.vocab, args.vocab + 1
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=config, pad_id=pad, eos_id=eos
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
    trainer.with_rl_metrics_to_log({"kl": np.mean, "pg_clipfrac": np.mean})
    return trainer


def make_example(prompts, completions, rewards, args):
    """Return the training example GRPOLearner would build, with tunix's group advantages."""
    advantages = algo_core.compute_advantages(rewards, args.group)
    return grpo_learner.TrainExample(
        prompt_ids=jnp.asarray(prompts),
        prompt_mask=jnp.ones(prompts.shape, bool),
        completion_ids=jnp.asarray(completions),
        completion_mask=jnp.ones(completions.shape, bool),
        advantages=jnp.asarray(advantages, jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )


def train(trainer, example):
    """Run one update to its end, the new weights included."""
    trainer.train([example])
    jax.block_until_ready(nnx.state(trainer.model, nnx.Param))


def reward(completions):
    """Return a trivial reward for each row: the share of even tokens."""
    return (completions % 2 == 0).mean(axis=1)


def update_case(args):
    """Return (tokens, call) for one update on a fixed batch."""
    prompts = make_prompts(args)
    rng = np.random.default_rng(args.seed + 1)
    shape = (args.rows, args.response_tokens)
    completions = rng.integers(1, args.vocab, shape, dtype=np.int32)
    trainer = make_trainer(build_model(args.vocab, args.seed), args)
    example = make_example(prompts, completions, reward(completions), args)
    tokens = args.rows * (args.prompt_tokens + args.response_tokens)
    return tokens, lambda seed: train(trainer, example)


def step_case(args):
    """Return (tokens, call) for a rollout followed by an update on its samples."""
    model, prompts = build_model(args.vocab, args.seed), make_prompts(args)
    sampler = make_sampler(model, prompts, args, args.new_tokens)
    trainer = make_trainer(model, args)

    def call(seed):
        completions = np.stack(sample(sampler, args, args.new_tokens, seed).tokens)
        train(trainer, make_example(prompts, completions, reward(completions), args))
        sampler.transformer_state = nnx.variables(trainer.model, nnx.Param)

    return args.rows * (args.prompt_tokens + args.new_tokens), call


def build_case(args):
    """Return (tokens, call) of the case asked for."""
    if args.lengths is not None:
        return lengths_case(args, args.lengths)
    cases = {"rollout": rollout_case, "update": update_case, "step": step_case}
    return cases[args.case](args)


def measure(args):
    """Warm the case up, time its calls, and return the record to print."""
    start = time.perf_counter()
    tokens, call = build_case(args)
    call(args.seed)
    warmup = time.perf_counter() - start
    cpu, wall = [], []
    for repeat in range(args.repeats):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        call(args.seed + 1 + repeat)
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    cpu_seconds = statistics.median(cpu)
    return {
        "peer": "tunix " + importlib.metadata.version("google-tunix"),
        "case": args.case,
        "tokens": tokens,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": statistics.median(wall),
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "warmup_seconds": warmup,
    }


def read_lengths(path):
    """Return the list of positive response lengths in a JSON file."""
    try:
        lengths = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    valid = isinstance(lengths, list) and all(type(n) is int and n > 0 for n in lengths)
    if not valid or not lengths:
        raise argparse.ArgumentTypeError(f"{path}: a JSON list of positive integers is needed")
    return lengths


def parse_args():
    """Return the checked arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("rollout", "update", "step"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="rows that share a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, help="default: --response-tokens, or 128")
    parser.add_argument("--response-tokens", type=int, help="default: --new-tokens, or 128")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--cache-size", type=int, help="default: prompt + new tokens")
    parser.add_argument("--lengths", type=read_lengths, metavar="FILE", help="rollout only")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.new_tokens = args.new_tokens or args.response_tokens or 128
    args.response_tokens = args.response_tokens or args.new_tokens
    problem = find_problem(args)
    if problem:
        parser.error(problem)
    return args


def find_problem(args):
    """Return what is wrong with the arguments, or None."""
    sizes = (args.rows, args.group, args.prompt_tokens, args.new_tokens, args.response_tokens)
    if min(*sizes, args.repeats) < 1 or args.vocab < 2:
        return "sizes and --repeats must be positive, --vocab at least 2"
    if args.group < 2 or args.rows % args.group:
        return "--group must be at least 2 and divide --rows"
    if args.case == "step" and args.new_tokens != args.response_tokens:
        return "a step trains on what it samples: --new-tokens and --response-tokens must agree"
    if args.lengths is not None and args.case != "rollout":
        return "--lengths is for the rollout only"
    return None


def main():
    """Run the case and print its record; report a failure in one line."""
    args = parse_args()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            record = measure(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"tunix_bench: {str(error).splitlines()[0]}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
