"""The config models: one frozen pydantic tree a run; YAML files and dotted overrides in, every error at once out.

`load(path, overrides, base)` -> `Config`. Unknown keys, wrong types and values out of range are reported together, each with its
dotted path, by one `ConfigError` (a ValueError whose text is what the user reads). Imported by the entry points only; the
numeric rooms take the section they need, never the whole.
"""

import dataclasses
import pathlib
import typing
from typing import Annotated, Any, Literal

import pydantic
import yaml

from rest_jax import builtin, config_tree, schema
from rest_jax.config_tree import ConfigError

PositiveInt = Annotated[int, pydantic.Field(gt=0)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


class Section(pydantic.BaseModel):
    """Base of every section: frozen (so hashable and static under jit), unknown keys refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Where the policy comes from and how it computes."""

    source: str  # HF folder, hub id (needs the network), or a checkpoint made by `rest-jax convert`
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # compute; auto: bfloat16 on accelerators, float32 on CPU
    )
    remat: Literal["none", "block", "dots"] = "block"  # what the backward pass recomputes
    tokenizer: str | None = None  # defaults to `source`


class DataConfig(Section):
    """Training and held-out step records. A path (JSONL, Parquet, rlla JSON or Parquet) or a `synthetic:` world."""

    train: str = "synthetic:train"
    eval: str | None = "synthetic:eval"
    template: Literal["toolrl", "hermes", "llama3"] = "toolrl"
    brief_prompt: bool = (
        False  # toolrl: only the tool list and one line on the format, for tiny models
    )
    max_prompt_tokens: PositiveInt = 2048  # longer prompts are dropped and counted, never cut
    train_limit: PositiveInt | None = None
    eval_limit: PositiveInt | None = None
    shuffle: bool = True
    synthetic_seed: NonNegativeInt = 0
    synthetic_level: Literal["single", "mixed", "reasoned"] = "mixed"
    synthetic_size: PositiveInt = 4096  # training records of a `synthetic:` world


class RolloutConfig(Section):
    """How responses are sampled."""

    prompts_per_step: PositiveInt = 512
    group_size: PositiveInt = 4
    max_response_tokens: PositiveInt = 2048
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0  # 0: full support
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    allow_truncated_support: bool = (
        False  # training with top-k/top-p below full support is refused unless asked for
    )
    recompute_logprobs: bool = (
        False  # a second forward pass for logp_old instead of the sampler's own
    )
    tis_cap: PositiveFloat | None = (
        None  # truncated importance correction; needs recompute_logprobs
    )
    decode_slots: PositiveInt = (
        128  # responses decoded at once on each way (data x fsdp) of the mesh
    )
    prompt_cache_entries: PositiveInt | None = (
        None  # prompts resident at once on each way; None: 4 x decode_slots / group_size
    )
    staleness: Literal[0, 1] = (
        0  # 1: step s + 1 is sampled before update s; needs recompute_logprobs and tis_cap
    )


class RewardConfig(Section):
    """Rule-based reward (METHOD section 6)."""

    dynamic: bool = True  # False: the static ablation, format [0, 1], correctness [-3, 3]
    progress_steps: PositiveInt | None = (
        None  # steps until the dynamic scale is reached; None: the whole run
    )
    format_scale_start: PositiveFloat = 2.0  # hi = +x, lo = -x
    format_scale_end: PositiveFloat = 1.0
    correctness_scale_start: PositiveFloat = 2.0
    correctness_scale_end: PositiveFloat = 3.0
    strict_format: bool = True  # text outside the blocks and repeated blocks fail S_format
    count_extra_calls: bool = True  # superfluous calls enter the union of r_name
    extra_call_penalty: NonNegativeFloat = 0.5  # x (extra / gold) of S_acc
    penalise_spurious_calls: bool = True  # gold without calls: a call earns the lower end
    strict_match: bool = False  # ToolRL options, off by default
    coarse: bool = False
    length_weight: NonNegativeFloat = 0.0
    length_target_tokens: PositiveInt = 512


class WeightsConfig(Section):
    """Region weights (METHOD section 4)."""

    rule: Literal["inverse_bound", "inverse_entropy", "inverse_gini", "constant", "uniform"] = (
        "inverse_bound"
    )
    name_anchor: PositiveFloat = 1.2
    entropy_floor: PositiveFloat = 1e-3  # nats
    w_min: PositiveFloat = 0.1
    w_max: PositiveFloat = 4.0
    ema_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.9
    normalizer: Literal["all_tokens", "positive_tokens", "none"] = "all_tokens"
    # base weights of rule `constant`, and of a region never seen
    tag: NonNegativeFloat = 1.0
    scaffold: NonNegativeFloat = 1.0
    name: NonNegativeFloat = 1.2
    param: NonNegativeFloat = 0.6
    think: NonNegativeFloat = 0.6
    response: NonNegativeFloat = 0.6
    other: NonNegativeFloat = 1.0
    # ablations: regions whose weight is zero, by name; the only way to a zero weight besides the released preset
    zero: tuple[Literal["tag", "scaffold", "name", "param", "think", "response", "other"], ...] = ()
    allow_zero_constants: bool = (
        False  # the released preset's zeros (scaffold, response, other); with rule `constant`
    )

    @pydantic.model_validator(mode="after")
    def _ordered(self):
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is above w_max {self.w_max}")
        named = ("tag", "scaffold", "name", "param", "think", "response", "other")
        zeros = [name for name in named if getattr(self, name) == 0]
        if zeros and not self.allow_zero_constants:
            raise ValueError(
                f"{', '.join(zeros)}: 0 takes all gradient from these tokens; list them in weights.zero (an ablation), "
                "or set weights.allow_zero_constants true (the released-code preset)"
            )
        return self


class CurriculumConfig(Section):
    """Motion of the weights over progress nu (METHOD section 5)."""

    shape: Literal["linear", "cosine", "sqrt", "step", "constant", "adaptive"] = "linear"
    steps: PositiveInt | None = None  # until nu = 1; None: `run_fraction` of the run
    run_fraction: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    stages: Annotated[int, pydantic.Field(ge=2)] = 4  # of shape `step`
    target: Literal["weight", "mass"] = "weight"
    alpha_format: NonNegativeFloat = 0.4
    alpha_param: NonNegativeFloat = 0.6
    alpha_think: NonNegativeFloat = 0.6
    param_max: PositiveFloat | None = (
        None  # ceilings of the ramps; None: w_max (the released preset: 1.2 and 1.0)
    )
    think_max: PositiveFloat | None = None
    start_param: PositiveFloat | None = None  # tuned preset: base weights set by hand at nu = 0
    start_think: PositiveFloat | None = None
    # target `mass` (weights.normalizer is not applied): shares of the total weight at nu = 0 and nu = 1;
    # RESPONSE and OTHER get what is left, here nothing but w_min
    mass_start_format: Fraction = 0.20
    mass_end_format: Fraction = 0.05
    mass_start_name: Fraction = 0.25
    mass_end_name: Fraction = 0.25
    mass_start_param: Fraction = 0.25
    mass_end_param: Fraction = 0.30
    mass_start_think: Fraction = 0.30
    mass_end_think: Fraction = 0.40
    adaptive_low: Fraction = (
        0.5  # shape `adaptive`: nu = 0 at this EMA of the format score, 1 at `adaptive_high`
    )
    adaptive_high: Fraction = 0.95
    format_ema_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.9

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        for end in ("start", "end"):
            parts = [getattr(self, f"mass_{end}_{r}") for r in ("format", "name", "param", "think")]
            if sum(parts) > 1 + 1e-6:
                raise ValueError(
                    f"mass_{end}_*: shares sum to {sum(parts):.3f}, at most 1 is possible"
                )
        if self.adaptive_low >= self.adaptive_high:
            raise ValueError(
                f"adaptive_low {self.adaptive_low} is not below adaptive_high {self.adaptive_high}"
            )
        return self


class LossConfig(Section):
    """Advantage and policy loss (METHOD section 7)."""

    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    aggregation: Literal["weighted_token_mean", "token_mean", "sequence_mean", "fixed_length"] = (
        "weighted_token_mean"
    )
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, pydantic.Field(gt=1)] | None = 3.0
    kl_coefficient: NonNegativeFloat = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coefficient: NonNegativeFloat = 0.0
    vocab_chunk: PositiveInt = 128  # response tokens a row whose logits exist at once


class OptimizerConfig(Section):
    """AdamW through optax."""

    learning_rate: PositiveFloat = 1e-6
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_fraction: Fraction = 0.0
    final_fraction: Fraction = 0.0  # end of the cosine or linear decay, of learning_rate
    beta1: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01  # matrices only: norms and biases are masked out
    max_grad_norm: PositiveFloat | None = 1.0


class MeshConfig(Section):
    """Devices by axis; -1 on one axis takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1

    @pydantic.model_validator(mode="after")
    def _one_free(self):
        sizes = (self.data, self.fsdp, self.tensor, self.expert)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(f"mesh sizes {sizes}: each is at least 1, and at most one is -1")
        return self


class TrainConfig(Section):
    """The loop."""

    steps: PositiveInt | None = None  # None: `epochs` over the data
    epochs: PositiveFloat = 1.0
    prompts_per_update: PositiveInt | None = (
        None  # prompts of a mini-batch; None: one update a step
    )
    max_tokens_per_microbatch: PositiveInt | None = (
        16_384  # positions (prompt once + responses, padded) of a micro-batch on each way; None: no limit
    )
    measure_noise: bool = (
        False  # variance of every gradient, from micro-batches of one group a way (somewhat slower)
    )
    eval_every: NonNegativeInt = 15  # 0: only before the first and after the last step
    eval_before: bool = True
    checkpoint_every: PositiveInt = 15
    keep_checkpoints: PositiveInt = 3
    samples_per_step: NonNegativeInt = 4  # generations written to samples.jsonl
    tensorboard: bool = False
    wandb_project: str | None = None


class SftConfig(Section):
    """Supervised runs (`trainer: sft`, or `rest-jax sft`)."""

    batch_size: PositiveInt = 64
    max_tokens: PositiveInt = 8192  # prompt + answer; longer records are dropped and counted
    tool_call_weight: PositiveFloat = 1.0  # TSFT: above 1
    reasoning_weight: PositiveFloat = 1.0  # RSFT: above 1


class Config(Section):
    """A run, whole."""

    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9._-]+$")]
    output: str = "runs"  # the run lives in <output>/<name>/
    seed: NonNegativeInt = 0
    trainer: config_tree.Trainer = "rl"  # reinforcement, or supervised on the gold answers
    # The supervised run that is trained first and is the start of this one; in a file, the name of its recipe.
    warm_start: "Config | None" = None
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    weights: WeightsConfig = WeightsConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()

    @property
    def folder(self) -> pathlib.Path:
        """Where its run lives."""
        return pathlib.Path(self.output) / self.name

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        r, t = self.rollout, self.train
        update = t.prompts_per_update or r.prompts_per_step
        _divides("rollout.prompts_per_step", r.prompts_per_step, "train.prompts_per_update", update)
        if (r.top_k or r.top_p < 1) and not r.allow_truncated_support:
            raise ValueError(
                f"rollout.top_k {r.top_k}, rollout.top_p {r.top_p}: training below full support is refused; "
                "set rollout.allow_truncated_support true to do it all the same"
            )
        if r.tis_cap is not None and not r.recompute_logprobs:
            raise ValueError("rollout.tis_cap needs rollout.recompute_logprobs true")
        if r.staleness and r.tis_cap is None:
            raise ValueError(
                "rollout.staleness 1 trains on answers of the policy before: set rollout.recompute_logprobs true and "
                "rollout.tis_cap (2.0 is usual), or staleness 0"
            )
        if self.warm_start is not None:
            if (self.trainer, self.warm_start.trainer) != ("rl", "sft"):
                raise ValueError("warm_start: only a run with trainer rl has one, of trainer sft")
            if (self.warm_start.output, self.warm_start.name) == (self.output, self.name):
                raise ValueError(f"warm_start: it would share the folder of this run, {self.name}")
        if self.trainer == "sft" and t.measure_noise:
            raise ValueError(
                "train.measure_noise true: only a run with trainer rl measures it; set it false here, or in the "
                "`supervised` section of the base"
            )
        if r.group_size < 2:
            raise ValueError(
                f"rollout.group_size {r.group_size}: a group needs at least 2 responses"
            )
        return self


def _divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if whole % part:
        raise ValueError(f"{whole_name} {whole} is not a multiple of {part_name} {part}")


def load(
    path: str | pathlib.Path,
    overrides: typing.Sequence[str] = (),
    base: str | None = None,
    trainer: config_tree.Trainer | None = None,
) -> Config:
    """Reads a YAML file on its base (or on `base` instead), applies `a.b=value` overrides (YAML values), validates.

    How files are merged, and what a run is called: `config_tree.read`. `trainer` replaces the file's. Raises ConfigError.
    """
    path = pathlib.Path(path)
    return validate(config_tree.read(path, overrides, base, trainer), str(path))


def from_overrides(
    raw: dict[str, Any], overrides: typing.Sequence[str], origin: str = "config"
) -> Config:
    """Applies `a.b=value` overrides (YAML values) to a plain tree, in place, and validates it. Raises ConfigError."""
    for override in overrides:
        config_tree.apply(raw, override)
    return validate(raw, origin)


def resolve(config: Config) -> Config:
    """The config, and that of its warm start, with model and tokenizer paths located (`shipped.locate`)."""
    model, warm_start = config.model, config.warm_start
    tokenizer = None if model.tokenizer is None else builtin.locate(model.tokenizer)
    located = {"source": builtin.locate(model.source), "tokenizer": tokenizer}
    changes: dict[str, Any] = {"model": model.model_copy(update=located)}
    if warm_start is not None:
        changes["warm_start"] = resolve(warm_start)
    return config.model_copy(update=changes)


def validate(raw: dict[str, Any], origin: str = "config") -> Config:
    """Validates a plain tree; ConfigError lists every fault with its path and, for a typo, the nearest name."""
    return schema.validate(Config, raw, origin, ConfigError)


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


@dataclasses.dataclass(frozen=True)
class Difference:
    """One leaf in which two configs differ."""

    path: str
    old: Any
    new: Any


def differences(old: Config, new: Config) -> list[Difference]:
    """The leaves in which two configs differ, in order."""
    there, here = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [Difference(*found) for found in config_tree.differences(there, here)]
