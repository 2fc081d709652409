"""What `rest-jax export` writes beside the weights of a run, for people and for other servers:

tool_chat_template.jinja   OpenAI's messages and tools as the prompt of training
toolrl_tool_parser.py      for vLLM, of runs in the toolrl format
rest_jax_use.json          template and lengths of training, which `config_of` (load.py) takes as the config of the folder
README.md                  the model card: how to serve it, figures of the run, what it was made of
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

import rest_jax
from rest_jax.config import Config, ConfigError, LossConfig, dump, from_overrides, read_mapping
from rest_jax.errors import UserError
from rest_jax.files import Location, as_path, file_digest
from rest_jax.models.hf.folder import small_file
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run import checkpoint
from rest_jax.run.contents import MADE_OF
from rest_jax.run.metrics import METRICS_FILE, is_eval, metric, read_lines
from rest_jax.run.record import certificate_rows, read_certificate
from rest_jax.run.results import Result, checkpoint_digest, read_results
from rest_jax.templates import TEMPLATES
from rest_jax.templates.chat_template import trained, vllm_parser

CHAT_TEMPLATE, PARSER, CARD = "tool_chat_template.jinja", "toolrl_tool_parser.py", "README.md"
# A name with .json, so that it is copied and downloaded with the other side files of a model.
USE_FILE = "rest_jax_use.json"
# What of a config says how the policy is asked. Nothing in such a file can name code: others may have made it.
USE_KEYS = (
    "data.template",
    "data.brief_prompt",
    "data.max_prompt_tokens",
    "rollout.max_response_tokens",
)
_VLLM_PARSERS = {"toolrl": "toolrl", "hermes": "hermes", "llama3": "llama3_json"}


def side_files(
    run: Location,
    newest: epath.Path,
    config: Config,
    tokenizer: Tokenizer,
    out: str | pathlib.Path,
) -> dict[str, str]:
    """The texts of these files by name, for a run, which may have moved since, whose checkpoint `newest` is exported as `out`.

    One process alone calls it: nothing in here may wait for the others.
    """
    name = config.data.template
    files = {USE_FILE: json.dumps(_use(config), indent=2) + "\n"}
    if tokenizer.hf.chat_template and not tokenizer.lists_tools(TEMPLATES[name].request):
        own = tokenizer.hf.get_chat_template()
        files[CHAT_TEMPLATE] = trained(name, own, config.data.brief_prompt)
    if name == "toolrl":
        files[PARSER] = vllm_parser(tokenizer.thought_open and not _reads_thoughts(tokenizer))
    folder = pathlib.Path(out).name
    command = vllm_command(config, tokenizer, list(files), folder)
    return files | {CARD: _model_card(run, newest, config, folder, command, list(files))}


def _model_card(
    run: Location, newest: epath.Path, config: Config, folder: str, command: str, files: list[str]
) -> str:
    """The card, in Markdown, of a run that is exported as `folder`, beside these files, and that vLLM serves by `command`."""
    lines = read_lines(as_path(run) / METRICS_FILE, missing_ok=True)
    made_of = checkpoint.read_loader_state(newest).get(MADE_OF, {})
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [tool-use, function-calling, rest_jax]\n---",
        f"# {config.name}",
        f"A policy for tool use, trained with rest_jax {rest_jax.__version__}"
        f" from `{config.model.source}`: {_method(config, lines)}, {int(newest.name):,} steps. It calls tools in the"
        f" `{config.data.template}` format.",
        "## Serve it",
        f"```\n{command}\n```",
        f"`rest-jax serve` takes the same folder, with the template and the lengths of training from its `{USE_FILE}`:",
        f"```\nrest-jax serve {folder}\n```",
        *_for_transformers(folder, files),
        *_figures(run, newest, lines),
        *_audit(run, newest),
        "## Made of",
        "\n".join(f"- {name}: `{value}`" for name, value in made_of.items()),
        "```yaml\n" + dump(config) + "```",
    ]
    return "\n\n".join(parts) + "\n"


def vllm_command(config: Config, tokenizer: Tokenizer, files: list[str], folder: str) -> str:
    """The line that serves the folder with vLLM."""
    words = [f"vllm serve {folder} --enable-auto-tool-choice"]
    words.append(f"--tool-call-parser {_VLLM_PARSERS[config.data.template]}")
    if PARSER in files:
        words.append(f"--tool-parser-plugin {folder}/{PARSER}")
    if CHAT_TEMPLATE in files:
        words.append(f"--chat-template {folder}/{CHAT_TEMPLATE}")
    if _reads_thoughts(tokenizer):
        words.append("--reasoning-parser deepseek_r1")
    return " \\\n    ".join(words)


def _reads_thoughts(tokenizer: Tokenizer) -> bool:
    """Whether vLLM's parsers of thoughts can be used: they ask for tags that are one token each."""
    return {"<think>", "</think>"} <= tokenizer.hf.get_vocab().keys()


def _for_transformers(folder: str, files: Sequence[str]) -> list[str]:
    """How its prompts are made where the model's own chat template has no place for tools."""
    if CHAT_TEMPLATE not in files:
        return []
    return [
        f"In transformers the prompt of training needs `{CHAT_TEMPLATE}`; the tokenizer's own template tells of no tools:",
        f"""```python
template = open("{folder}/{CHAT_TEMPLATE}").read()
prompt = tokenizer.apply_chat_template(
    messages, tools=tools, chat_template=template, add_generation_prompt=True
)
```""",
    ]


def _use(config: Config) -> dict[str, Any]:
    """The values of `USE_KEYS`."""
    sections = config.model_dump(mode="json")
    return {key: sections[section][name] for key in USE_KEYS for section, name in [key.split(".")]}


def recorded_use(source: Location) -> list[str]:
    """What an export, a folder or a hub id, says of its use, as overrides ("key=value"); none where it has no such file.
    UserError for a file with other keys or values.
    """
    path = small_file(source, USE_FILE)
    if path is None:
        return []
    found = read_mapping(path)
    if unknown := sorted(set(map(str, found)) - set(USE_KEYS)):
        raise UserError(
            f"{path}: {unknown[0]}: not a key of this file (known: {', '.join(USE_KEYS)})"
        )
    words = [f"{key}={json.dumps(value)}" for key, value in found.items()]
    try:
        from_overrides({"name": "command", "model": {"source": str(source)}}, words)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from error
    return words


def _method(config: Config, lines: Sequence[Mapping[str, Any]]) -> str:
    lora = config.lora
    own = "" if lora.rank is None else f"LoRA of rank {lora.rank}, "
    if not any("reward/mean" in line for line in lines):
        return f"{own}supervised"
    rule, size = config.weights.rule_used, config.rollout.group_size
    loss, usual = config.loss, LossConfig()
    changed = [
        f"{name} `{used}`, "
        for name, used, default in (
            ("advantage", loss.advantage_used, usual.advantage),
            ("policy", loss.policy_used, usual.policy),
        )
        if used != default
    ]
    return f"{own}GRPO with token weights by the rule `{rule}`, {''.join(changed)}{size} completions a prompt"


def _figures(run: Location, exported: epath.Path, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of the evaluations, and of the benchmarks that the checkpoint which is exported was asked, if there are any."""
    found = []
    evaluated = [line for line in lines if any(map(is_eval, line))]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        rows = [f"| {name} | {first.get(name, float('nan')):.4g} | {value:.4g} | {metric(name).meaning} |"
                for name, value in last.items() if is_eval(name)]  # fmt: skip
        head = (
            f"| metric | step {first['step']} | step {last['step']} | |\n| --- | --- | --- | --- |"
        )
        found += ["## Held-out records, greedy", "\n".join([head, *rows])]
    own, results = checkpoint_digest(exported), read_results(run)
    results = {name: x for name, x in results.items() if x.checkpoint_sha256 == own}
    asked = [result.benchmark for result in results.values()]
    for name, result in results.items():
        which = f" ({name})" if asked.count(result.benchmark) > 1 else ""
        found += [f"## {result.benchmark}{which}", _table(result)]
    return found


def _audit(run: Location, exported: epath.Path) -> list[str]:
    """What `rest-jax audit` found, if it was of this state of the run, and whether of the checkpoint that is exported."""
    folder = as_path(run)
    found = read_certificate(folder)
    if found is None or found["metrics"] != file_digest(folder / METRICS_FILE):
        return []
    by = found["repeated_by"]
    rows = [["step", "result", "from", "steps replayed"], ["---"] * 4, *certificate_rows(found)]
    said = (
        f"`rest-jax audit` {found['result']}: {len(found['steps'])} of {found['recorded']:,} steps were repeated on "
        f"{by['devices']['kind']} with jaxlib {by['versions']['jaxlib']} (seed {found['seed']}) and compared "
        f"{found['comparison']}."
    )
    own = [one["checkpoint"] for one in found["steps"]]
    among = "" if checkpoint.manifest_digest(exported) in own else "not "
    weights = f"The weights here, those behind step {int(exported.name):,}, were {among}among what was compared."
    return ["## Audit", f"{said} {weights}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]


def _table(result: Result) -> str:
    rows = ["| score | group | items | rate | 95 % interval |", "| --- | --- | --- | --- | --- |"]
    for score, group, x in result.lines():
        items = "" if x.count is None else x.count
        rows.append(f"| {score} | {group} | {items} | {x.rate:.1%} | {x.interval} |")
    return "\n".join(rows)
