"""The config of a run: frozen pydantic sections, read from YAML files and `key=value` words.

`load(files, overrides)` merges the files from left to right, then the overrides (OmegaConf: `${...}` refers to another key
or to `oc.env`), validates, and returns a `Config`. Every fault is a ConfigError: one line with each bad key, its dotted
path and the nearest known name. Files are paths, or names of builtin ones (`scale/tiny`, `method/rest`).
"""

import copy
import difflib
import functools
import io
import itertools
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import pydantic
import yaml
from etils import epath
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rest_jax import plugins
from rest_jax.errors import UserError
from rest_jax.files import Location, as_path, is_url, store_errors

_PACKAGE = pathlib.Path(__file__).resolve().parent
# The builtin files: in an installed wheel rest_jax/_configs, else configs/ of the repository.
_INSTALLED = _PACKAGE / "_configs"
_BUILTIN = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"
# of a file, and of its values within each other; those of strangers' runs may be of any size
_MAX_BYTES, _DEEPEST = 2**18, 50


class ConfigError(UserError):
    """A config that cannot be used; the text names each key, value and remedy."""


def locate(source: str) -> str:
    """A path with `~` expanded; `configs/...` that exists only among the builtin files becomes the path of that file."""
    source = os.path.expanduser(source)
    found = _BUILTIN / source.removeprefix("configs/")
    absent = source.startswith("configs/") and not os.path.exists(source)
    return str(found) if absent and found.exists() else source


PositiveInt = Annotated[int, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(gt=0, le=10**7)]  # of what is made in memory at once
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
Decay = Annotated[float, pydantic.Field(ge=0, lt=1)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
Path = Annotated[str, pydantic.Field(min_length=1), pydantic.AfterValidator(os.path.expanduser)]
Source = Annotated[str, pydantic.Field(min_length=1), pydantic.AfterValidator(locate)]


def _check_plugin(word: str) -> str:
    plugins.split(word)
    return os.path.expanduser(word)


# Code of the user's, which a config only names: `plugins` reads it where it is run.
Plugin = Annotated[str, pydantic.AfterValidator(_check_plugin)]


class Section(pydantic.BaseModel):
    """Base of every section: frozen (so hashable and static under jit), unknown keys refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Python, and so pydantic, takes true for 1 and 1 for true."""
        kind = cls.model_fields[str(info.field_name)].annotation
        alone = isinstance(value, bool) and kind not in (bool, Any)
        if alone or (_has_flags(value) and not _takes_flags(kind)):
            raise ValueError(f"{value}: true and false are no values of it")
        if kind is bool and not isinstance(value, bool) and str(value).strip(" .01") == "":
            raise ValueError(f"{value!r}: true or false is needed")
        return value


def _has_flags(value: Any) -> bool:
    """Whether it is true or false, or has one within."""
    if isinstance(value, Mapping | list | tuple):
        return any(map(_has_flags, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, bool)


def _takes_flags(kind: Any) -> bool:
    """Whether a value of this type may have them within; a record looks at its own fields."""
    is_record = isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
    return kind in (bool, Any) or is_record or any(map(_takes_flags, typing.get_args(kind)))


Dtype = Literal["auto", "float32", "bfloat16"]


class ModelConfig(Section):
    """Where the policy comes from (HF folder, hub id, run, or what `rest-jax convert` wrote), how it computes."""

    source: Source  # HF folder, hub id, run, converted folder
    dtype: Dtype = "auto"  # auto: float32 on CPU, else bfloat16
    # what is kept for the backward pass: everything, the largest products, nothing but the inputs of blocks
    remat: Literal["none", "dots", "block"] = "block"
    tokenizer: Source | None = None  # None: that of `source`


class DataConfig(Section):
    """Training and held-out step records. A path (JSONL, Parquet, rlla JSON or Parquet) or a `synthetic:` world."""

    train: Path = "synthetic:train"  # records, or `synthetic:train`
    eval: Path | None = "synthetic:eval"  # held-out records; None: no evaluation
    # the format of prompts and calls (docs/data.md)
    template: Literal["toolrl", "hermes", "llama3"] = "toolrl"
    brief_prompt: bool = False  # toolrl: only the tool list and one line on the format
    max_prompt_tokens: PositiveInt = 2048  # longer prompts are dropped and counted, never cut
    # records read at most; None: all
    train_limit: PositiveInt | None = None
    eval_limit: PositiveInt | None = None
    shuffle: bool = True  # anew in every epoch
    synthetic_seed: Seed = 0  # of a `synthetic:` world
    # what a `synthetic:` world asks for: one call or none, mixed tasks, mixed tasks that are thought through, calls whose tool
    # the thought does not name
    synthetic_level: Literal["single", "mixed", "reasoned", "inferred"] = "mixed"
    synthetic_size: Count = 4096  # training records of a `synthetic:` world


class RolloutConfig(Section):
    """How completions are sampled."""

    prompts_per_step: Count = 512  # P, each sampled `group_size` times
    group_size: Annotated[int, pydantic.Field(ge=2, le=10**5)] = 4  # G: completions of a prompt
    # most times a step samples other prompts in place of those whose group has no advantage (docs/methods.md); 0: never
    dynamic_sampling: NonNegativeInt = 0
    max_response_tokens: PositiveInt = 2048  # longer completions are cut off
    temperature: PositiveFloat = 1.0  # of sampling; evaluation is greedy
    top_k: NonNegativeInt = 0  # 0: full support
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0  # 1: full support
    allow_truncated_support: bool = False  # else top_k, top_p below full support are refused
    recompute_logprobs: bool = False  # a second forward pass for logp_old, not the sampler's own
    tis_cap: PositiveFloat | None = None  # truncated importance sampling; needs recompute_logprobs
    decode_slots: PositiveInt = 128  # completions decoded at once on each data shard
    tensor: PositiveInt | None = (
        None  # devices that share the weights of a rollout; None: mesh.tensor
    )
    prompt_cache_entries: PositiveInt | None = None  # None: 4 x decode_slots / group_size
    # keys and values kept at once on each data shard; None: up to 1,024 for each prompt and response; of a server and of a
    # benchmark 2,048 for each slot, and enough for the longest
    cache_tokens: PositiveInt | None = None
    replay_routing: bool = False  # the update takes the experts that the sampler's routers chose
    staleness: Literal[0, 1] = 0  # 1: step s + 1 is sampled before update s; needs tis_cap


class RewardConfig(Section):
    """Rule-based reward (docs/method.md section 6)."""

    dynamic: bool = True  # False: the static ablation, format [0, 1], correctness [-3, 3]
    progress_steps: PositiveInt | None = None  # to the end of the dynamic scale; None: the run's
    format_scale_start: PositiveFloat = 2.0  # hi = +x, lo = -x
    format_scale_end: PositiveFloat = 1.0  # where the format part ends
    correctness_scale_start: PositiveFloat = 2.0  # the same of the correctness part
    correctness_scale_end: PositiveFloat = 3.0  # the same of the correctness part
    strict_format: bool = True  # text outside the blocks and repeated blocks fail S_format
    count_extra_calls: bool = True  # superfluous calls enter the union of r_name
    extra_call_penalty: NonNegativeFloat = 0.5  # x (extra / gold) of S_acc
    penalise_spurious_calls: bool = True  # gold without calls: a call earns the lower end
    strict_match: bool = False  # r_name and r_param are 1 where all names are right, else 0
    # S_acc is 1 for exactly the gold calls, else 0; the keys of extra calls and strict_match keep their defaults then
    coarse: bool = False
    length_weight: NonNegativeFloat = 0.0  # most that is earned by length; 0: nothing
    length_target_tokens: PositiveInt = 512  # a completion that long earns all of it
    # False: the parts above are left out of the reward; format and exactness are measured all the same
    builtin: bool = True
    # FILE.py:FUNCTION, whose value is added to it; each process runs it in so many workers (docs/plugins.md)
    plugin: Plugin | None = None
    plugin_workers: PositiveInt = 8  # processes of it
    plugin_timeout: PositiveFloat = 5.0  # seconds a completion
    plugin_memory: PositiveFloat = 4.0  # GiB a worker
    plugin_env: tuple[str, ...] = ()  # names of variables that workers get besides the usual ones
    plugin_errors: Literal["count", "stop"] = (
        "count"  # what a value that cannot be used does to the run
    )

    @pydantic.model_validator(mode="after")
    def _has_parts(self):
        if self.plugin is not None and ":" not in self.plugin:
            raise ValueError(f"plugin {self.plugin!r}: write it as FILE.py:FUNCTION")
        if not self.builtin and self.plugin is None:
            raise ValueError("builtin false: no reward is left; name reward.plugin")
        return self

    @pydantic.model_validator(mode="after")
    def _parts_have_effect(self):
        for key in ("count_extra_calls", "extra_call_penalty", "strict_match"):
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.coarse and value != default:
                raise ValueError(
                    f"coarse true: {key} {value} has no effect, since S_acc is all or nothing; leave {key} at {default}"
                )
        return self


RegionName = Literal["tag", "scaffold", "name", "param", "think", "response", "other"]
RegionRule = Literal["inverse_bound", "inverse_entropy", "inverse_gini", "constant", "uniform"]


def rule_names(kind: str) -> tuple[str, ...]:
    """The rules of a kind (weight, advantage, loss): one for each file in its folder of `rl/rules/`, which is not imported."""
    files = (_PACKAGE / "rl" / "rules" / kind).glob("[a-z]*.py")
    return tuple(sorted(file.stem for file in files))


def _is_rule(kind: str, *more: str) -> pydantic.AfterValidator:
    def check(name: str) -> str:
        known = (*more, *rule_names(kind))
        if name not in known:
            raise ValueError(f"{name!r}: no such rule{nearest(name, known)}")
        return name

    return pydantic.AfterValidator(check)


def _listed(kind: str, *more: str) -> Any:
    """The same for editors, in the JSON schema."""
    return pydantic.Field(json_schema_extra={"enum": [*more, *rule_names(kind)]})


def _freeze(options: Any) -> tuple[tuple[str, Any], ...]:
    """The pairs of a mapping in the order of its keys, lists as tuples: hashable, so that it can be static under jit."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{options!r}: a mapping of options is needed, say {{share: 0.2}}")
    pairs = {str(k): tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if any(isinstance(value, Mapping) for value in pairs.values()):
        raise ValueError(f"{options!r}: an option is a word, a number or a list")
    return tuple(sorted(pairs.items()))


# Of a rule, which checks them when the run begins (`rl.rules.check_rules`).
Options = Annotated[
    tuple[tuple[str, Any], ...],
    pydantic.BeforeValidator(_freeze),
    pydantic.PlainSerializer(dict),
    pydantic.WithJsonSchema({"type": "object", "additionalProperties": True}),
    pydantic.Field(json_schema_extra={"default": {}}),  # as it is written, not the pairs
]


class WeightsConfig(Section):
    """Weights of regions (docs/method.md section 4), or of single tokens by a rule of `rl/rules/weight/` (docs/methods.md)."""

    # how a base weight comes from entropy or Gini, or a rule of single tokens
    rule: Annotated[
        str,
        _is_rule("weight", *typing.get_args(RegionRule)),
        _listed("weight", *typing.get_args(RegionRule)),
    ] = "inverse_bound"
    options: Options = ()  # of a rule of single tokens
    # FILE.py, or FILE.py:NAME: a rule of single tokens of the user's own, in place of `rule` (docs/plugins.md)
    plugin: Plugin | None = None
    # controls: the weights shuffled within each completion, or over the wrong regions, or random ones of the same range
    placebo: Literal["none", "shuffle", "shuffle_regions", "random"] = "none"
    # start: of the first `entropy_steps` batches with the region, then fixed; running: a moving average
    entropy: Literal["start", "running"] = "start"
    entropy_steps: PositiveInt = 1  # of `entropy: start`
    entropy_floor: PositiveFloat = 1e-3  # nats
    # regions that follow their entropy; the others have base weight 1
    entropy_regions: tuple[RegionName, ...] = ("tag", "scaffold", "name", "param", "think")
    w_min: PositiveFloat = 0.02  # bounds of a weight
    w_max: PositiveFloat = 20.0  # bounds of a weight
    ema_decay: Decay = 0.9  # of `entropy: running`
    count_decay: Decay = 0.5  # of the token counts by which shares become weights
    # to mean one: over the tokens of each response (`all_tokens`; `positive_tokens`), or of the global batch
    normalizer: Literal["all_tokens", "positive_tokens", "batch", "none"] = "batch"
    # base weights of rule `constant`
    tag: NonNegativeFloat = 1.0
    scaffold: NonNegativeFloat = 1.0
    name: NonNegativeFloat = 1.2
    param: NonNegativeFloat = 0.6
    think: NonNegativeFloat = 0.6
    response: NonNegativeFloat = 0.6
    other: NonNegativeFloat = 1.0
    # ablations: regions whose weight is zero; the only way to a zero weight besides the released preset
    zero: tuple[RegionName, ...] = ()
    allow_zero_constants: bool = False  # zeros of the released preset; with rule `constant`

    @property
    def rule_used(self) -> str:
        """The plug-in, or the rule."""
        return self.plugin or self.rule

    @property
    def is_uniform(self) -> bool:
        """Whether all tokens weigh alike."""
        return self.rule == "uniform" and self.plugin is None and not self.zero

    @property
    def of_regions(self) -> "WeightsConfig":
        """Without a rule of single tokens, under which all regions weigh 1 but for those in `zero`."""
        if self.plugin is None and self.rule in typing.get_args(RegionRule):
            return self
        return self.model_copy(update={"rule": "uniform", "plugin": None})

    @pydantic.model_validator(mode="after")
    def _ordered(self):
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is above w_max {self.w_max}")
        zeros = [name for name in typing.get_args(RegionName) if getattr(self, name) == 0]
        weightless = {*self.zero, *(zeros if self.rule == "constant" else ())}
        # malformed output alone teaches nothing
        if weightless >= set(typing.get_args(RegionName)) - {"other"}:
            raise ValueError(
                "zero: no region of an answer in the format has a gradient; leave one out"
            )
        if zeros and not self.allow_zero_constants:
            raise ValueError(
                f"{', '.join(zeros)}: 0 takes all gradient from these tokens; list them in weights.zero (an ablation), "
                "or set weights.allow_zero_constants true (the released-code preset)"
            )
        return self


class CurriculumConfig(Section):
    """Motion of the weights over progress nu (docs/method.md section 5)."""

    # how the weights move from nu = 0 to 1
    shape: Literal["linear", "cosine", "sqrt", "step", "constant", "adaptive"] = "linear"
    steps: PositiveInt | None = None  # until nu = 1; None: `run_fraction` of the run
    run_fraction: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0  # of the run, until nu = 1
    stages: Annotated[int, pydantic.Field(ge=2)] = 4  # of shape `step`
    # what nu moves: shares of the total weight from those at the start, the weights themselves, or shares set here
    target: Literal["share", "weight", "mass"] = "share"
    # what format gives up at nu = 1: this part of its share (target `share`), or so much weight (target `weight`)
    alpha_format: NonNegativeFloat = 0.75
    # target `share`: parts of it for PARAM and THINK; None: in proportion to their shares at the start
    freed_to: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    alpha_param: NonNegativeFloat = 0.6  # target `weight`: what is added at nu = 1
    alpha_think: NonNegativeFloat = 0.6  # the same of thoughts
    param_max: PositiveFloat | None = None  # target `weight`: ceilings of the ramps; None: w_max
    think_max: PositiveFloat | None = None  # None: w_max
    # target `mass`: shares of the total weight at nu = 0 and nu = 1; RESPONSE and OTHER get what is left, here nothing but w_min
    share_start_format: Fraction = 0.20
    share_end_format: Fraction = 0.05
    share_start_name: Fraction = 0.25
    share_end_name: Fraction = 0.25
    share_start_param: Fraction = 0.25
    share_end_param: Fraction = 0.30
    share_start_think: Fraction = 0.30
    share_end_think: Fraction = 0.40
    # shape `adaptive`: nu = 0 at adaptive_low, 1 at adaptive_high, of the moving average of the format score
    adaptive_low: Fraction = 0.5
    adaptive_high: Fraction = 0.95
    format_ema_decay: Decay = 0.9  # of that moving average

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        if self.target == "share" and self.alpha_format > 1:
            raise ValueError(
                f"alpha_format {self.alpha_format}: of target share it is a part of format's share, at most 1"
            )
        if self.freed_to is not None and sum(self.freed_to) == 0:
            raise ValueError("freed_to: 0 for PARAM and for THINK; one must be above 0")
        for end in ("start", "end"):
            total = sum(value for name, value in self if name.startswith(f"share_{end}_"))
            if total > 1 + 1e-6:
                raise ValueError(f"share_{end}_*: their sum {total:.3f} is above 1")
        if self.adaptive_low >= self.adaptive_high:
            raise ValueError(
                f"adaptive_low {self.adaptive_low} is not below adaptive_high {self.adaptive_high}"
            )
        return self


class LossConfig(Section):
    """Advantage and policy loss (docs/method.md section 7); their rules are files of `rl/rules/` (docs/methods.md)."""

    advantage: Annotated[str, _is_rule("advantage"), _listed("advantage")] = "grpo"  # a rule
    advantage_options: Options = ()  # of that rule
    advantage_plugin: Plugin | None = None  # in place of `advantage`, as weights.plugin
    # exact: groups that are all exact, or not at all, have no gradient either
    group_filter: Literal["none", "exact"] = "none"
    policy: Annotated[str, _is_rule("loss"), _listed("loss")] = (
        "clip"  # the rule of the loss of a token
    )
    policy_options: Options = ()  # of that rule
    policy_plugin: Plugin | None = None  # in place of `policy`
    # what the sum over tokens is divided by
    aggregation: Literal["weighted_token_mean", "token_mean", "sequence_mean", "fixed_length"] = (
        "weighted_token_mean"
    )
    clip_low: PositiveFloat = 0.2  # of policy `clip`: the ratio is clipped at 1 - clip_low
    clip_high: PositiveFloat = 0.2  # and at 1 + clip_high
    # of policy `clip`: of ratios with negative advantage; None: none
    dual_clip: Annotated[float, pydantic.Field(gt=1)] | None = 3.0
    kl_coefficient: NonNegativeFloat = 0.0  # of the KL term to the starting policy; 0: none
    kl_estimator: Literal["k2", "k3"] = "k3"  # k2: (log r)^2 / 2; k3: r - 1 - log r
    entropy_coefficient: NonNegativeFloat = 0.0  # of the entropy bonus; 0: none
    load_balance_coefficient: NonNegativeFloat = 0.0  # of the experts, within each completion
    vocab_chunk: PositiveInt = 256  # positions of a device whose logits exist at once

    @property
    def advantage_used(self) -> str:
        """The plug-in of the advantage, or its rule."""
        return self.advantage_plugin or self.advantage

    @property
    def policy_used(self) -> str:
        """The plug-in of the policy loss, or its rule."""
        return self.policy_plugin or self.policy


Moments = Literal["device", "host"]


class OptimizerConfig(Section):
    """AdamW through optax."""

    learning_rate: PositiveFloat = 1e-6  # the peak
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up
    warmup_fraction: Fraction = 0.0  # of the run, linear
    final_fraction: Fraction = 0.0  # end of the cosine or linear decay, of learning_rate
    beta1: Decay = 0.9  # of AdamW
    beta2: Decay = 0.999  # of AdamW
    eps: PositiveFloat = 1e-8  # of AdamW
    weight_decay: NonNegativeFloat = 0.01  # matrices only: norms and biases are masked out
    max_grad_norm: PositiveFloat | None = 1.0  # the gradient is clipped to it; None: never
    # Where the two moments are kept: 8 bytes a parameter, beside the devices they cost a transfer an update.
    moments: Moments = "device"


Projection = Literal["q", "k", "v", "o", "gate", "up", "down", "all"]
_PROJECTION = {"type": "string", "enum": list(typing.get_args(Projection))}


class LoraConfig(Section):
    """Low-rank adapters on frozen weights (docs/models.md)."""

    rank: PositiveInt | None = None  # None: all weights are trained
    alpha: PositiveFloat = 32.0  # the adapters' product is scaled by alpha / rank
    # matrices that have adapters: any of q, k, v, o, gate, up, down, or all
    targets: Annotated[
        tuple[Projection, ...],
        pydantic.Field(min_length=1),
        pydantic.BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
        pydantic.WithJsonSchema(
            {"anyOf": [{"type": "array", "items": _PROJECTION, "minItems": 1}, _PROJECTION]}
        ),
    ] = ("all",)
    # of the frozen matrices; auto: that of the computation, which reads them in it anyway
    base_dtype: Dtype = "auto"
    adapter: Source | None = None  # a folder of peft's to begin with; None: the base model

    @pydantic.model_validator(mode="after")
    def _has_rank(self):
        if self.adapter is not None and self.rank is None:
            raise ValueError(
                f"adapter {self.adapter}: set lora.rank to the r of its adapter_config.json"
            )
        return self


class MeshConfig(Section):
    """Devices by axis; -1 on one axis takes what is left."""

    data: int | None = None  # None: one part a TPU slice or GPU node
    fsdp: int = -1  # parts of every parameter, and of the batch
    expert: int = 1  # parts of the experts, and of the batch
    tensor: int = 1  # inside a host, or over complete hosts

    @pydantic.model_validator(mode="after")
    def _one_free(self):
        sizes = (1 if self.data is None else self.data, self.fsdp, self.expert, self.tensor)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(f"mesh sizes {sizes}: each is at least 1, and at most one is -1")
        return self


class TrainConfig(Section):
    """The loop."""

    steps: PositiveInt | None = None  # None: `epochs` over the data
    epochs: PositiveFloat = 1.0  # passes over the data, where `steps` is None
    prompts_per_update: PositiveInt | None = None  # the mini-batch; None: one update a step
    # positions of a row, of which a micro-batch has one on each data shard: prompts, each with its completions; None: no limit
    max_tokens_per_microbatch: PositiveInt | None = 16_384
    measure_noise: bool = (
        False  # gradient variance, from micro-batches of one undivided group a data shard (slower)
    )
    measure_change: bool = (
        False  # what a step changes of the log-probs of its tokens (one more forward pass)
    )
    eval_every: NonNegativeInt = 15  # 0: only before the first and after the last step
    eval_before: bool = True  # also before the first step
    checkpoint_every: PositiveInt = 15  # steps; the last is saved, too
    keep_checkpoints: PositiveInt = 3  # the newest so many
    # prompts of which one completion is written to samples.jsonl, and all of them, token by token, to tokens.jsonl
    samples_per_step: NonNegativeInt = 4
    tensorboard: bool = False  # write event files into the run's folder
    # of Weights & Biases, of Trackio; None: no run there
    wandb_project: Annotated[str, pydantic.Field(min_length=1)] | None = None
    trackio_project: Annotated[str, pydantic.Field(min_length=1)] | None = None


class EvaluationConfig(Section):
    """Public benchmarks that a run answers with its held-out records, every `train.eval_every` steps."""

    benchmarks: tuple[Literal["api_bank"], ...] = ()  # answered beside the held-out records
    data: Path | None = None  # the folder with their files
    limit: PositiveInt | None = None  # items of each level at most

    @pydantic.model_validator(mode="after")
    def _has_data(self):
        if self.benchmarks and self.data is None:
            raise ValueError(
                f"benchmarks {', '.join(self.benchmarks)}: name the folder of their files in evaluation.data"
            )
        return self


class DistributedConfig(Section):
    """How many seconds processes wait, for one another and for the store, before the run ends with one line."""

    initialization_timeout: PositiveInt = 300  # until all processes have joined
    heartbeat_timeout: PositiveInt = 60  # a process silent for so long is taken for dead
    save_timeout: PositiveInt = 1800  # of a checkpoint, and of the barriers around it
    stop_timeout: PositiveInt = 300  # after SIGTERM: of a save, and of the other processes


class SftConfig(Section):
    """Supervised runs (`rest-jax sft`)."""

    batch_size: PositiveInt = 64  # records of a step
    max_tokens: PositiveInt = 8192  # prompt + answer; longer records are dropped and counted
    tool_call_weight: PositiveFloat = 1.0  # TSFT: above 1
    reasoning_weight: PositiveFloat = 1.0  # RSFT: above 1


class Config(Section):
    """Everything that a run is made of. Its folder is <output>/<name>/."""

    # The name of the run's folder: neither "..", nor hidden as `.tokenised` is.
    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)]
    output: Path = "runs"  # the folder of the folders of runs; a path or a URL (gs://, s3://)
    seed: Seed = 0  # of the data's order and of sampling
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    weights: WeightsConfig = WeightsConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def folder(self) -> epath.Path:
        """The folder of the run: a local one, or a URL (gs://, s3://)."""
        return as_path(self.output) / self.name

    @property
    def refers_to_adapters(self) -> bool:
        """Whether the policy that a KL term refers to has the adapters of a folder, with which the run begins."""
        return self.lora.adapter is not None and self.loss.kl_coefficient > 0

    def renamed(self, name: str, option: str) -> "Config":
        """The same under another name, which an option of the command line gives. Raises ConfigError."""
        return validate_as(
            Config, {**self.model_dump(exclude_unset=True), "name": name}, f"{option} {name}"
        )

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        r = self.rollout
        update = self.train.prompts_per_update or r.prompts_per_step
        if r.prompts_per_step % update:
            raise ValueError(
                f"rollout.prompts_per_step {r.prompts_per_step} is not a multiple of train.prompts_per_update {update}"
            )
        if (r.top_k or r.top_p < 1) and not r.allow_truncated_support:
            raise ValueError(
                f"rollout.top_k {r.top_k}, rollout.top_p {r.top_p}: below full support needs rollout.allow_truncated_support true"
            )
        if r.tis_cap is not None and not r.recompute_logprobs:
            raise ValueError("rollout.tis_cap needs rollout.recompute_logprobs true")
        if r.staleness and r.tis_cap is None:
            raise ValueError(
                "rollout.staleness 1 needs rollout.recompute_logprobs true and rollout.tis_cap (2.0 is usual)"
            )
        return self


Model = TypeVar("Model", bound=pydantic.BaseModel)
Tree = Mapping[str, Any]


class Difference(NamedTuple):
    """One key that differs, with both values."""

    path: str
    old: Any
    new: Any


def load(files: Sequence[Location], overrides: Sequence[str] = ()) -> Config:
    """The config of YAML files merged from left to right, then of `a.b=value` overrides (YAML values).

    Mappings are merged key by key; everything else is replaced. Without a `name`, the run is called after the files:
    scale/tiny and method/rest make tiny-rest. Raises ConfigError.
    """
    paths = [builtin_file(file) for file in files]
    tree = _merge(*map(read_mapping, paths), _parse(overrides))
    tree.setdefault("name", "-".join(path.stem for path in paths))
    return validate_as(Config, tree, " ".join(map(str, files)) or "config")


def read_recorded(path: Location) -> dict[str, Any]:
    """A recorded config, to be shown: a mapping with the defaults of what it does not say; as it is where the run is of a version
    with other keys. ConfigError when it is no config.
    """
    try:
        return load([path]).model_dump(mode="json")
    except ConfigError:
        return read_mapping(path)


def from_overrides(mapping: Tree, overrides: Sequence[str] = ()) -> Config:
    """The config of a mapping with `a.b=value` overrides on top. Raises ConfigError."""
    return validate_as(Config, _merge(mapping, _parse(overrides)), "config")


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` of it gives an equal config."""
    return OmegaConf.to_yaml(config.model_dump(mode="json"))


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 0, dotted path) of each line of a dumped config behind which a comment on that path may stand: the last one of
    a text, which may be broken, the first one of anything else.
    """
    stack = [("", yaml.compose(text, yaml.SafeLoader))]
    while stack:
        prefix, node = stack.pop()
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            is_text = isinstance(value, yaml.ScalarNode)
            yield (value.end_mark if is_text else key.start_mark).line, path
            if isinstance(value, yaml.MappingNode):
                stack.append((f"{path}.", value))


def differences(old: Section | Tree, new: Section | Tree) -> list[Difference]:
    """The leaves in which two configs (or plain mappings) differ; a leaf that is absent counts as None."""
    there, here = dict(leaves(old)), dict(leaves(new))
    found = (Difference(path, there.get(path), here.get(path)) for path in there | here)
    return [one for one in found if one.old != one.new]


def origins(files: Sequence[Location], overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each leaf of the config comes from, by dotted path: a file's name, "command line" or "default"."""
    found = {path: "default" for path, _ in leaves(load(files, overrides))}
    layers = [(str(file), read_mapping(builtin_file(file))) for file in files]
    for origin, tree in [*layers, ("command line", _parse(overrides))]:
        found |= {path: origin for path, _ in leaves(tree) if path in found}
    return found


# What `rest-jax train` alone reads: evaluations, too, are greedy, of one completion a prompt, at the end of the scale.
_OF_TRAIN = {
    "rollout": {
        "prompts_per_step",
        "group_size",
        "dynamic_sampling",
        "temperature",
        "top_k",
        "top_p",
        "allow_truncated_support",
        "recompute_logprobs",
        "tis_cap",
        "replay_routing",
        "staleness",
    },
    "reward": {"progress_steps", "format_scale_start", "correctness_scale_start"},
    "train": {"prompts_per_update"},
    "weights": set(WeightsConfig.model_fields),
    "curriculum": set(CurriculumConfig.model_fields),
    "loss": LossConfig.model_fields.keys() - {"vocab_chunk", "load_balance_coefficient"},
}


def is_supervised(config: Config) -> bool:
    """Whether it is a config of `rest-jax sft`: a value of section `sft` is given. ConfigError for one of both commands."""
    if _gives_both_sizes(config):
        raise ConfigError(
            f"config {config.name}: gives rollout.prompts_per_step and sft.batch_size, so that `rest-jax train` and "
            "`rest-jax sft` take it; say which is meant: --train or --sft"
        )
    return bool(config.sft.model_fields_set)


def _gives_both_sizes(config: Config) -> bool:
    """So that it is for both commands, as what a run writes as its config is."""
    of_train, of_sft = config.rollout.model_fields_set, config.sft.model_fields_set
    return "prompts_per_step" in of_train and "batch_size" in of_sft


# How keys begin that `rest-jax sft` reads for evaluations alone, or never.
OF_EVALUATIONS = ("rollout.", "reward.", "weights.", "curriculum.")


def only_evaluated(config: Config) -> tuple[str, ...]:
    """`OF_EVALUATIONS` of a supervised config; none of one that `train` may read."""
    of_train = "prompts_per_step" in config.rollout.model_fields_set
    return () if of_train or not is_supervised(config) else OF_EVALUATIONS


def check_command(config: Config, supervised: bool) -> None:
    """ConfigError for a config of the other command, `rest-jax train` or `rest-jax sft`: it would run with this one's default
    sizes and without the method asked for. A config that gives the sizes of both is for both.
    """
    of_train = [
        f"{section}.{key}"
        for section, keys in _OF_TRAIN.items()
        for key in sorted(getattr(config, section).model_fields_set & keys)
    ]
    of_sft = [f"sft.{key}" for key in sorted(config.sft.model_fields_set)]
    foreign = of_train if supervised else of_sft
    if foreign and not _gives_both_sizes(config):
        command, other = ("sft", "train") if supervised else ("train", "sft")
        keys = f"{', '.join(foreign[:3])}{', ..' if len(foreign) > 3 else ''}"
        raise ConfigError(
            f"config {config.name}: {keys}: read by `rest-jax {other}`, not by `rest-jax {command}`; use that, or a scale and a "
            "method of this one, or give both rollout.prompts_per_step and sft.batch_size"
        )
    for key in ("measure_noise", "measure_change"):
        if supervised and getattr(config.train, key):
            raise ConfigError(f"train.{key} true: only `rest-jax train` measures it")


def builtin_file(name: Location, folder: str | None = None) -> epath.Path:
    """The file at a path, or the builtin one of that name (`scale/tiny`, `configs/method/rest.yaml`).

    With `folder`, say "sweeps", the builtin ones are those in it, with or without its name. Raises ConfigError.
    """
    path = as_path(name)
    if is_url(path):
        return path
    path = path.expanduser()
    if path.is_file():
        return path
    folders = ("scale", "method") if folder is None else (folder,)
    found = sorted(file for f in folders for file in (_BUILTIN / f).glob("*.yaml"))
    known = {f"{file.parent.name}/{file.stem}": file for file in found}
    word = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    word = word if word in known else f"{folder}/{word}"
    if word not in known:
        if _is_key(str(name)):
            raise ConfigError(f"config {name}: a value is needed: {name}=VALUE")
        said = nearest(str(name), list(known))
        raise ConfigError(f"{folder or 'config'} {name}: no such file, nor a builtin one{said}")
    return as_path(known[word])


def _is_key(word: str) -> bool:
    """Whether it is the dotted path of a value in a section."""
    section, _, key = word.partition(".")
    field = Config.model_fields.get(section)
    kind = field.annotation if field else None
    return isinstance(kind, type) and issubclass(kind, Section) and key in kind.model_fields


def read_mapping(path: Location) -> dict[str, Any]:
    """The mapping that a YAML file holds; nothing but comments is an empty one. ConfigError names file and line."""
    try:
        with store_errors(path):
            if (size := as_path(path).stat().length) > _MAX_BYTES:
                raise ConfigError(f"{path}: {size:,} bytes, a config has {_MAX_BYTES:,} at most")
            text = as_path(path).read_text()
        found = _parse_file(text)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as fault:
        if isinstance(fault, UserError):
            raise
        # ValueError: no UTF-8, or a number of thousands of digits
        said = " ".join(str(fault).split())
        if isinstance(fault, yaml.MarkedYAMLError) and fault.problem_mark is not None:
            said = f"line {fault.problem_mark.line + 1}: {fault.problem}"
        raise ConfigError(f"{path}: {said}") from fault
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a mapping is needed at the top, found a list")
    return copy.deepcopy(found)


# A comparison reads the same few files for each of its runs, and each run's own several times.
@functools.lru_cache(maxsize=512)
def _parse_file(text: str) -> Any:
    """What YAML says, `${...}` as it is written. The caller must not change it."""
    _check_yaml(text)
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


class _Refused(yaml.MarkedYAMLError):
    """What YAML reads, and a config does not mean."""


def _check_yaml(text: str) -> None:
    """_Refused for what YAML 1.1 reads with another base (010 is 8, and 1:30 is 90), and for values that are nested so deeply
    that reading them takes minutes.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        problem = None
        if depth > _DEEPEST:
            problem = f"values within each other, more than {_DEEPEST} deep"
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _bent(event.value):
            number = yaml.safe_load(event.value)
            problem = f"YAML takes {event.value} for {number}; write a decimal number, or a text in quotes"
        if problem is not None:
            raise _Refused(problem=problem, problem_mark=event.start_mark)


def _has_comment(text: str) -> bool:
    """Whether YAML leaves some of it out as a comment: between its tokens there is nothing else that has a `#`."""
    end = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return False


_bent = re.compile(
    r"[-+]?(?:0[0-7_]*[1-7][0-7_]*|[0-9_]+(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)"
).fullmatch


def validate_as(model: type[Model], mapping: Tree, name: str) -> Model:
    """The record of a plain mapping; ConfigError lists every fault after `name`, each with its dotted path."""
    try:
        return model.model_validate(mapping)
    except pydantic.ValidationError as found:
        lines = dict.fromkeys(_explain(item, model) for item in found.errors())
        raise ConfigError(f"{name}: " + "; ".join(lines)) from found


def nearest(word: str, known: Sequence[str]) -> str:
    """The nearest of the known words, in brackets; all of them when none is near."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (nearest: {found[0]})" if found else f" (known: {', '.join(known)})"


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping that `a.b=value` words make; values are YAML."""
    parsed = OmegaConf.create({})
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep or "" in key.split("."):
            raise ConfigError(f"override {override!r}: write it as section.key=value")
        if not value.strip():
            raise ConfigError(f"override {override!r}: a value is missing; null stands for none")
        try:
            _check_yaml(value)
            if _has_comment(value):
                raise _Refused(problem="` #` begins a comment; put the value in quotes of its own")
            parsed.merge_with_dotlist([override])
        except _Refused as fault:
            raise ConfigError(f"override {override!r}: {fault.problem}") from fault
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as fault:
            raise ConfigError(f"override {override!r}: the value cannot be read") from fault
    return typing.cast(dict[str, Any], OmegaConf.to_container(parsed))


def _clash(trees: Sequence[Tree]) -> str | None:
    """The path of a section that another tree has as something else."""
    sections: dict[str, bool] = {}
    for tree in trees:
        stack = [("", tree)]
        while stack:
            path, value = stack.pop()
            is_section = isinstance(value, Mapping)
            if sections.setdefault(path, is_section) != is_section:
                return path
            if isinstance(value, Mapping):
                stack += [(f"{path}.{key}".lstrip("."), below) for key, below in value.items()]
    return None


def _merge(*trees: Tree) -> dict[str, Any]:
    """The trees in one, later ones on top, with every `${...}` replaced."""
    for path, value in itertools.chain(*map(leaves, trees)):
        if value == "???":  # OmegaConf would keep what an earlier tree says
            raise ConfigError(f"{path}: ??? stands for a value that is missing; write one")
    try:
        merged = OmegaConf.merge(*trees)
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError) as fault:
        reason = str(fault).partition("\n")[0]
        where = getattr(fault, "full_key", None) or _clash(trees) or "config"
        raise ConfigError(f"{where}: {reason}") from fault
    return typing.cast(dict[str, Any], plain)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a config or plain mapping that is not a mapping itself."""
    if isinstance(tree, Section):
        tree = tree.model_dump(mode="json")
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explain(item: Any, model: type[pydantic.BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return (
            f"{path}: unknown key{nearest(str(item['loc'][-1]), _known(model, item['loc'][:-1]))}"
        )
    if item["type"] == "missing":
        return f"{path}: missing, and there is no default; set it, or name a file that has it, such as scale/tiny"
    message = item["msg"].removeprefix("Value error, ")
    value = "" if item["type"] == "value_error" else f"{item['input']!r}: "
    return f"{path}: {value}{message}" if path else message


def _known(model: type[pydantic.BaseModel], place: tuple[Any, ...]) -> list[str]:
    """The keys of the record at a place below `model`."""
    here: Any = model
    for part in place:
        if typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        else:
            fields = here.model_fields.items()
            (here,) = (f.annotation for name, f in fields if part in (name, f.alias))
        if typing.get_origin(here) in (typing.Union, types.UnionType):  # an optional record
            here = next(kind for kind in typing.get_args(here) if kind is not type(None))
    return [field.alias or name for name, field in here.model_fields.items()]
