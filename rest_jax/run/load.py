"""The policy of any source: the folder of a run (its newest sound checkpoint), or an HF folder, a hub id or a converted
folder.

`load_policy` loads it, so the checkpoint of one run is the start of another; `export` writes it as a Hugging Face folder.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from flax import linen as nn

from rest_jax import config as config_lib
from rest_jax.config import Config, MeshConfig, ModelConfig
from rest_jax.distributed import make_mesh, place
from rest_jax.models.decoder import Decoder, abstract_params, param_shardings
from rest_jax.models.hf import write as hf
from rest_jax.models.hf.read import load_model, read_config
from rest_jax.models.policy import Policy, compute_dtype
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run import checkpoint
from rest_jax.run.folder import CONFIG_FILE, MODEL_FOLDER


def load_policy(model: ModelConfig, mesh_config: MeshConfig) -> Policy:
    """Loads weights straight into their shards. UserError for a source that cannot be used."""
    mesh = make_mesh(mesh_config)
    dtype = compute_dtype(model.dtype, mesh)
    if is_run(model.source):
        folder = pathlib.Path(model.source)
        files = folder / MODEL_FOLDER
        config = dataclasses.replace(read_config(files), dtype=dtype, remat=model.remat)
        shapes = place(nn.meta.unbox(abstract_params(config)), param_shardings(config, mesh))
        params, _ = checkpoint.restore_params(folder, shapes)
    else:
        config, params, files = load_model(model.source, mesh, dtype, model.remat)
    tokenizer = Tokenizer.load(model.tokenizer or files, vocab_size=config.vocab_size)
    return Policy(Decoder(config), params, tokenizer, mesh, files)


def export(source: str, out: str | pathlib.Path, dtype: str | None = None) -> None:
    """Writes a run, a converted folder or an HF folder as the HF folder `out`, which must not exist yet. `dtype` None: as
    the source has it. UserError for a source that cannot be used.
    """
    if not is_run(source):
        hf.export(source, hf.find_source(source), out, dtype)
        return
    config = config_of(source, [])
    policy = load_policy(config.model, config.mesh)
    hf.export(policy.params, pathlib.Path(source) / MODEL_FOLDER, out, dtype)


def is_run(source: str) -> bool:
    """Whether a path is the folder of a run."""
    folder = pathlib.Path(source)
    return (folder / checkpoint.FOLDER).is_dir() and (folder / MODEL_FOLDER).is_dir()


def config_of(source: str, overrides: Sequence[str]) -> Config:
    """The config to use a model under: the run's own, for anything else the defaults; `overrides` ("key=value") on top.

    `model.source` is `source`.
    """
    path = pathlib.Path(source) / CONFIG_FILE
    if is_run(source) and path.is_file():
        config = config_lib.load([path], overrides)
    else:
        config = config_lib.from_overrides(
            {"name": "command", "model": {"source": source}}, overrides
        )
    model = config.model.model_copy(update={"source": config_lib.locate(source)})
    # A run's mesh is that of the machine it ran on; here it is what the overrides say, else all devices.
    given = [word for word in overrides if word.startswith("mesh.")]
    mesh = config.mesh if given else MeshConfig()
    return config.model_copy(update={"model": model, "mesh": mesh})
