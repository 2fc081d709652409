"""Adapters of LoRA as a folder of peft's: adapter_config.json and adapter_model.safetensors.

Its tensors are float32 [r, in] and [out, r] under the names of the Hugging Face model's modules (`table.adapter_table`). What
such a folder asks for and the decoder does not compute is refused by name. (https://huggingface.co/docs/peft, LoraConfig.)
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from rest_jax.distributed import is_first_process
from rest_jax.files import atomic_folder, check_links
from rest_jax.models.config import DecoderConfig, Lora
from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.folder import read_json, write_json
from rest_jax.models.hf.placement import Weights
from rest_jax.models.hf.read import in_hf_files, tensor_faults
from rest_jax.models.hf.safetensors import DTYPES, scan_file
from rest_jax.models.hf.table import adapter_table
from rest_jax.texts import warn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of adapter_config.json under which the product would be another one, or other parameters would be trained; true, or what
# is not empty, asks for it.
_REFUSED = (
    "use_dora", "use_rslora", "use_qalora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layer_replication", "trainable_token_indices", "target_parameters", "fan_in_fan_out",
    "alora_invocation_tokens", "arrow_config", "megatron_config", "loftq_config", "corda_config", "lora_ga_config",
    "use_bdlora",
)  # fmt: skip
# Under the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) the weights of the model are changed, too, and the folder has not those.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def open_adapter(folder: pathlib.Path, cfg: DecoderConfig, source: str) -> list[Weights]:
    """The adapters in a folder, to be read in parts. ConversionError unless they are those of `cfg.lora`, and of the model
    `source` as far as the folder tells.
    """
    lora = cfg.lora
    assert lora is not None
    check_links(folder)
    config = read_json(folder / CONFIG)
    _check_config(folder, config, lora)
    _check_base(folder, config.get("base_model_name_or_path"), source)
    if not (folder / WEIGHTS).is_file():
        raise ConversionError(f"{folder / WEIGHTS}: no such file; save the adapters as safetensors")
    stored = {tensor.name: tensor for tensor in scan_file(folder / WEIGHTS)}
    found = re.findall(r"\.(\w+)_proj\.lora_A\.", " ".join(stored))
    if set(found) != set(lora.targets):
        there = ",".join(dict.fromkeys(found)) or "none that are known"
        raise ConversionError(
            f"{folder}: adapters of {there}, and lora.targets are {','.join(lora.targets)}; set lora.targets=[{there}]"
        )
    specs = adapter_table(cfg)
    expected = {name: spec.hf_shape for spec in specs for name in spec.hf_names()}
    if faults := tensor_faults(expected, stored):
        raise ConversionError(f"{folder} ({cfg.family}): {'; '.join(faults)}")
    return [in_hf_files(spec, stored) for spec in specs]


def write_adapter(
    adapters: Sequence[Weights], cfg: DecoderConfig, source: str, out: Any, dtype: str | None = None
) -> None:
    """Writes adapters (`cfg.lora`) of the model `source` as the folder `out`, all or nothing. `dtype` None: float32."""
    lora = cfg.lora
    assert lora is not None
    kinds = {str(known): known for known in DTYPES.values()}
    tensors = {}
    for one in adapters:
        for layer, name in enumerate(one.spec.hf_names()):
            whole = map(slice, one.shape[1:])
            value = one.spec.to_hf(one.read((slice(layer, layer + 1), *whole))[0])
            tensors[name] = np.ascontiguousarray(value.astype(kinds[dtype or "float32"]))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [f"{name}_proj" for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with atomic_folder(out) as work:
        safetensors.numpy.save_file(tensors, work / WEIGHTS, {"format": "pt"})
        write_json(work / CONFIG, config)


def _check_config(folder: pathlib.Path, config: dict[str, Any], lora: Lora) -> None:
    kind = config.get("peft_type")
    refused = [] if kind == "LORA" else [f"peft_type {str(kind)[:80]}"]
    refused += [f"{key} {str(config[key])[:80]}" for key in _REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append(f"bias {str(config['bias'])[:80]}")
    if (begun := config.get("init_lora_weights")) not in _BEGINNINGS:
        refused.append(
            f"init_lora_weights {str(begun)[:80]}, which changes the model besides (peft saves it as plain adapters with "
            f"save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    if refused:
        raise ConversionError(f"{folder / CONFIG} asks for {'; '.join(refused)}: not supported")
    # peft's own defaults
    there = {"lora.rank": config.get("r", 8), "lora.alpha": config.get("lora_alpha", 8)}
    here = {"lora.rank": lora.rank, "lora.alpha": lora.alpha}
    if other := [key for key in there if there[key] != here[key]]:
        values = " ".join(f"{key}={str(there[key])[:80]}" for key in other)
        raise ConversionError(
            f"{folder / CONFIG}: r {there['lora.rank']}, lora_alpha {there['lora.alpha']}, and this run has rank {lora.rank}, "
            f"alpha {lora.alpha:g}; set {values}"
        )


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _check_base(folder: pathlib.Path, named: Any, source: str) -> None:
    """ConversionError for two hub ids that differ; a folder may have any name, so that there is only a warning."""
    if not named or named == source:
        return
    on_hub = [
        bool(_HUB_ID.fullmatch(str(name))) and not pathlib.Path(name).exists()
        for name in (named, source)
    ]
    said = f"{folder / CONFIG}: adapters of {str(named)[:200]}, and model.source is {source}"
    if all(on_hub):
        raise ConversionError(f"{said}; set model.source={named}")
    if pathlib.Path(str(named)).name != pathlib.Path(source).name and is_first_process():
        warn(said)
