"""BFCL by its own packages, of both versions: scripted models through the interface of every other, calls that mean harm, limits,
what is kept, what is refused.

REST_JAX_BFCL_V3 and REST_JAX_BFCL_V4 name virtual environments with the packages (docs/evaluation.md); without one the tests that
need it are skipped.
"""

import ast
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from rest_jax import cli
from rest_jax.data.tokenize import Encoder
from rest_jax.errors import UserError
from rest_jax.evaluation import bfcl, bfcl_child
from rest_jax.evaluation.benchmark import (
    compare_results,
    describe,
    read_result,
    scored_dialogues,
)
from rest_jax.evaluation.bfcl import UNSATISFIABLE, VERSIONS, Bfcl, chosen, figures
from rest_jax.evaluation.dialogues import Settings, answer_all
from rest_jax.tool_calls import Call, Target
from rest_jax.worlds.records import Reply

V3, V4 = VERSIONS["bfcl_v3"], VERSIONS["bfcl_v4"]
RUN = {"seconds": 2.0, "tokens_per_second": 5.0, "sampling": {"max_response_tokens": 9}}
NONE = Target(response="There is no tool for this.")


def venv_of(version) -> pathlib.Path:
    """The virtual environment with the package of a version."""
    name = f"REST_JAX_{version.name.upper()}"
    if name not in os.environ:
        pytest.skip(f"${name} names no virtual environment with bfcl-eval=={version.release}")
    return pathlib.Path(os.environ[name])


def run(version, folder, model, *, categories=None, limit=None, template="hermes") -> dict:
    """The result of a model: a function from an entry's id and its query to a `Target` or a text."""
    with Bfcl(version, venv_of(version), chosen(version, categories), limit) as source:
        source.begin(folder, template, 16)
        while (queries := source.poll(block=True)) is not None:
            for key, query in queries:
                source.reply(key, reply_of(model(key, query), template))
    return RUN | scored_dialogues(source)


def reply_of(said, template: str) -> Reply:
    """The completion of a model that has said this."""
    form = bfcl.template(template)
    text = said if isinstance(said, str) else form.render_answer(said)
    nothing = np.zeros(3, np.float32)
    ids, region = np.zeros(3, np.int32), np.zeros(3, np.int8)
    return Reply(text, form.parse(text.encode()), ids, nothing, nothing, region, False, 7)


class Truth:
    """A model that answers with the truth of the data."""

    def __init__(self, version, template: str):
        (self.data,) = venv_of(version).glob("lib/python*/site-packages/bfcl_eval/data")
        self.functions = template != "toolrl"
        prefix = version.name.replace("bfcl", "BFCL")
        self.truths, self.required = {}, {}
        for entry in self.lines(f"possible_answer/{prefix}_*.json"):
            self.truths[entry["id"]] = entry["ground_truth"]
        for entry in self.lines(f"{prefix}_*.json"):
            for f in entry.get("function", ()):
                self.required[entry["id"], f["name"]] = set(f["parameters"].get("required", ()))
        docs = self.lines("multi_turn_func_doc/*.json")
        self.parameters = {f["name"]: list(f["parameters"]["properties"]) for f in docs}

    def __call__(self, key, query) -> Target:
        if "irrelevance" in key:
            return NONE
        if "relevance" in key:
            tool = query.tools[0]
            return Target(calls=(Call(tool.get("function", tool)["name"], {}),))
        truth = self.truths[key]
        if "multi_turn" not in key:
            return Target(calls=tuple(self.single(key, call) for call in truth))
        turn = sum(message["role"] == "user" for message in query.messages) - 1
        if query.messages[-1]["role"] == "tool" or not truth[turn]:
            return NONE
        return Target(calls=tuple(self.written(text) for text in truth[turn]))

    def lines(self, pattern: str):
        """The objects of files of the data that have one a line."""
        for file in self.data.glob(pattern):
            if "format_sensitivity" not in file.name:
                yield from map(json.loads, file.read_text().splitlines())

    def single(self, key: str, call: dict) -> Call:
        """A call of {name: {parameter: values that are right}}; "" among them: it may be left out."""
        ((name, options),) = call.items()
        if (key, name) not in self.required:  # in one entry of v3 the truth has left out a part
            ((_, name),) = (found for found in self.required if found[0] == key)
        needed = self.required[key, name]
        said = {k: v for k, v in options.items() if k in needed or "" not in v}
        return Call(name.replace(".", "_") if self.functions else name, right(said))

    def written(self, text: str) -> Call:
        """A call in Python."""
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        name = call.func.id
        found = dict(zip(self.parameters[name], map(ast.literal_eval, call.args), strict=False))
        return Call(name, found | {a.arg: ast.literal_eval(a.value) for a in call.keywords})


def right(options: dict) -> dict:
    """Of each parameter the first right value that is not empty. Deep inside, some have no list of them."""
    found = {}
    for name, values in options.items():
        listed = values if values and isinstance(values, list) else [values]
        found[name] = value(next((option for option in listed if option != ""), listed[0]))
    return found


def value(option):
    if isinstance(option, dict):
        return right(option)
    return [value(each) for each in option] if isinstance(option, list) else option


def broken(key, query) -> Target:
    """A model that calls what there is not, and nothing where a call is needed."""
    if "relevance" in key and "irrelevance" not in key:
        return NONE
    return Target(calls=(Call("x", {}),)) if query.messages[-1]["role"] != "tool" else NONE


def wrong(result) -> set[str]:
    return {item["id"] for item in result["items"] if not item["correct"]}


def in_python(version) -> str:
    """The categories whose truth is written in Python."""
    names = [name for group in version.groups.values() for name in group]
    return ",".join(name for name in names if "java" not in name)


@pytest.mark.services
@pytest.mark.parametrize("version", [V3, V4], ids=lambda v: v.name)
def test_the_truth_is_right_of_every_entry(version, tmp_path):
    result = run(version, tmp_path, Truth(version, "hermes"), categories=in_python(version))
    assert wrong(result) == set(UNSATISFIABLE)
    assert len(result["items"]) == 4291
    assert f"for {', '.join(UNSATISFIABLE)}" in describe(result)
    assert result["figures"]["multi-turn"]["rate"] == pytest.approx(1)


@pytest.mark.services
@pytest.mark.parametrize("family, template", [("qwen3", "hermes"), ("llama3.1", "llama3"), ("qwen2.5", "toolrl")])  # fmt: skip
def test_the_truth_is_right_through_the_driver(family, template, tokenizers, script, tmp_path):
    """Through prompts, ids and the parser of a model's output, two entries of each category."""
    truth, form = Truth(V4, template), bfcl.template(template)
    encoder = Encoder(tokenizers[family], form)

    def write(key, query) -> str:
        return form.render_answer(truth(key, query))

    with Bfcl(V4, venv_of(V4), chosen(V4, in_python(V4)), 2) as source:
        source.begin(tmp_path, template, 8)
        made = script(source, encoder.tokenizer, write)
        answer_all(made, made, encoder, Settings(max_tokens=9999, max_length=1_000_000))
    result = scored_dialogues(source)
    assert len(result["items"]) == 30 and wrong(result) == set()
    tokens = sum(item["tokens"] for item in result["items"])
    assert tokens == source.tokens == sum(len(reply.ids) for _, reply in made.replies)


@pytest.mark.services
@pytest.mark.parametrize("version", [V3, V4], ids=lambda v: v.name)
def test_a_broken_model_has_nothing_right(version, tmp_path):
    result = run(version, tmp_path, broken, limit=40, template="llama3")
    assert {x["correct"] for x in result["items"]} == {False}
    assert {x["rate"] for x in result["rates"]["correct"].values()} == {0.0}


@pytest.mark.services
@pytest.mark.parametrize("version", [V3, V4], ids=lambda v: v.name)
def test_figures_are_those_of_the_package(version, tmp_path):
    """A model that is right of about two in three entries, with the prompts of ToolRL's handler."""
    truth = Truth(version, "toolrl")
    java = [name for name in version.simple if "java" in name]

    def model(key, query):
        known = sum(map(ord, key)) % 3 and not key.startswith(tuple(java))
        return truth(key, query) if known else broken(key, query)

    result = run(version, tmp_path, model, limit=12, template="toolrl")
    official, found = result["leaderboard"], result["figures"]
    overall = "overall by v3" if version is V3 else "overall by v4, agentic as 0"
    for column, figure in {
        "Overall Acc": overall,
        "Multi Turn Acc": "multi-turn",
        "Non-Live AST Acc": "non-live AST",
        "Relevance Detection": "relevance",
        "Irrelevance Detection": "irrelevance",
        **({"Live Acc": "live AST"} if version is V4 else {}),
    }.items():
        assert official[column] == f"{found[figure]['rate']:.2%}", column
        assert 0 < found[figure]["low"] < found[figure]["rate"] < found[figure]["high"] < 1
    assert 0.3 < result["rates"]["correct"]["all"]["rate"] < 0.8


# Each would leave a file where `eval()` saw more than the tools, or took more than identifiers and values.
HARM = "__import__('os').system('touch {0}')"


def harmful(path) -> list[Call]:
    text = HARM.format(path)
    return [
        Call(text, {}),
        Call("cd", {text: 1}),
        Call("cd", {f"folder={text},b": 1}),
        Call("cd", {"folder": text}),
        Call("cd", {"folder": [{text: text}]}),
        Call("open", {"file": str(path), "mode": "w"}),
        Call("execute_multi_turn_func_call", {
            "func_call_list": [text], "initial_config": {}, "involved_classes": [], "model_name": "a", "test_entry_id": "b",
        }),
    ]  # fmt: skip


@pytest.mark.services
@pytest.mark.parametrize("version", [V3, V4], ids=lambda v: v.name)
@pytest.mark.parametrize("template", ["hermes", "llama3", "toolrl"])
def test_calls_that_mean_harm_leave_no_trace(version, template, tmp_path):
    calls, told = harmful(tmp_path / "x"), []

    def model(key, query):
        results = [m["content"] for m in query.messages if m["role"] == "tool"]
        told.extend(results)
        return NONE if results else Target(calls=tuple(calls))

    (tmp_path / "run").mkdir()
    names = "multi_turn_base,live_multiple"
    result = run(version, tmp_path / "run", model, categories=names, limit=2, template=template)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(told) >= 2 * len(calls)
    assert all("rror" in text for text in told), told
    assert {x["correct"] for x in result["items"]} == {False}


@pytest.mark.services
def test_calls_without_end_are_broken_off(tmp_path, monkeypatch):
    """The first entry with the tools of MathAPI; the others are not touched by it."""
    monkeypatch.setattr(bfcl, "ENTRY_SECONDS", 2)
    endless = Target(calls=(Call("power", {"base": 7, "exponent": 10**9}),))

    def model(key, query):
        return endless if key == "multi_turn_base_15" else NONE

    result = run(V4, tmp_path, model, categories="multi_turn_base", limit=16)
    errors = {x["id"]: x["error"] for x in result["items"] if x["error"]}
    assert errors.keys() == {"multi_turn_base_15"}
    assert "more than 2 s of processor time" in errors["multi_turn_base_15"]
    assert "1 entries were broken off, such as multi_turn_base_15" in describe(result)


@pytest.mark.services
def test_what_was_answered_is_not_asked_again(tmp_path):
    asked: list[str] = []
    truth = Truth(V3, "hermes")

    def model(key, query):
        asked.append(key)
        return truth(key, query)

    def stopped(key, query):
        if len(asked) == 9:
            raise KeyboardInterrupt
        return model(key, query)

    some = {"categories": "simple,multi_turn_base", "limit": 5}
    with pytest.raises(KeyboardInterrupt):
        run(V3, tmp_path, stopped, **some)
    journal = tmp_path / "answers.jsonl"
    done = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
    assert done
    journal.write_text(journal.read_text() + '{"id": "simple_3", "res')  # cut by a power failure
    asked.clear()
    result = run(V3, tmp_path, model, **some)
    everything = {f"{name}_{i}" for name in ("simple", "multi_turn_base") for i in range(5)}
    assert set(asked) == everything - set(done)
    assert wrong(result) == set()
    asked.clear()
    again = run(V3, tmp_path, model, **some)
    assert not asked and again == result | {"resumed": 10}
    more = run(V3, tmp_path, model, categories="simple", limit=6)
    assert asked == ["simple_5"] and len(more["items"]) == 6
    assert all(len(item["completions"]) == 1 and item["tokens"] == 3 for item in more["items"])


@pytest.mark.services
def test_a_prompt_without_room_is_no_answer(tmp_path):
    with Bfcl(V4, venv_of(V4), ["simple_python"], 1) as source:
        source.begin(tmp_path, "hermes", 1)
        [(key, _)] = source.poll(block=True) or []
        nothing = dataclasses.replace(reply_of("", "hermes"), ids=np.zeros(0, np.int32))
        source.reply(key, nothing)
        assert source.poll(block=True) is None
    (item,) = scored_dialogues(source)["items"]
    assert item["error"] == "the prompt of 7 tokens leaves no token for a completion"
    assert not item["correct"] and item["completions"] == []
    again = run(V4, tmp_path, Truth(V4, "hermes"), categories="simple_python", limit=1)
    assert wrong(again) == set() and again["resumed"] == 0


# --- without the packages ---------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """A process that stands in for that of v4."""
    monkeypatch.setattr(bfcl, "PROGRAM", pathlib.Path(__file__).parents[1] / "programs/toy_bfcl.py")
    monkeypatch.setattr(bfcl, "find_python", lambda *_: sys.executable)


def test_a_dialogue_goes_through_the_process(toy, tmp_path):
    call = Target(calls=(Call("f", {"x": 1}), Call(" None ", {})), think="hm")
    with Bfcl(V4, None, ["simple_python", "multi_turn_base"]) as source:
        source.begin(tmp_path, "toolrl", 2)
        first = dict(source.poll(block=True) or ())
        first |= dict(source.poll(block=True) or ()) if len(first) < 2 else {}
        assert {name: len(query.messages) for name, query in first.items()} == {
            "simple_python_0": 1, "multi_turn_base_0": 1
        }  # fmt: skip
        source.reply("multi_turn_base_0", reply_of(call, "toolrl"))
        [(key, query)] = source.poll(block=True) or []
        assert key == "multi_turn_base_0" and query.tools == first[key].tools
        said = query.messages[1]
        assert said["reasoning_content"] == "hm" and said["content"] is None
        (made,) = said["tool_calls"]  # without the call of no tool
        assert made["function"] == {"name": "f", "arguments": '{"x": 1}'}
        source.reply(key, reply_of("not in any form", "toolrl"))
        source.reply("simple_python_0", reply_of(NONE, "toolrl"))
        while source.poll(block=True) is not None:
            pass
    assert source.tokens == 9
    result = RUN | scored_dialogues(source)
    assert {item["id"]: item["correct"] for item in result["items"]} == {
        "simple_python_0": False, "multi_turn_base_0": True
    }  # fmt: skip
    assert result["items"][1]["completions"][1] == "not in any form"
    assert result["prompts_sha256"] == "0" * 64 and result["template"] == "toolrl"
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    assert read_result(path) == result
    said = describe(result)
    assert "calls ran with the network in reach: Operation not permitted" in said
    rows = {line.split("  ")[0]: line.split() for line in compare_results(path, path).splitlines()}
    assert rows["correct, multi_turn_base"][2:6] == ["1", "100.0%", "100.0%", "+0.0%"]


@pytest.mark.parametrize("release, missing, line", [
    ("2026.4.1", [], "bfcl-eval 2026.4.1; bfcl_v4 is judged by 2026.3.23"),
    ("2026.3.23", ["dotenv", "tqdm"], "bfcl-eval lacks dotenv, tqdm"),
], ids=["release", "missing"])  # fmt: skip
def test_another_package_is_refused(toy, monkeypatch, tmp_path, release, missing, line):
    program = tmp_path / "program.py"
    program.write_text(f"print({json.dumps(json.dumps({'package': release, 'missing': missing}))})")
    monkeypatch.setattr(bfcl, "PROGRAM", program)
    install = ": `pip install --no-deps bfcl-eval==2026.3.23 mpmath"
    with pytest.raises(UserError, match=re.escape(f"--data venv: {line}{install}")):
        Bfcl(V4, "venv", [])


@pytest.mark.slow
def test_the_command_asks_a_model(toy, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(model), "--benchmark", "bfcl_v4", "--max-response-tokens", "4"]
    words += ["mesh.data=1", "rollout.decode_slots=2", "data.template=hermes"]
    assert cli.main([*words, "--categories", "simple_python,multi_turn_base"]) == 0
    (name,) = (path.name for path in tmp_path.glob("*.json"))
    assert name == f"{model.name}-bfcl_v4.json" and capsys.readouterr().out.splitlines()[-1] == name
    result = read_result(name)
    assert [len(item["completions"]) for item in result["items"]] == [1, 2]
    assert all(1 <= item["tokens"] <= 8 for item in result["items"])
    assert result["template"] == "hermes" and len(result["checkpoint_sha256"]) == 64
    (tmp_path / name).unlink()
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    words[1] = str(bare)
    assert cli.main(words) == 2
    assert "no chat template; add chat_template.jinja" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_calls_are_written_for_eval_of_identifiers_and_values_alone():
    assert bfcl_child.expression({"f": {}}) == "f()"
    call = {"f": {"a": "it's \\", "b": [1, None, {"c": True}], "d": 1e5}}
    assert (
        bfcl_child.expression(call) == """f(a="it's \\\\", b=[1, None, {'c': True}], d=100000.0)"""
    )
    for name in ("os.system", "f()", "", "a b", "lambda", "1", "f\n"):
        assert bfcl_child.expression({name: {}}) == bfcl_child.UNKNOWN
        assert bfcl_child.expression({"f": {name: 1}}) == bfcl_child.UNKNOWN


def test_nothing_is_in_sight_of_eval():
    code = "def execute_multi_turn_func_call(text): return type(eval(text)).__name__"
    utils = types.ModuleType("utils")
    exec(code, vars(utils))
    run_it = utils.execute_multi_turn_func_call
    assert run_it("open('/dev/null')") == "TextIOWrapper"
    bfcl_child.hide_from_eval(utils)
    assert run_it("(1, 'a', None, True)") == "tuple"
    for name in ("open", "print", "__import__", "execute_multi_turn_func_call"):
        with pytest.raises(NameError, match=name):
            run_it(f"{name}()")


def child_says(code: str, *words: object) -> list[str]:
    """What a program prints that has the names of the child's file in `child`, in a Python without this project."""
    code = f"import runpy, sys; child = runpy.run_path(sys.argv[1])\n{code}"
    command = [sys.executable, "-I", "-c", code, str(bfcl.PROGRAM), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_process_has_no_network():
    """Or says why it has: a container may forbid namespaces."""
    refused, reached = child_says("""
import socket
print(child["leave_network"]())
with socket.create_server(("", 0)) as server:
    print(not socket.socket().connect_ex(("127.0.0.1", server.getsockname()[1])))
""")
    assert (reached == "True") == (refused != "None")


def test_the_process_of_a_dialogue_has_limits(tmp_path):
    writes, computes = child_says(
        """
class Writes:
    def inference(self, *_):
        with open(sys.argv[2], "w") as file:
            file.write("x")

class Computes:
    def inference(self, *_):
        while True:
            pass

print(child["start"](Writes(), {}, 9).receive()["error"])
print(child["start"](Computes(), {}, 1).receive())
""",
        tmp_path / "x",
    )
    assert "File too large" in writes and computes == "None"


def test_categories_are_those_that_can_be_run():
    everything = chosen(V4, None)
    assert len(everything) == 17 and everything[0] == "simple_python"
    assert chosen(V3, "multi_turn, java") == ["java", *V3.groups["multi_turn"]]
    for version, names, line in (
        (V4, "simple", "--categories simple: unknown category of bfcl_v4 (nearest: simple_"),
        (
            V3,
            "multiturn",
            "--categories multiturn: unknown category of bfcl_v3 (nearest: multi_turn",
        ),
        (V4, "live,memory_kv", "--categories memory_kv: not run: its entries begin with files"),
        (V4, "web_search_base", "not run: it needs the network"),
        (V4, "format_sensitivity", "not run: it varies the package's own prompt"),
        (V3, "", "--categories : unknown category"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            chosen(version, names)


def test_wrong_words_are_one_line(tmp_path, capsys):
    def refused(*words: str) -> str:
        assert cli.main(["evaluate", "no-model", *words]) == 2
        (line,) = (x for x in capsys.readouterr().err.splitlines() if "error" in x)
        return line

    said = refused("--benchmark", "bfcl_v4", "--categories", "simple_pyton")
    assert "unknown category of bfcl_v4 (nearest: simple_python)" in said
    for data in ([], ["--data", str(tmp_path)]):
        said = refused("--benchmark", "bfcl_v3", *data)
        assert "/bin/pip install --no-deps bfcl-eval==2025.6.14 mpmath " in said
        assert "tree_sitter==0.21.3 tree_sitter_java==0.21.0" in said
    assert "(nearest: bfcl_v" in refused("--benchmark", "bfcl")


def test_figures_are_weighted_rates_of_categories():
    counts = {name: (1, 2) for name in chosen(V3, None)}
    counts |= {"live_simple": (6, 6), "multi_turn_base": (2, 2), "java": (0, 2)}
    found = {figure: value and value["rate"] for figure, value in figures(V3, counts).items()}
    simple, multi_turn, live = 1 / 3, 0.625, 9 / 12
    non_live = (simple + 1.5) / 4
    assert found == pytest.approx({
        "multi-turn": multi_turn,
        "non-live AST": non_live,
        "live AST": live,
        "relevance": 0.5,
        "irrelevance": 0.5,
        "overall by v3": ((simple + 2) / 5 + 11 / 16 + multi_turn) / 3,
        "overall by v4, agentic as 0": 0.1 * non_live + 0.1 * live + 0.05 + 0.3 * multi_turn,
        "overall by v4, without agentic": (non_live + live + 0.5 + 3 * multi_turn) / 6,
    })  # fmt: skip
    del counts["java"], counts["live_relevance"]
    missing = {figure for figure, value in figures(V3, counts).items() if value is None}
    assert missing == {"non-live AST", "relevance", *(f for f in found if "overall" in f)}


def test_the_prompt_of_toolrl_is_that_of_its_own_handler():
    """Letter for letter what its `_format_prompt` makes of the same messages, between the tags of the chat template."""
    schema = {"x": {"type": "float", "description": "A number."}}
    tools = [{"name": "f.g", "description": "F.", "parameters": schema}]
    history = [
        {"role": "system", "content": "left out"},
        {"role": "user", "content": " Do it. "},
        {"role": "assistant", "think": "hm", "calls": [{"name": "f.g", "arguments": {"x": 1}}], "content": None},
        {"role": "tool", "content": "You have made the tool call f.g(x=1). Execution returns: 2"},
    ]  # fmt: skip
    system, user = bfcl.toolrl_prompt(tools, history)
    assert system["content"].startswith("You are a helpful multi-turn dialogue assistant")
    assert "\n1. Name: f.g\nDescription: F.\nParameters: " + json.dumps(schema) in system["content"]
    assert system["content"].endswith("noted as `<obs>` (if exists).\n")
    first, last = bfcl.ONE_TURN, bfcl.AFTER_RESULTS
    assert user["content"] == (
        f"**Dialogue Records History**\n<user> Do it.\n{first} </user>\n\n<think> hm </think>\n<tool_call>\n"
        '{"name": "f.g", "parameters": {"x": 1}}\n</tool_call>\n'
        f"<obs> You have made the tool call f.g(x=1). Execution returns: 2 </obs>\n\n{last}"
    )
    _, user = bfcl.toolrl_prompt(tools, history[:2])
    assert user["content"] == f"**Dialogue Records History**\n<user> Do it.\n{first} </user>"
