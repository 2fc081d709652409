"""The array dataclasses that modules pass to each other, and the glossary of dimension letters.

Letters: B batch rows, P prompts (= groups), G responses a prompt, T time, Tp prompt time, Tr response time, S cache positions,
D model, N heads, K key/value heads, H head dim, F mlp, E experts, k experts of a token, V vocabulary, L layers, R regions
(tool_calls.NUM_REGIONS), W data shards, K parts of the reward (rewards.score.PARTS).

Layout. The unit is the prompt group: one prompt and its G responses, each stored once. Prompts are right-padded
(`prompt_length` says where they end); response token t of a group sits at position `prompt_length + t`.

Shift convention, stated once: every per-token field of a response (`logp`, `entropy`, `gini`, `region`, `weight`, mask) at
index t belongs to the token `responses[..., t]`, i.e. to the PREDICTED token; it was predicted from the hidden state one
position earlier (for t = 0: that of the last prompt token). `response_length` counts the policy's tokens, the end-of-turn
token included; fields at and after it are zero, ids are the padding id. Packed rows (`rl/packing.py`) [W, T] hold a token where
it is predicted from.

Flow: StepRecord -> PromptBatch -> RolloutBatch -> ScoredBatch -> TrainBatch -> TrainState.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt

AnyArray = Any  # NumPy rows on the host, jax arrays on the mesh: the same record on both sides
Params = Any  # nested dict of arrays: the "params" collection of the decoder


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from. `top_k` 0 and `top_p` 1: full support. `greedy`: the argmax."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


@struct.dataclass
class PromptBatch:
    """Prompts of one step. `row` is the prompt's index in the data order: it keys the sampling, not its position in the batch."""

    tokens: Int[AnyArray, "P Tp"]  # int32, right-padded
    length: Int[AnyArray, " P"]  # int32, >= 1
    row: Int[AnyArray, " P"]  # int32


@struct.dataclass
class Routes:
    """The experts that the sampler's routers chose, to be replayed in the update; uint8, or uint16 above 256 experts."""

    prompt: UInt[AnyArray, "P Tp L k"]
    responses: UInt[AnyArray, "P G Tr L k"]


@struct.dataclass
class ResponseBatch:
    """Prompts with G responses each: what a forward pass reads."""

    prompt: Int[AnyArray, "P Tp"]  # int32
    prompt_length: Int[AnyArray, " P"]  # int32
    responses: Int[AnyArray, "P G Tr"]  # int32
    response_length: Int[AnyArray, "P G"]  # int32
    # None: the routers choose (or there are none)
    routes: Routes | None = struct.field(default=None, kw_only=True)

    @property
    def mask(self) -> Bool[Array, "P G Tr"]:
        """True on the tokens of the responses."""
        return response_mask(self.response_length, self.responses.shape[-1])

    @property
    def widths(self) -> tuple[int, int]:
        """Padded positions of a prompt and of a response."""
        return self.prompt.shape[1], self.responses.shape[2]


@struct.dataclass
class RolloutBatch(ResponseBatch):
    """Sampled responses. All per-token fields follow the shift convention above."""

    logp: Float[AnyArray, "P G Tr"]  # float32, nats, of the distribution sampled from
    entropy: Float[AnyArray, "P G Tr"]  # float32, nats, temperature 1, full support
    gini: Float[AnyArray, "P G Tr"]  # float32, 1 - sum_v p^2, temperature 1, full support

    def validate(self) -> "RolloutBatch":
        """Returns self; ValueError naming the field whose shape differs from that of `responses`."""
        _check_shapes("RolloutBatch", self.responses.shape, self.logp, self.entropy, self.gini)
        _check_shapes("RolloutBatch", self.responses.shape[:2], self.response_length)
        _check_shapes("RolloutBatch", self.prompt.shape[:1], self.prompt_length)
        if self.routes is not None:
            choice = self.routes.prompt.shape[2:]
            _check_shapes("RolloutBatch", (*self.prompt.shape, *choice), self.routes.prompt)
            _check_shapes("RolloutBatch", (*self.responses.shape, *choice), self.routes.responses)
        return self


@struct.dataclass
class ScoredBatch:
    """A rollout with what the host read in its text: regions and rewards."""

    rollout: RolloutBatch
    region: Int[AnyArray, "P G Tr"]  # int8, tool_calls.Region; NONE at and after response_length
    reward: Float[AnyArray, "P G"]  # float32, the sum of the scaled parts
    format_score: Float[AnyArray, "P G"]  # float32, S_format in [0, 1]
    parts: Float[AnyArray, "P G K"]  # float32, scaled
    exact: Bool[AnyArray, "P G"]  # in the format, with exactly the gold calls
    # tokens of the phrases that a rule asks for; None: no rule does
    marked: Bool[AnyArray, "P G Tr"] | None = None

    def validate(self) -> "ScoredBatch":
        """Returns self; ValueError naming shapes that disagree."""
        self.rollout.validate()
        _check_shapes("ScoredBatch", self.rollout.responses.shape, self.region)
        completions = self.reward, self.format_score, self.exact, self.parts[..., 0]
        _check_shapes("ScoredBatch", self.rollout.responses.shape[:2], *completions)
        if self.marked is not None:
            _check_shapes("ScoredBatch", self.rollout.responses.shape, self.marked)
        return self


@struct.dataclass
class TrainBatch(ResponseBatch):
    """What the update reads. The two coefficients hold their global denominators and carry no gradient; they are zero
    outside the mask (`rl/loss.py`).
    """

    logp_old: Float[Array, "P G Tr"]  # float32
    logp_ref: Float[Array, "P G Tr"] | None  # float32; None unless a KL term is on
    advantage: Float[Array, "P G *Tr"]  # float32, of a completion or of each of its tokens
    loss_weight: Float[Array, "P G Tr"]  # float32, factor of the policy loss
    regulariser: Float[Array, "P G Tr"]  # float32, factor of KL and entropy terms


@struct.dataclass
class CurriculumState:
    """State of the token weights (docs/method.md section 5). Every field is an array, so it is saved bit for bit."""

    step: Int[Array, ""]  # int32, updates seen
    nu: Float[Array, ""]  # float32, progress in [0, 1]
    # what the base weights follow: measured at the start and fixed, or moving averages (`weights.entropy`)
    entropy: Float[Array, " R"]  # float32, mean entropy of each region, nats
    gini: Float[Array, " R"]  # float32, mean 1 - sum p^2
    base_count: Float[Array, " R"]  # float32, tokens a batch
    seen: Int[Array, " R"]  # int32, batches in which a region occurred; 0: not yet measured
    # a region that is absent from a batch keeps its average
    count: Float[Array, " R"]  # float32, EMA of the number of tokens a batch
    weight: Float[Array, " R"]  # float32, region weights in force
    format_score: Float[Array, ""]  # float32, EMA of S_format


@struct.dataclass
class TrainState:
    """All state of training: a step maps one to the next; the one thing to checkpoint."""

    step: Int[Array, ""]  # int32, rollout steps taken (supervised: optimiser updates)
    params: Params  # float32 master weights; with LoRA those of the adapters alone
    opt_state: Any
    rng: Key[Array, ""]  # the run's key; never split, only folded with (step, row, sample)
    curriculum: CurriculumState


def response_mask(length: Int[Array, "..."], size: int) -> Bool[Array, "... T"]:
    """True where index < length, on a new last axis of `size`."""
    return jnp.arange(size) < length[..., None]


def _check_shapes(record: str, shape: tuple[int, ...], *fields: AnyArray) -> None:
    for field in fields:
        if field.shape != tuple(shape):
            raise ValueError(
                f"{record}: a field of shape {field.shape} where {tuple(shape)} is needed"
            )
