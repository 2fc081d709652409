"""Time GRPO steps of TRL's GRPOTrainer on the CPU: sampling, reward and update.

In:  sizes on the command line; run it with an interpreter that has trl. --model is a Hugging Face
     folder, or "model-a" for a small random Qwen3, as in torch_bench.py.
Out: one JSON line on stdout with the tokens of one step, the median CPU and wall seconds of a
     step, tokens per CPU second, the peak resident bytes and the warm-up seconds. Everything
     else goes to stderr. The caller pins the process to its cores.

step  from the trainer's on_step_begin to its on_step_end: transformers' generate, the reward (the
      share of even tokens), group advantages, forward, backward and AdamW. Loading batches, what
      lies between steps and the first step, the warm-up, are left out; nothing is logged or saved.
      loss_type "grpo", beta 0 (no reference model), one iteration (the old log-probs are the new
      ones detached), float32, no gradient checkpointing. Prompts are random ids, written as words
      of a tokenizer whose words are the ids; eos lies outside the vocabulary, so that every row
      runs to its full length. tokens = rows * (prompt_tokens + response_tokens).
"""

import argparse
import os
import resource
import statistics
import tempfile
import time

import datasets
import tokenizers
import torch
import torch_bench
import transformers
import trl


def make_tokenizer(vocab):
    """Return a tokenizer whose words are the ids of the vocabulary; pad and eos lie outside it."""
    words = {str(i): i for i in range(vocab)} | {"pad": vocab, "eos": vocab + 1}
    model = tokenizers.models.WordLevel(words, unk_token="pad")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="pad", eos_token="eos", padding_side="left"
    )


def make_dataset(vocab, args):
    """Return rows / group random prompts for every step."""
    steps = args.repeats + 1
    ids = torch.randint(1, vocab, (steps * args.rows // args.group, args.prompt_tokens))
    prompts = [" ".join(map(str, row)) for row in ids.tolist()]
    return datasets.Dataset.from_dict({"prompt": prompts})


def make_reward(args):
    """Return the reward: the share of even tokens of each completion, all of which are complete."""

    def reward(completion_ids, **_):
        if any(len(ids) != args.response_tokens for ids in completion_ids):
            raise ValueError("a completion did not run to its length")
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    return reward


class Timer(transformers.TrainerCallback):
    """Note CPU and wall seconds at the start and at the end of every step."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *_, **__):
        """Start a step."""
        self.steps.append([(time.process_time(), time.perf_counter())])

    def on_step_end(self, *_, **__):
        """End it."""
        self.steps[-1].append((time.process_time(), time.perf_counter()))

    def seconds(self):
        """Return the CPU seconds and the wall seconds of the steps."""
        return [[end[i] - begin[i] for begin, end in self.steps] for i in range(2)]


def make_config(args, folder):
    """Return the trainer's settings."""
    micro = args.micro_rows or args.rows
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        torch_compile=args.compile,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=args.rows // micro,
        num_generations=args.group,
        max_completion_length=args.response_tokens,
        generation_kwargs={"eos_token_id": None},
        cache_implementation=None if args.cache == "dynamic" else args.cache,
        use_transformers_continuous_batching=args.cache == "paged",
        temperature=1.0,
        loss_type="grpo",
        beta=0.0,
        num_iterations=1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        max_steps=args.repeats + 1,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )


def measure(args):
    """Train for the repeats after one step of warm-up and return the record to print."""
    start = time.perf_counter()
    model = torch_bench.load_model(args)
    vocab, timer = model.config.vocab_size, Timer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model,
            reward_funcs=make_reward(args),
            args=make_config(args, folder),
            train_dataset=make_dataset(vocab, args),
            processing_class=make_tokenizer(vocab),
            callbacks=[timer],
        )
        trainer.train()
    cpu, wall = timer.seconds()
    warmup = timer.steps[0][1][1] - start
    tokens = args.rows * (args.prompt_tokens + args.response_tokens)
    cpu_seconds = statistics.median(cpu[1:])
    return {
        "peer": f"trl {trl.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        "case": args.case,
        "tokens": tokens,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": statistics.median(wall[1:]),
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "warmup_seconds": warmup,
    }


def parse_args():
    """Return the checked arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("step",))
    parser.add_argument("--model", default="model-a", help="a model folder, or model-a")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="rows that share a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192, help="model-a only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=("dynamic", "static", "paged"), default="dynamic")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the update")
    parser.add_argument("--micro-rows", type=int, help="rows of a micro-batch; default: all")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(device="cpu", dtype="float32", random_weights=False, requests=None)
    args = parser.parse_args()
    args.response_tokens, args.checkpointing, args.records = args.new_tokens, False, None
    problem = torch_bench.find_problem(args)
    if problem is None and args.rows % (args.micro_rows or args.rows):
        problem = "--micro-rows must divide --rows"
    if problem:
        parser.error(problem)
    return args


def main():
    """Run the steps."""
    torch_bench.run("trl_bench", measure, parse_args())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
