"""The policy of any source: the folder of a run (its newest sound checkpoint), or an HF folder, a hub id or a converted
folder.

`load_policy` loads it, so the checkpoint of one run is the start of another, and `load_trained` with the adapters of LoRA where
a config asks for them; `export` writes it as a Hugging Face folder or its adapters as one of peft, and `convert` makes a
converted folder of one.

The checkpoints of a run with LoRA hold adapters alone. The weights that they belong to are read from the `model.source` of its
config.yaml, compared with the digest that the checkpoint has of them, and merged.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from rest_jax import config as config_lib
from rest_jax.config import Config, Dtype, MeshConfig, ModelConfig
from rest_jax.distributed import any_process, is_first_process, make_mesh, with_tensor
from rest_jax.errors import UserError
from rest_jax.files import absolute, as_path, fetch_folder, is_url, store_errors
from rest_jax.models.config import DecoderConfig, Lora
from rest_jax.models.decoder import Decoder, adapter_shardings, init_adapters, param_shardings
from rest_jax.models.hf import peft
from rest_jax.models.hf import write as hf
from rest_jax.models.hf.folder import find_source
from rest_jax.models.hf.placement import Weights
from rest_jax.models.hf.read import (
    Report,
    load_model,
    open_adapters,
    open_weights,
    read_config,
    read_params,
    silent,
    verify,
)
from rest_jax.models.lora import make_lora, merge_all, merge_opened
from rest_jax.models.policy import Policy, attention_of, compute_dtype
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.plugins import named
from rest_jax.run import card, checkpoint
from rest_jax.run.contents import digest_merged, digest_opened, digest_params, find_base
from rest_jax.run.folder import CONFIG_FILE, MODEL_FOLDER
from rest_jax.run.metrics import run_files
from rest_jax.run.progress import Transfer
from rest_jax.texts import warn
from rest_jax.types import Params


def load_policy(
    model: ModelConfig,
    mesh_config: MeshConfig,
    rollout_tensor: int | None = None,
    weights: Dtype = "float32",
) -> Policy:
    """Loads weights straight into their shards. `rollout_tensor` is the tensor size of rollouts; None: that of the mesh.
    `weights`: the dtype of matrices; auto: that of the computation. UserError for a source that cannot be used.
    """
    mesh = make_mesh(mesh_config)
    dtype = compute_dtype(model.dtype, mesh)
    rollout_mesh = mesh if rollout_tensor is None else with_tensor(mesh, rollout_tensor)
    with _transfer("load") as report:
        kept = dtype if weights == "auto" else jnp.dtype(weights)
        config, params, files, merged = _load_weights(model.source, mesh, kept, report)
    config = dataclasses.replace(
        config, dtype=dtype, remat=model.remat, attention=attention_of(mesh)
    )
    source = model.tokenizer or files
    source = fetch_folder(source) if is_url(source) else source
    tokenizer = Tokenizer.load(source, vocab_size=config.vocab_size)
    decoder, digest = Decoder(config), merged and merged(kept)
    return Policy(decoder, params, tokenizer, mesh, rollout_mesh, files, digest=digest)


def load_trained(config: Config) -> Policy:
    """The policy that a run trains. With LoRA its weights are frozen and have `lora.base_dtype`, and its adapters are fresh or
    those of `lora.adapter`. UserError for a source that cannot be used.
    """
    lora = config.lora
    if lora.rank is None:
        return load_policy(config.model, config.mesh, config.rollout.tensor)
    policy = load_policy(config.model, config.mesh, config.rollout.tensor, lora.base_dtype)
    cfg = dataclasses.replace(policy.config, lora=make_lora(lora, policy.config))
    shardings = adapter_shardings(cfg, policy.mesh)
    if lora.adapter is None:
        make = functools.partial(_fresh_adapters, cfg, config.seed)
        adapters = jax.jit(make, out_shardings=shardings)()
    else:
        opened = peft.open_adapter(pathlib.Path(lora.adapter), cfg, config.model.source)
        adapters = read_params(opened, shardings, jnp.float32)
    return dataclasses.replace(policy, decoder=Decoder(cfg), adapters=adapters)


def _fresh_adapters(cfg: DecoderConfig, seed: int) -> Params:
    return init_adapters(cfg, jax.random.key(seed))


class _Loaded(NamedTuple):
    """Sizes, weights in the layout of training, the folder of the side files."""

    config: DecoderConfig
    params: Params
    files: pathlib.Path
    merged: Callable[[Any], str] | None = None  # of merged weights: their digest in a dtype


def _load_weights(source: str, mesh: Mesh, dtype: jnp.dtype, report: Report) -> _Loaded:
    """The weights of a source, matrices as `dtype`."""
    if not is_run(source):
        return _Loaded(*load_model(source, mesh, jnp.float32, "block", report, dtype))
    saved, _ = checkpoint.newest_params(source)
    files = fetch_folder(checkpoint.run_of(source) / MODEL_FOLDER)
    cfg, run = read_config(files), _lora_run(source)
    if run is None:
        weights = open_weights(saved, cfg)
        return _Loaded(cfg, read_params(weights, param_shardings(cfg, mesh), dtype, report), files)
    with _naming_base(source, run):
        _, base, _, merged = _load_weights(run.model.source, mesh, jnp.dtype("float32"), report)
    kept, digest = find_base(merged or functools.partial(digest_params, base), saved.parent)
    lora = _lora_of(run, cfg)
    adapted = dataclasses.replace(cfg, lora=lora)
    adapters = read_params(
        open_adapters(saved, adapted), adapter_shardings(adapted, mesh), jnp.float32
    )
    merged = functools.partial(digest_merged, digest, digest_params(adapters))
    return _Loaded(cfg, merge_all(base, adapters, lora.scale, (kept, dtype)), files, merged)


def _open_weights(source: str) -> tuple[list[Weights], Callable[[Any], str]]:
    """The weights of a source, to be read in parts on the host, and their digest in a dtype."""
    if not is_run(source):
        folder = find_source(source)
        verify(folder)
        opened = open_weights(folder, read_config(folder))
        return opened, functools.partial(digest_opened, opened)
    saved, _ = checkpoint.newest_params(source)
    cfg = read_config(fetch_folder(checkpoint.run_of(source) / MODEL_FOLDER))
    run = _lora_run(source)
    if run is None:
        opened = open_weights(saved, cfg)
        return opened, functools.partial(digest_opened, opened)
    with _naming_base(source, run):
        base, base_digest = _open_weights(run.model.source)
    kept, digest = find_base(base_digest, saved.parent)
    lora = _lora_of(run, cfg)
    adapters = open_adapters(saved, dataclasses.replace(cfg, lora=lora))
    merged = functools.partial(digest_merged, digest, digest_opened(adapters))
    return merge_opened(base, adapters, lora.scale, kept), merged


def _lora_run(source: str) -> Config | None:
    """The config of a run whose checkpoints hold adapters; None for another one."""
    path = checkpoint.run_of(source) / CONFIG_FILE
    if not path.is_file():
        return None
    run = config_lib.load([path], [])
    if run.lora.rank is None:
        return None
    found = {os.path.realpath(checkpoint.run_of(source))}
    base = run
    while is_run(base.model.source):
        place = os.path.realpath(checkpoint.run_of(base.model.source))
        if place in found:
            raise UserError(
                f"{path}: model.source leads back to {place}; name the weights that it began with"
            )
        found.add(place)
        base = config_lib.load([as_path(place) / CONFIG_FILE], [])
    return run


def _lora_of(run: Config, cfg: DecoderConfig) -> Lora:
    lora = make_lora(run.lora, cfg)
    assert lora is not None
    return lora


@contextlib.contextmanager
def _naming_base(source: str, run: Config) -> Iterator[None]:
    """Around the loading of the weights that the adapters of a run belong to."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{source}: its checkpoints are adapters of {run.model.source}: {error}; put that back, or say in "
            f"{checkpoint.run_of(source) / CONFIG_FILE} where it is (model.source)"
        ) from error


def export(
    source: str, out: str | pathlib.Path, dtype: str | None = None, adapter: bool = False
) -> None:
    """Writes a run, a converted folder or an HF folder as the HF folder `out`, which must not exist yet. `dtype` None: as
    the source has it. A run's has the side files of `card.py`, too, and its generation_config.json names the ids that ended its
    completions. `adapter`: the adapters of a run with LoRA alone, as a folder of peft's. UserError for a source that cannot be
    used.

    It needs no accelerator and little memory. Of several processes, which all call it, the first writes.
    """
    run = _lora_run(source) if is_run(source) else None
    if adapter:
        _export_adapter(source, run, out, dtype)
        return
    newest = None
    if is_run(source):
        params, _ = checkpoint.newest_params(source)
        newest = params.parent
        weights = _open_weights(source)[0] if run else params
        files = fetch_folder(checkpoint.run_of(source) / MODEL_FOLDER)
    else:
        weights = files = find_source(source)
    if is_first_process():
        texts = {}
        if newest is not None:
            tokenizer = Tokenizer.load(files)
            texts = tokenizer.generation_config(files)
            # without it nobody knows how the run was trained
            if (path := checkpoint.run_of(source) / CONFIG_FILE).is_file():
                config = config_lib.load([path], [])
                run_folder = str(checkpoint.run_of(source))
                texts |= card.side_files(run_folder, newest, config, tokenizer, out)
        with _transfer("export") as report:
            hf.export(weights, files, out, dtype, report, texts)
    # No process ends before the folder is there: the end of one would be taken for a failure.
    any_process(False)


def _export_adapter(
    source: str, run: Config | None, out: str | pathlib.Path, dtype: str | None
) -> None:
    if run is None:
        raise UserError(f"export --adapter {source}: not a run with LoRA (lora.rank)")
    saved, _ = checkpoint.newest_params(source)
    if is_first_process():
        cfg = read_config(fetch_folder(checkpoint.run_of(source) / MODEL_FOLDER))
        cfg = dataclasses.replace(cfg, lora=_lora_of(run, cfg))
        peft.write_adapter(open_adapters(saved, cfg), cfg, run.model.source, out, dtype)
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


def model_files(source: str) -> list[epath.Path]:
    """What a command that is given a model reads: no output of it may lie there."""
    return run_files(checkpoint.run_of(source)) if is_run(source) else [as_path(source)]


def is_run(source: str) -> bool:
    """Whether a path or URL is the folder of a run, or of one of its checkpoints."""
    folder = checkpoint.run_of(source)
    with store_errors(folder):
        # In a store a folder without files does not exist.
        begun = is_url(folder) or (folder / checkpoint.FOLDER).is_dir()
        return begun and (folder / MODEL_FOLDER).is_dir()


def result_place(source: str, name: str) -> epath.Path | None:
    """Where a result on a run belongs: `name` in its folder, with the step in it for a checkpoint. None for other models."""
    if not is_run(source):
        return None
    run, path = absolute(checkpoint.run_of(source)), absolute(source)
    stem, dot, suffix = name.partition(".")
    return run / name if run == path else run / f"{stem}-step{path.name}{dot}{suffix}"


def config_of(source: str, overrides: Sequence[str], plugins: bool = False) -> Config:
    """The config to use a model under: the run's own, of an export what it has recorded (`card.USE_KEYS`), for anything else the
    defaults; `overrides` ("key=value") on top.

    `model.source` is `source`. Whoever made a run chose its plug-ins, not who uses it: those that its own config names are left
    out, and said, unless `plugins` asks for them.
    """
    path = checkpoint.run_of(source) / CONFIG_FILE
    if is_run(source) and path.is_file():
        found = {} if plugins else named(config_lib.load([path]))
        for key, word in found.items():
            # Not `say`: the processes have not joined yet.
            warn(
                f"{source}: its config names {key} {word}; it is not run unless --plugins asks for it"
            )
        left_out = [f"{key}=null" for key in found]
        left_out += ["reward.builtin=true"] if "reward.plugin" in found else []
        config = config_lib.load([path], [*left_out, *overrides])
    else:
        config = config_lib.from_overrides(
            {"name": "command", "model": {"source": source}},
            [*card.recorded_use(config_lib.locate(source)), *overrides],
        )
    model = config.model.model_copy(update={"source": config_lib.locate(source)})
    # A run's mesh is that of the machine it ran on; here it is what the overrides say, else all devices.
    given = [word for word in overrides if word.startswith("mesh.")]
    mesh = config.mesh if given else MeshConfig()
    return config.model_copy(update={"model": model, "mesh": mesh})
