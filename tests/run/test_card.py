"""What stands beside the exported weights of a run: its chat template, vLLM's tool parser, the model card."""

import json
import pathlib
import shutil

import jax
import pytest
import transformers

from rest_jax import cli
from rest_jax.config import Config, MeshConfig, ModelConfig, dump
from rest_jax.data.convert import SOURCES
from rest_jax.errors import UserError
from rest_jax.files import as_path, file_digest
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run import card, load
from rest_jax.run.checkpoint import Checkpoints, manifest_digest
from rest_jax.run.contents import MADE_OF
from rest_jax.run.folder import CONFIG_FILE, MODEL_FOLDER
from rest_jax.run.metrics import METRICS_FILE, MetricsWriter
from rest_jax.run.record import CERTIFICATE_FILE
from rest_jax.run.results import checkpoint_digest
from rest_jax.templates import TEMPLATES
from rest_jax.templates.chat_template import vllm_parser
from rest_jax.types import TrainState

CHAT = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "0", "type": "function", "function": {"name": "now", "arguments": {"a": "ü"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "0", "content": "9"},
]
TOOLS = [{"type": "function", "function": {"name": "now", "description": "The time"}}]
CARD = """\
A policy for tool use, trained with rest_jax {version} from `start`: GRPO with token \
weights by the rule `inverse_bound`, 4 completions a prompt, 7 steps. It calls tools in the `toolrl` format.

## Serve it

```
vllm serve out --enable-auto-tool-choice \\
    --tool-call-parser toolrl \\
    --tool-parser-plugin out/toolrl_tool_parser.py \\
    --chat-template out/tool_chat_template.jinja{reasoning}
```

`rest-jax serve` takes the same folder, with the template and the lengths of training from its `rest_jax_use.json`:

```
rest-jax serve out
```

In transformers the prompt of training needs `tool_chat_template.jinja`; the tokenizer's own template tells of no tools:

```python
template = open("out/tool_chat_template.jinja").read()
prompt = tokenizer.apply_chat_template(
    messages, tools=tools, chat_template=template, add_generation_prompt=True
)
```

## Held-out records, greedy

| metric | step 0 | step 7 | |
| --- | --- | --- | --- |
| eval/exact | 0.25 | 0.5 | held-out completions in the format with exactly the gold calls (none where gold has \
none); texts are not compared |

## api_bank

| score | group | items | rate | 95 % interval |
| --- | --- | --- | --- | --- |
| soft | all | 4 | 50.0% | 15.0% to 85.0% |

## Audit

`rest-jax audit` passed: 1 of 7 steps were repeated on EPYC with jaxlib 0.10.2 (seed 3) and compared bit for bit. The weights \
here, those behind step 7, were {among}among what was compared.

| step | result | from | steps replayed |
| --- | --- | --- | --- |
| 7 | equal | checkpoint 4 | 3 |

## Made of

- prompts: `abc`
"""


def certify(folder: pathlib.Path, metrics: str, checkpoint: str | None = None) -> None:
    """Leaves the certificate of an audit of a run whose metrics, and the checkpoint of whose step, had that digest."""
    step = {"step": 7, "result": "equal", "from": "checkpoint 4", "replayed": 3, "differences": []}
    by = {"versions": {"jaxlib": "0.10.2"}, "devices": {"kind": "EPYC", "mesh": {"data": 1}}}
    found = {"result": "passed", "recorded": 7, "seed": 3, "metrics": metrics}
    found |= {"comparison": "bit for bit", "repeated_by": by}
    found["steps"] = [step | {"checkpoint": checkpoint}]
    (folder / CERTIFICATE_FILE).write_text(json.dumps(found))


def config(template: str, **data) -> Config:
    raw = {"name": "mine", "model": {"source": "start"}, "data": {"template": template, **data}}
    return Config.model_validate(raw)


@pytest.fixture
def run(model, tmp_path):
    """(config) -> the folder of a run, moved from where its config says that it is."""

    def make(config):
        folder = tmp_path / "moved"
        ignore = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(model, folder / MODEL_FOLDER, ignore=ignore)
        params = load.load_policy(ModelConfig(source=str(model)), MeshConfig(fsdp=-1)).params
        none = jax.numpy.zeros(())
        with Checkpoints(folder) as checkpoints:
            state = TrainState(none, params, none, none, none)
            checkpoints.save(7, state, {MADE_OF: {"prompts": "abc"}})
        (folder / CONFIG_FILE).write_text(dump(config))
        return folder

    return make


def test_the_card_says_how_to_serve_and_what_was_measured(run, tmp_path):
    made = config("toolrl", max_prompt_tokens=192)
    answers = made.rollout.model_copy(update={"max_response_tokens": 96})
    made = made.model_copy(update={"rollout": answers})
    folder = run(made)
    writer = MetricsWriter(folder)
    writer.write(0, {"eval/exact": 0.25})
    writer.write(1, {"reward/mean": 1.0})
    writer.write(7, {"eval/exact": 0.5})
    writer.close()
    rate = {"count": 4, "rate": 0.5, "low": 0.15, "high": 0.85}
    result = {"benchmark": "api_bank", "rates": {"soft": {"all": rate}}}
    newest = as_path(folder / "checkpoints" / "7")
    own = {"checkpoint_sha256": checkpoint_digest(newest)}
    (folder / "api_bank.json").write_text(json.dumps(result | own))
    for name, of in (("api_bank-step5", {"checkpoint_sha256": "a"}), ("api_bank-old", {})):
        (folder / f"{name}.json").write_text(json.dumps(result | of))
    certify(folder, file_digest(folder / METRICS_FILE), manifest_digest(newest))
    (folder / "fork.json").write_text('{"of": "x"}')
    (folder / "broken.json").write_text("{")
    load.export(str(folder), tmp_path / "out")
    text = (tmp_path / "out" / card.CARD).read_text()
    tags = Tokenizer.load(tmp_path / "out").hf.get_vocab().keys() >= {"<think>", "</think>"}
    reasoning = " \\\n    --reasoning-parser deepseek_r1" if tags else ""
    expected = CARD.replace("{version}", card.rest_jax.__version__).replace("{among}", "")
    assert expected.replace("{reasoning}", reasoning) in text
    assert text.count("## api_bank") == 1
    assert text.endswith(f"```yaml\n{dump(made)}```\n")
    assert (tmp_path / "out" / card.PARSER).read_text() == vllm_parser(False)


@pytest.mark.parametrize("tokens", [True, False])
def test_opened_thoughts_are_left_to_the_parser_that_can_read_them(
    run, tokenizers, monkeypatch, tokens
):
    folder, tokenizer = run(config("toolrl")), tokenizers["qwen3_thinking_2507"]
    monkeypatch.setattr(card, "_reads_thoughts", lambda _: tokens)
    newest = as_path(folder / "checkpoints" / "7")
    files = card.side_files(folder, newest, config("toolrl"), tokenizer, "out")
    assert files[card.PARSER] == vllm_parser(not tokens)
    assert ("--reasoning-parser" in files[card.CARD]) == tokens


def test_two_results_of_one_benchmark_are_told_by_their_files(run):
    folder = as_path(run(config("hermes")))
    newest = folder / "checkpoints" / "7"
    rates = {"soft": {"all": {"rate": 0.5, "low": 0.15, "high": 0.85}}}
    own = {"benchmark": "api_bank", "checkpoint_sha256": checkpoint_digest(newest)}
    result = own | {"rates": rates}
    for name in ("api_bank.json", "api_bank-step7.json"):
        (folder / name).write_text(json.dumps(result))
    heads = card._figures(folder, newest, [])[::2]
    assert heads == ["## api_bank (api_bank-step7.json)", "## api_bank (api_bank.json)"]


def test_an_export_is_used_as_it_was_trained(run, tmp_path, capsys):
    made = config("hermes", brief_prompt=True, max_prompt_tokens=192)
    answers = made.rollout.model_copy(update={"max_response_tokens": 96})
    out = tmp_path / "the export"
    folder = run(made.model_copy(update={"rollout": answers}))
    assert cli.main(["export", str(folder), str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"exported {folder} to {out}", f"serve it: rest-jax serve '{out}'"]
    shutil.copytree(out, tmp_path / "again")
    (tmp_path / "again" / card.USE_FILE).unlink()
    assert cli.main(["export", str(tmp_path / "again"), str(tmp_path / "third")]) == 0
    assert "serve it" not in capsys.readouterr().out
    for source in (out, folder):
        found = load.config_of(str(source), ["data.max_prompt_tokens=100"])
        assert (found.data.template, found.data.brief_prompt) == ("hermes", True)
        assert (found.data.max_prompt_tokens, found.rollout.max_response_tokens) == (100, 96)
        assert "template" in found.data.model_fields_set


def test_an_export_on_the_hub_says_how_it_is_used(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / card.USE_FILE).write_text('{"data.template": "hermes"}')
    (tmp_path / "without").mkdir()

    def give(hub_id, allow_patterns, **_):
        assert allow_patterns == [card.USE_FILE]  # not yet the weights
        if hub_id == "away/policy":
            raise hub.errors.LocalEntryNotFoundError("no network")
        return str(tmp_path if hub_id == "some/policy" else tmp_path / "without")

    monkeypatch.setattr(hub, "snapshot_download", give)
    assert load.config_of("some/policy", []).data.template == "hermes"
    for other in ("some/other", "away/policy"):
        assert "template" not in load.config_of(other, []).data.model_fields_set


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"reward.plugin": "theirs.py:score"}', "reward.plugin: not a key of this file"),
        ('{"data.template": "x"}', "data.template"),
        ("[", f"{card.USE_FILE}: line 1"),
        ('{"data.max_prompt_tokens": -1}', f"{card.USE_FILE}: config: data.max_prompt_tokens: -1"),
        ("{1: 2, x: 3}", f"{card.USE_FILE}: 1: not a key of this file"),
        (" " * 300_000, f"{card.USE_FILE}: 300,000 bytes"),
    ],
)
def test_a_file_of_use_can_say_nothing_else(tmp_path, text, said):
    (tmp_path / card.USE_FILE).write_text(text)
    with pytest.raises(UserError, match=said):
        load.config_of(str(tmp_path), [])


def test_a_certificate_says_nothing_of_another_state_or_of_other_weights(tmp_run):
    newest = as_path(tmp_run / "checkpoints" / "7")
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text("{}")
    (tmp_run / METRICS_FILE).write_text("")
    metrics = file_digest(tmp_run / METRICS_FILE)
    for checkpoint, said in (
        (manifest_digest(newest), "step 7, were among what was compared"),
        ("that of other weights", "step 7, were not among what was compared"),
        (None, "step 7, were not among what was compared"),
    ):
        certify(tmp_run, metrics, checkpoint)
        assert said in card._audit(tmp_run, newest)[1]
    (tmp_run / METRICS_FILE).write_text('{"step": 8}\n')
    assert card._audit(tmp_run, newest) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"result": "passed"}'])
def test_a_certificate_that_is_cut_is_left_out(tmp_run, text):
    (tmp_run / METRICS_FILE).write_text("")
    (tmp_run / CERTIFICATE_FILE).write_text(text)
    assert card._audit(tmp_run, as_path(tmp_run)) == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_transformers_writes_the_prompt_of_training(run, tmp_path, template):
    folder = run(config(template, brief_prompt=True))
    load.export(str(folder), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    record = SOURCES["openai"](
        {"messages": [*CHAT, {"role": "assistant", "content": "z"}], "tools": TOOLS}, "r", "here"
    )[-1]
    expected = tokenizer.render_prompt(record.prompt_messages(TEMPLATES[template], True))
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        CHAT,
        tools=TOOLS,
        chat_template=(tmp_path / "out" / card.CHAT_TEMPLATE).read_text(),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert found == expected
    assert (tmp_path / "out" / card.PARSER).is_file() == (template == "toolrl")


def test_a_run_of_which_only_the_weights_are_left_is_exported(run, tmp_path):
    folder = run(config("hermes"))
    (folder / CONFIG_FILE).unlink()
    load.export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out" / card.CARD).exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_other_rules_of_advantage_and_policy_loss_are_named():
    loss = {"advantage": "gdpo", "policy": "sapo"}
    raw = {"name": "mine", "model": {"source": "start"}, "weights": {"rule": "ar"}, "loss": loss}
    said = card._method(Config.model_validate(raw), [{"reward/mean": 1.0}])
    assert "rule `ar`, advantage `gdpo`, policy `sapo`, 4 completions" in said
