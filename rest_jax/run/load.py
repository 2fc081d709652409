"""The policy of any source: the folder of a run (its newest sound checkpoint), or an HF folder, a hub id or a converted
folder.

`load_policy` loads it, so the checkpoint of one run is the start of another; `export` writes it as a Hugging Face folder, and
`convert` makes a converted folder of one.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from rest_jax import config as config_lib
from rest_jax.config import Config, MeshConfig, ModelConfig
from rest_jax.distributed import any_process, is_first_process, make_mesh, with_tensor
from rest_jax.files import as_path, fetch_folder, is_url, store_errors
from rest_jax.models.decoder import Decoder, param_shardings
from rest_jax.models.hf import write as hf
from rest_jax.models.hf.folder import find_source
from rest_jax.models.hf.read import (
    Report,
    load_model,
    open_weights,
    read_config,
    read_params,
    silent,
)
from rest_jax.models.policy import Policy, attention_of, compute_dtype
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.plugins import named
from rest_jax.run import card, checkpoint
from rest_jax.run.folder import CONFIG_FILE, MODEL_FOLDER
from rest_jax.run.progress import Transfer


def load_policy(
    model: ModelConfig, mesh_config: MeshConfig, rollout_tensor: int | None = None
) -> Policy:
    """Loads weights straight into their shards. `rollout_tensor` is the tensor size of rollouts; None: that of the mesh.
    UserError for a source that cannot be used.
    """
    mesh = make_mesh(mesh_config)
    dtype = compute_dtype(model.dtype, mesh)
    rollout_mesh = mesh if rollout_tensor is None else with_tensor(mesh, rollout_tensor)
    with _transfer("load") as report:
        if is_run(model.source):
            saved, _ = checkpoint.newest_params(model.source)
            files = fetch_folder(as_path(model.source) / MODEL_FOLDER)
            config = dataclasses.replace(read_config(files), dtype=dtype, remat=model.remat)
            shardings = param_shardings(config, mesh)
            params = read_params(open_weights(saved, config), shardings, jnp.float32, report)
        else:
            config, params, files = load_model(model.source, mesh, dtype, model.remat, report)
    config = dataclasses.replace(config, attention=attention_of(mesh))
    source = model.tokenizer or files
    source = fetch_folder(source) if is_url(source) else source
    tokenizer = Tokenizer.load(source, vocab_size=config.vocab_size)
    return Policy(Decoder(config), params, tokenizer, mesh, rollout_mesh, files)


def export(source: str, out: str | pathlib.Path, dtype: str | None = None) -> None:
    """Writes a run, a converted folder or an HF folder as the HF folder `out`, which must not exist yet. `dtype` None: as
    the source has it. A run's has the side files of `card.py`, too. UserError for a source that cannot be used.

    It needs no accelerator and little memory. Of several processes, which all call it, the first writes.
    """
    if is_run(source):
        weights = checkpoint.newest_params(source)[0]
        files = fetch_folder(as_path(source) / MODEL_FOLDER)
    else:
        weights = files = find_source(source)
    if is_first_process():
        texts = None
        # without it nobody knows how the run was trained
        if is_run(source) and (path := as_path(source) / CONFIG_FILE).is_file():
            config = config_lib.load([path], [])
            tokenizer = Tokenizer.load(config.model.tokenizer or files)
            texts = card.side_files(source, config, tokenizer, out)
        with _transfer("export") as report:
            hf.export(weights, files, out, dtype, report, texts)
    # No process ends before the folder is there: the end of one would be taken for a failure.
    any_process(False)


def convert(source: str, out: str | pathlib.Path) -> None:
    """Writes an HF folder or hub id as the converted folder `out`, which must not exist yet. UserError for a source that
    cannot be used.
    """
    with _transfer("convert") as report:
        hf.convert(source, out, report)


def _transfer(label: str) -> contextlib.AbstractContextManager[Report]:
    """Progress of the first process; the others are silent."""
    return Transfer(label) if is_first_process() else contextlib.nullcontext(silent)


def is_run(source: str) -> bool:
    """Whether a path or URL is the folder of a run."""
    folder = as_path(source)
    with store_errors(folder):
        # In a store a folder without files does not exist.
        begun = is_url(folder) or (folder / checkpoint.FOLDER).is_dir()
        return begun and (folder / MODEL_FOLDER).is_dir()


def config_of(source: str, overrides: Sequence[str], plugins: bool = False) -> Config:
    """The config to use a model under: the run's own, for anything else the defaults; `overrides` ("key=value") on top.

    `model.source` is `source`. Whoever made a run chose its plug-ins, not who uses it: those that its own config names are left
    out, and said, unless `plugins` asks for them.
    """
    path = as_path(source) / CONFIG_FILE
    if is_run(source) and path.is_file():
        found = {} if plugins else named(config_lib.load([path]))
        for key, word in found.items():
            # Not `say`: the processes have not joined yet.
            said = f"{source}: its config names {key} {word}; it is not run unless --plugins asks for it"
            print(said, file=sys.stderr)
        left_out = [f"{key}=null" for key in found]
        left_out += ["reward.builtin=true"] if "reward.plugin" in found else []
        config = config_lib.load([path], [*left_out, *overrides])
    else:
        config = config_lib.from_overrides(
            {"name": "command", "model": {"source": source}}, overrides
        )
    model = config.model.model_copy(update={"source": config_lib.locate(source)})
    # A run's mesh is that of the machine it ran on; here it is what the overrides say, else all devices.
    given = [word for word in overrides if word.startswith("mesh.")]
    mesh = config.mesh if given else MeshConfig()
    return config.model_copy(update={"model": model, "mesh": mesh})
