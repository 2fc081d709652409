"""Time one rollout, update, GRPO step or supervised step of PyTorch and transformers, on the CPU or a GPU.

In:  a case and its sizes on the command line; --model is a Hugging Face folder, or "model-a"
     for a small random Qwen3; with --random-weights the folder needs its config.json alone.
     --dtype bfloat16: a rollout has weights of it; updates compute in it (autocast) with weights
     and AdamW in float32.
Out: one JSON line on stdout with the tokens of one call, the median CPU and wall seconds of a
     call, tokens per CPU second, the peak resident bytes and the warm-up seconds. Everything
     else goes to stderr. The caller pins the process to its cores.

rollout  transformers' generate in inference mode: plain sampling at temperature 1, no eos, so
         every row runs to its full length. rows / group random prompts are repeated group times
         each; generate shares no prefill between the copies. tokens = rows * new_tokens.

update   a plain GRPO update on rows of prompt + response: logits of the response positions only,
         their log-probs, the ratio to the old log-probs (one update to a batch, so the old ones
         are the new ones detached), clipped loss, token mean, backward, fused AdamW. float32.
         tokens = rows * (prompt_tokens + response_tokens).

step     a rollout, a trivial reward, group advantages, and an update on what was sampled.
         tokens = rows * (prompt_tokens + response_tokens).

sft      a supervised step as a plain training loop makes it: records padded at the right to the
         longest, the model's own loss with the labels of prompts and padding left out, backward,
         clipped gradient, fused AdamW. --records are lengths of prompts and targets, as
         536+235,500+371. --logits targets: only the positions that have a label meet the head.
         No attention mask, which would make attention slower: what is padded at the right is
         seen by nothing that has a label. tokens = those of the records.

serve    what `transformers serve` does with the requests that wait, without its HTTP: one generate
         at a time, greedy. --requests is a file of prompts and stop ids; every call takes the next
         `rows` of them. answers = digests of the ids that the last call drew. tokens = those asked
         for; few answers end before, and on both sides.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
import transformers

CLIP = 0.2


def load_model(args, dtype=torch.float32):
    """Return the model on its device, with every generation default cleared."""
    torch.set_default_device(args.device)
    if args.model == "model-a":
        model = transformers.Qwen3ForCausalLM(model_a_config(args.vocab))
    elif args.random_weights:
        config = transformers.AutoConfig.from_pretrained(args.model, local_files_only=True)
        config.dtype = torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config)
    elif pathlib.Path(args.model, "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, local_files_only=True
        )
    else:
        raise ValueError(f"{args.model}: neither model-a nor a folder with a config.json")
    model.generation_config = transformers.GenerationConfig()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(args.device, dtype).train()


def model_a_config(vocab):
    """Return the configuration of model A."""
    return transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def make_prompts(model, args):
    """Return rows x prompt_tokens ids: rows / group random prompts, each repeated group times."""
    shape = (args.rows // args.group, args.prompt_tokens)
    return torch.randint(1, model.config.vocab_size, shape).repeat_interleave(args.group, dim=0)


def generation_config(args):
    """Return the settings of plain sampling to a fixed length."""
    return transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.new_tokens,
        min_new_tokens=None,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
        cache_implementation=None if args.cache == "dynamic" else args.cache,
    )


def sample(model, prompts, args):
    """Return rows of prompt + sampled tokens."""
    model.eval()
    with torch.inference_mode():
        rows = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=generation_config(args),
        )
    model.train()
    if rows.shape[1] != args.prompt_tokens + args.new_tokens:
        raise ValueError(f"rows of {rows.shape[1]} tokens came back")
    return rows.clone()


def response_logprobs(model, rows, response, args):
    """Return the log-probs of the last `response` tokens of every row."""
    with torch.autocast(rows.device.type, torch.bfloat16, args.dtype == "bfloat16"):
        logits = model(rows, use_cache=False, logits_to_keep=response + 1).logits[:, :-1]
    targets = rows[:, -response:]
    return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(
        targets.shape
    )


def clipped_loss(logprobs, advantages):
    """Return the summed clipped surrogate loss."""
    ratio = torch.exp(logprobs - logprobs.detach())
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def group_advantages(rewards, group):
    """Return the rewards standardised within each group."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    return (centred / (grouped.std(dim=1, keepdim=True) + 1e-6)).flatten()


def update(model, optimizer, rows, args):
    """Make one GRPO update on the rows, in micro-batches."""
    response = args.response_tokens
    rewards = (rows[:, -response:] % 2 == 0).float().mean(dim=1)
    advantages = group_advantages(rewards, args.group)
    optimizer.zero_grad(set_to_none=True)
    micro = args.micro_rows or args.rows
    for part, share in zip(rows.split(micro), advantages.split(micro), strict=True):
        loss = clipped_loss(response_logprobs(model, part, response, args), share)
        (loss / (args.rows * response)).backward()
    optimizer.step()


def make_optimizer(model, args):
    """Return the fused AdamW over all weights."""
    return torch.optim.AdamW(model.parameters(), lr=args.learning_rate, fused=True)


def rollout_case(args):
    """Return (tokens, call) for a rollout."""
    model = load_model(args, getattr(torch, args.dtype))
    prompts = make_prompts(model, args)
    return args.rows * args.new_tokens, lambda: sample(model, prompts, args)


def update_case(args):
    """Return (tokens, call) for an update on a fixed batch."""
    model = load_model(args)
    prompts = make_prompts(model, args)
    responses = torch.randint(1, model.config.vocab_size, (args.rows, args.response_tokens))
    rows = torch.cat([prompts, responses], dim=1)
    optimizer = make_optimizer(model, args)
    return rows.numel(), lambda: update(model, optimizer, rows, args)


def step_case(args):
    """Return (tokens, call) for a rollout followed by an update on its samples."""
    model = load_model(args)
    prompts = make_prompts(model, args)
    optimizer = make_optimizer(model, args)
    tokens = args.rows * (args.prompt_tokens + args.response_tokens)
    return tokens, lambda: update(model, optimizer, sample(model, prompts, args), args)


def read_records(text):
    """Return the (prompt, target) lengths of records written as 536+235,500+371."""
    records = [tuple(map(int, record.split("+"))) for record in text.split(",")]
    if any(len(record) != 2 or min(record) < 1 for record in records):
        raise ValueError(text)
    return records


def supervised_loss(model, rows, target, logits):
    """Return the mean loss of the tokens marked in `target`."""
    if logits == "all":
        return model(rows, labels=rows.masked_fill(~target, -100), use_cache=False).loss
    hidden = model.model(rows, use_cache=False).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[target[:, 1:]]), rows[:, 1:][target[:, 1:]])


def sft_case(args):
    """Return (tokens, call) for a supervised step on a fixed batch."""
    model = load_model(args)
    lengths = torch.tensor(args.records)
    longest = int(lengths.sum(dim=1).max())
    rows = torch.randint(1, model.config.vocab_size, (len(lengths), longest))
    at = torch.arange(longest)
    target = (at >= lengths[:, :1]) & (at < lengths.sum(dim=1, keepdim=True))
    optimizer = make_optimizer(model, args)

    def call():
        optimizer.zero_grad(set_to_none=True)
        supervised_loss(model, rows, target, args.logits).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return int(lengths.sum()), call


def serve_case(args):
    """Return (tokens, call) for the next requests of a file, one after the other."""
    model = load_model(args).eval()
    made = json.loads(args.requests.read_text())
    waiting, config = iter(made["requests"]), generation_config(args)
    config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
    config.eos_token_id = made["stop_ids"]

    def answer(ids):
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        rows = model.generate(prompt, attention_mask=mask, generation_config=config)
        drawn = json.dumps(rows[0, len(ids) :].tolist())
        return hashlib.sha256(drawn.encode()).hexdigest()[:8]

    def call():
        with torch.inference_mode():
            return {"answers": [answer(next(waiting)["ids"]) for _ in range(args.rows)]}

    return args.rows * args.new_tokens, call


def finish(args):
    """Wait for what the device has still to do."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure(args):
    """Warm the case up, time its calls, and return the record to print."""
    cases = {"rollout": rollout_case, "update": update_case, "step": step_case, "sft": sft_case}
    cases["serve"] = serve_case
    start = time.perf_counter()
    tokens, call = cases[args.case](args)
    call()
    finish(args)
    warmup = time.perf_counter() - start
    cpu, wall = [], []
    for _ in range(args.repeats):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        made = call()
        finish(args)
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    cpu_seconds = statistics.median(cpu)
    return {
        "peer": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "case": args.case,
        "tokens": tokens,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": statistics.median(wall),
        "tokens_per_second": tokens / statistics.median(wall),
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "warmup_seconds": warmup,
        **(made if args.case == "serve" else {}),
    }


def parse_args():
    """Return the checked arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("rollout", "update", "step", "sft", "serve"))
    parser.add_argument("--model", default="model-a", help="a model folder, or model-a")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="rows that share a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, help="default: --response-tokens, or 128")
    parser.add_argument("--response-tokens", type=int, help="default: --new-tokens, or 128")
    parser.add_argument("--random-weights", action="store_true", help="of the folder's config")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--vocab", type=int, default=8192, help="model-a only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--micro-rows", type=int, help="rows of a micro-batch; default: all")
    parser.add_argument("--records", type=read_records, help="sft only; lengths of its records")
    parser.add_argument("--requests", type=pathlib.Path, help="serve only; a file of prompts")
    parser.add_argument("--logits", choices=("all", "targets"), default="all", help="sft only")
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
    counts = (args.threads, args.repeats, args.micro_rows or 1)
    if min(*sizes, *counts) < 1 or args.vocab < 2:
        return "sizes, --threads and --repeats must be positive, --vocab at least 2"
    if args.group < 2 or args.rows % args.group:
        return "--group must be at least 2 and divide --rows"
    if (args.case == "sft") != (args.records is not None):
        return "--records are those of sft, which needs them"
    if (args.case == "serve") != (args.requests is not None):
        return "--requests are those of serve, which needs them"
    if args.case == "step" and args.new_tokens != args.response_tokens:
        return "a step trains on what it samples: --new-tokens and --response-tokens must agree"
    return None


def run(name, measure, args):
    """Print the record that `measure` makes; report a failure of the program `name` in one line."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            record = measure(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{name}: {str(error).splitlines()[0]}")
    print(json.dumps(record))


def main():
    """Run the case."""
    run("torch_bench", measure, parse_args())


if __name__ == "__main__":
    main()
