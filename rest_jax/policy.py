"""A policy ready to run: decoder, sharded weights, tokenizer, mesh. What train, sft, generate, evaluate and export start from.

`source` is an HF folder, a hub id, a folder made by `rest-jax convert`, or a run folder (its newest sound checkpoint), so
that a checkpoint of one run is the start of another without conversion.
"""

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax import checkpoint
from rest_jax.config import MeshConfig, ModelConfig, RolloutConfig
from rest_jax.models import hf
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder, abstract_params
from rest_jax.models.folder import read_json
from rest_jax.models.hf_config import decoder_config
from rest_jax.rl import curriculum
from rest_jax.rl.logprobs import Sampling
from rest_jax.rollout.engine import RolloutSettings, make_cast
from rest_jax.rollout.scheduler import Sampler, make_sampler
from rest_jax.run import MODEL_FOLDER
from rest_jax.sharding import make_mesh, param_shardings, tree_shardings_like
from rest_jax.tokenizer import Tokenizer
from rest_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Policy:
    """Decoder and float32 master weights in the train layout, with all that goes with them."""

    decoder: Decoder
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    files: pathlib.Path  # folder of the HF side files

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the decoder."""
        return self.decoder.cfg

    @property
    def rollout_decoder(self) -> Decoder:
        """The decoder of rollouts. On CPU its layers are written out: a loop over stacked weights would copy each layer's
        weights for every token.
        """
        layers = "unroll" if jax.default_backend() == "cpu" else "scan"
        return Decoder(dataclasses.replace(self.config, layers=layers, remat="none"))

    def shardings(self, layout: Literal["train", "rollout"]) -> Params:
        """Shardings of the weights: layout `train` (fsdp and tensor) or `rollout` (tensor only, for `rollout_decoder`)."""
        config = self.config if layout == "train" else self.rollout_decoder.cfg
        return param_shardings(config, self.mesh, layout=layout)

    def rollout_cast(self):
        """Function from train weights to rollout weights."""
        unstack = self.rollout_decoder.cfg.layers == "unroll"
        return make_cast(self.config.dtype, self.shardings("rollout"), unstack=unstack)

    def make_sampler(
        self, group_size: int, max_tokens: int, sampling: Sampling, rollout: RolloutConfig
    ) -> Sampler:
        """A sampler of this policy; lanes and prompt slots as in `rollout`. Weights come from `rollout_cast`."""
        settings = RolloutSettings(
            group_size=group_size,
            max_tokens=max_tokens,
            stop_ids=self.tokenizer.stop_ids,
            pad_id=self.tokenizer.pad_id,
            sampling=sampling,
            lanes=rollout.lanes,
            prompt_slots=rollout.prompt_slots if group_size > 1 else None,
            # fewer sizes where compilation is dear
            ratio=2 if jax.default_backend() == "cpu" else 4,
        )
        return make_sampler(self.rollout_decoder, settings, self.mesh, self.shardings("rollout"))


def compute_dtype(name: str) -> jnp.dtype:
    """`auto`: float32 on CPU, bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_policy(model: ModelConfig, mesh_config: MeshConfig) -> Policy:
    """Loads weights straight into their shards. UserError for a source that cannot be used."""
    mesh = make_mesh(mesh_config)
    dtype = compute_dtype(model.dtype)
    if is_run(model.source):
        config, params, files = _load_run(pathlib.Path(model.source), mesh, dtype, model.remat)
    else:
        loaded = hf.load_model(model.source, mesh, dtype, model.remat)
        config, params, files = loaded.config, loaded.params, loaded.files
    tokenizer = Tokenizer.load(model.tokenizer or files, vocab_size=config.vocab_size)
    return Policy(Decoder(config), params, tokenizer, mesh, files)


def is_run(source: str) -> bool:
    """Whether a path is the folder of a run."""
    folder = pathlib.Path(source)
    return (folder / checkpoint.FOLDER).is_dir() and (folder / MODEL_FOLDER).is_dir()


def _load_run(
    folder: pathlib.Path, mesh: Mesh, dtype: Any, remat: Any
) -> tuple[DecoderConfig, Params, pathlib.Path]:
    files = folder / MODEL_FOLDER
    sizes = decoder_config(read_json(files / "config.json"))
    config = dataclasses.replace(sizes, dtype=dtype, remat=remat)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.meta.unbox(abstract_params(config)),
        param_shardings(config, mesh, layout="train"),
    )
    params, _ = checkpoint.restore_params(folder, shapes)
    return config, params, files


def init_state(
    policy: Policy, tx: optax.GradientTransformation, schedule: curriculum.Schedule, seed: int
) -> tuple[TrainState, TrainState, TrainState]:
    """(state, abstract state with shardings, shardings). The optimiser's state is born sharded; the policy's weights
    move into the state (they are donated).
    """
    everywhere = NamedSharding(policy.mesh, PartitionSpec())
    params_at = policy.shardings("train")

    def make(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            rng=jax.random.key(seed),
            curriculum=curriculum.init(schedule),
        )

    shapes = jax.eval_shape(make, policy.params)
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, shapes),
        params=params_at,
        opt_state=tree_shardings_like(shapes.opt_state, policy.params, params_at),
    )
    state = jax.jit(make, out_shardings=shardings, donate_argnums=0)(policy.params)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return state, abstract, shardings
