"""Makes the quickstart's starting policy: about 1 M parameters, Qwen3 architecture, own byte-level BPE, supervised on
demonstrations of the synthetic tool world by a demonstrator with bad habits (`rest_jax/data/synthetic/world.py`, table HABITS).

    python tools/make_quickstart_policy.py OUT [key=value ...]

Three steps: train the tokenizer; write an HF folder with initial weights (`induction_start.py`); run
`rest-jax sft tools/quickstart_sft.yaml` from it and export the result to OUT. Interrupted, it resumes where it
stopped. The committed policy is OUT = configs/quickstart_policy.
Hardware and time: 2 CPU cores, see tools/quickstart_sft.yaml.
"""

import json
import pathlib
import sys

from induction_start import induction_start
from tiny_tokenizer import train_tokenizer

from rest_jax import config as config_lib
from rest_jax import sft
from rest_jax.cli import main as rest_jax
from rest_jax.data.synthetic import world as synthetic
from rest_jax.models.hf.config import decoder_config
from rest_jax.models.hf.write import export
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.metrics import METRICS_FILE, read_lines
from rest_jax.templates import TEMPLATES

CONFIG = pathlib.Path(__file__).parent / "quickstart_sft.yaml"
TOKENIZER_RECORDS, VOCABULARY = 4000, 768
ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write_start(folder: pathlib.Path, template: str, seed: int) -> None:
    """Tokenizer, config and initial weights as an HF folder."""
    form = TEMPLATES[template]
    records = synthetic.demonstrations("train", seed, TOKENIZER_RECORDS)
    prompts = (
        "\n".join(m["content"] for m in r.prompt_messages(form, brief=True)) for r in records
    )
    texts = [p + form.render_answer(r.target) for p, r in zip(prompts, records, strict=True)]
    files = folder.with_name(folder.name + "-files")
    train_tokenizer(texts, VOCABULARY, files)
    tokenizer = Tokenizer.load(files)
    ids = {"eos_token_id": tokenizer.stop_ids[0], "pad_token_id": tokenizer.pad_id}
    config = ARCHITECTURE | {"vocab_size": tokenizer.vocab_size} | ids
    (files / "config.json").write_text(json.dumps(config, indent=2))
    (files / "generation_config.json").write_text(json.dumps(ids, indent=2))
    export(induction_start(decoder_config(config), seed), files, folder)


def main(out: str, overrides: list[str]) -> int:
    """The three steps; 0 when OUT is written."""
    config = config_lib.load([CONFIG], overrides)
    start = pathlib.Path(config.model.source)
    if not start.exists():
        write_start(start, config.data.template, config.seed)
    sft.finetune(config)
    run = config.folder
    done = [line["step"] for line in read_lines(run / METRICS_FILE) if "update/loss" in line]
    if done[-1] != config.train.steps:
        return 0  # SIGTERM: the same command resumes
    return rest_jax(["export", str(run), out])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
