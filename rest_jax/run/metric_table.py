"""The one table of metric names: what `metrics.MetricsWriter` may write, with unit and meaning.

Prefixes: data, reward, rollout, update, region/<name>, curriculum, eval (held-out prompts, greedy), time (wall clock:
the only values that may differ between two runs of one config and seed).
"""

from typing import NamedTuple

from rest_jax.tool_calls import Region


class Metric(NamedTuple):
    """Unit ("" for a pure number) and meaning of a metric."""

    unit: str
    meaning: str


_REGION_METRICS = {
    "entropy": Metric("nats", "mean entropy of the policy on the tokens of the region"),
    "gini": Metric("", "mean 1 - sum_v p_v^2 on the tokens of the region"),
    "base": Metric("", "weight of the region in force, before normalisation"),
    "weight": Metric("", "mean weight of the tokens of the region, after normalisation"),
    "weight_share": Metric("fraction", "share of the region in the total weight"),
    "count": Metric("tokens", "tokens of the region in the batch"),
}

REGION_NAMES = tuple(region.name.lower() for region in Region if region is not Region.NONE)

METRICS: dict[str, Metric] = {
    "data/epoch": Metric("epochs", "passes over the training records, begun"),
    "data/dropped": Metric("records", "records dropped because they are longer than the limit"),
    "reward/mean": Metric("", "mean reward of the sampled answers"),
    "reward/std": Metric("", "standard deviation of the rewards over the batch"),
    "reward/min": Metric("", "least reward of the batch"),
    "reward/max": Metric("", "greatest reward of the batch"),
    "reward/group_std": Metric("", "mean over groups of the standard deviation within the group"),
    "reward/equal_groups": Metric("fraction", "groups whose rewards are all equal: no advantage"),
    "reward/format_part": Metric("", "mean format part of the reward, scaled"),
    "reward/correctness_part": Metric("", "mean correctness part of the reward, scaled"),
    "reward/format_score": Metric("fraction", "answers in the required format"),
    "reward/accuracy": Metric("", "mean S_acc, in [0, 1]"),
    "reward/exact": Metric("fraction", "answers whose calls are exactly the gold ones"),
    "reward/spurious": Metric("fraction", "answers with a call among those that should have none"),
    "reward/progress": Metric("", "progress mu of the dynamic reward scale, in [0, 1]"),
    "rollout/prompts": Metric("prompts", "prompts of the step"),
    "rollout/tokens": Metric("tokens", "tokens sampled in the step"),
    "rollout/prompt_tokens": Metric("tokens", "mean length of the prompts"),
    "rollout/response_tokens": Metric("tokens", "mean length of the answers"),
    "rollout/response_tokens_max": Metric("tokens", "greatest length of an answer"),
    "rollout/truncated": Metric("fraction", "answers that did not end within the limit"),
    "rollout/entropy": Metric("nats", "mean entropy of the policy on the sampled tokens"),
    "rollout/gini": Metric("", "mean 1 - sum_v p_v^2 on the sampled tokens"),
    "rollout/logp": Metric("nats", "mean log-probability of the sampled tokens"),
    "rollout/logp_mismatch": Metric("nats", "mean |log-prob of the sampler - of the trainer|"),
    "rollout/ratio_max": Metric("", "greatest ratio of the two probabilities, either way"),
    "rollout/decode_slot_utilisation": Metric(
        "fraction", "lane-steps that drew a token of an answer"
    ),
    "rollout/staleness": Metric("steps", "age of the weights that sampled, at the update"),
    "update/loss": Metric("", "loss, mean over the updates of the step"),
    "update/policy_loss": Metric("", "loss without the KL and entropy terms"),
    "update/kl": Metric("nats", "estimated KL divergence from the reference policy"),
    "update/entropy": Metric("nats", "mean entropy during the update"),
    "update/logp_difference": Metric("nats", "mean |log-prob now - of the policy that sampled|"),
    "update/approx_kl": Metric("nats", "estimated KL divergence from the policy that sampled"),
    "update/ratio_mean": Metric("", "mean probability ratio to the policy that sampled"),
    "update/ratio_max": Metric("", "greatest probability ratio to the policy that sampled"),
    "update/clip_fraction": Metric("fraction", "tokens whose ratio was clipped, both sides"),
    "update/clip_low_fraction": Metric("fraction", "tokens clipped at 1 - clip_low"),
    "update/clip_high_fraction": Metric("fraction", "tokens clipped at 1 + clip_high"),
    "update/dual_clip_fraction": Metric("fraction", "tokens at the dual clip"),
    "update/tis_weight_mean": Metric("", "mean truncated importance weight"),
    "update/nll": Metric("nats", "supervised loss with all tokens alike"),
    "update/advantage_abs": Metric("", "mean absolute advantage of the answers"),
    "update/weight_mean": Metric("", "mean weight of the policy's tokens"),
    "update/tokens": Metric("tokens", "tokens that carried loss"),
    "update/accuracy": Metric("fraction", "supervised tokens that are the most probable ones"),
    "update/grad_norm": Metric("", "global norm of the gradient, before clipping"),
    "update/grad_variance": Metric(
        "", "trace of the covariance of the gradient, from its groups (train.measure_noise)"
    ),
    "update/grad_noise": Metric(
        "", "the same over the squared norm of the gradient; 1: nothing but noise"
    ),
    "update/update_norm": Metric("", "global norm of the change of the parameters"),
    "update/param_norm": Metric("", "global norm of the parameters"),
    "update/learning_rate": Metric("", "learning rate in force"),
    "update/count": Metric("updates", "optimiser updates so far"),
    "update/skipped_groups": Metric("fraction", "groups without advantage: no forward pass"),
    "update/micro_batches": Metric("micro-batches", "micro-batches of the step"),
    "update/padding": Metric("fraction", "positions of the micro-batches that were padding"),
    **{
        f"region/{name}/{kind}": metric
        for name in REGION_NAMES
        for kind, metric in _REGION_METRICS.items()
    },
    "curriculum/nu": Metric("", "progress of the curriculum, in [0, 1]"),
    "curriculum/format_score": Metric("", "moving average of the format score"),
    "eval/reward": Metric("", "mean reward on held-out prompts, greedy, at the final scale"),
    "eval/format": Metric("fraction", "held-out answers in the required format"),
    "eval/exact": Metric("fraction", "held-out answers whose calls are exactly the gold ones"),
    "eval/spurious": Metric("fraction", "held-out prompts without gold calls that got one"),
    "eval/accuracy": Metric("", "mean S_acc on held-out prompts, in [0, 1]"),
    "eval/response_tokens": Metric("tokens", "mean length of the held-out answers"),
    "eval/truncated": Metric("fraction", "held-out answers that did not end within the limit"),
    "eval/prompts": Metric("prompts", "held-out prompts"),
    "eval/loss": Metric("nats", "supervised loss on held-out records"),
    "time/step": Metric("s", "wall-clock time of the step, evaluation and saving apart"),
    "time/cpu": Metric("s", "CPU time of the process in the step, all threads"),
    "time/data": Metric("s", "waiting for the loader"),
    "time/rollout": Metric("s", "sampling"),
    "time/score": Metric("s", "parsing, rewards and regions; beside the sampling"),
    "time/score_wait": Metric("s", "waiting for them after the sampling"),
    "time/update": Metric("s", "the optimiser updates"),
    "time/eval": Metric("s", "held-out evaluation"),
    "time/checkpoint": Metric("s", "waiting for a checkpoint to be handed over"),
    "time/tokens_per_second": Metric("tokens/s", "sampled (supervised: trained) tokens a second"),
    "time/processed_tokens_per_second": Metric(
        "tokens/s", "supervised: prompt and target tokens a second"
    ),
    "time/rollout_tokens_per_second": Metric("tokens/s", "sampled tokens a second of the rollout"),
    "time/reward_responses_per_second": Metric("answers/s", "answers scored a second of scoring"),
    "time/reward_tokens_per_second": Metric("tokens/s", "answer tokens scored a second of scoring"),
    "time/update_tokens_per_second": Metric(
        "tokens/s", "trajectory tokens (G x prompt + answers) a second of the update"
    ),
    "time/rollout_mfu": Metric("fraction", "model FLOP/s of the rollout over the machine's peak"),
    "time/update_mfu": Metric("fraction", "model FLOP/s of the update over the machine's peak"),
    "time/elapsed": Metric("s", "since this process began to train"),
}
