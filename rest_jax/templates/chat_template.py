"""Chat templates for other servers: a chat with tools becomes the prompt that the policy was trained on.

`trained(name, own, brief)` puts a Jinja preamble before a model's own chat template. The preamble makes of OpenAI's messages and
tools the messages of `TEMPLATES[name].render_prompt` and hides the tools. Equal to it letter for letter, but references within a
JSON schema (`$ref`) and the names of its types are shown as they are, and hermes and llama3 show the flat form of parameters
as it is, where training makes a schema of it (`rendering.schema_parameters`): give them schemas.
"""

import json
import pathlib

from rest_jax.templates import hermes, llama3, toolrl

_FOLDER = pathlib.Path(__file__).parent / "chat"
_PLUGIN = _FOLDER / "vllm_toolrl.py"
_WORDS = {
    "toolrl": {"introduction": toolrl.INTRODUCTION, "rules": toolrl.RULES, "header": toolrl.HEADER},
    "hermes": {"before": hermes.BEFORE_TOOLS, "after": hermes.AFTER_TOOLS},
    "llama3": {"before": llama3.BEFORE_TOOLS},
}
_BRIEF = {"introduction": "", "rules": toolrl.BRIEF_FORMAT, "header": ""}


def vllm_parser(thought_opened: bool) -> str:
    """The file of the tool parser for vLLM. `thought_opened`: prompts end in an opened thought that no reasoning parser takes."""
    text = _PLUGIN.read_text("utf-8")
    return text.replace("THOUGHT_OPENED = False", f"THOUGHT_OPENED = {thought_opened}")


def trained(name: str, own: str, brief: bool = False) -> str:
    """The chat template `own` behind the preamble of the format `name`; `brief` as in training."""
    preamble = "".join((_FOLDER / f"{part}.jinja").read_text("utf-8") for part in ("common", name))
    words = _BRIEF if brief and name == "toolrl" else _WORDS[name]
    for word, text in words.items():
        preamble = preamble.replace(f"@{word}@", json.dumps(text))
    return preamble.replace("@brief@", "true" if brief else "false") + own
