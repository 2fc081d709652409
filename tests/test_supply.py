"""What a run relies on: the table of dependencies, the lock file, no secret in anything that is written."""

import base64
import gzip
import json
import re
import zlib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY
from tests.runs import finish, recipe, start_command


def requirements(name: str) -> dict[str, Requirement]:
    lines = (REPOSITORY / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and line[0].isalnum()]
    return {canonicalize_name(one.name): one for one in found}


def test_the_table_names_exactly_the_runtime_dependencies():
    text = (REPOSITORY / "docs/supply.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (.+) \|$", text.split("## Versions")[0], re.MULTILINE)
    named = [name for name, _ in rows if name not in ("package", "---")]
    assert named == list(requirements("requirements.txt"))


def locked() -> dict[str, str]:
    text = (REPOSITORY / "requirements.lock").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(path.name for path in REPOSITORY.glob("requirements*.txt")))
def test_the_lock_has_an_allowed_version_of_every_requirement(name):
    versions = locked()
    for package, wanted in requirements(name).items():
        if package != "torch":  # which build is wanted depends on the machine
            assert wanted.specifier.contains(versions[package], prereleases=True), package
    assert "torch" not in versions


def test_the_lock_has_digests_and_names_no_host():
    text = (REPOSITORY / "requirements.lock").read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    for part in re.split(r"\n(?=[a-z])", text.split("\n\n")[-1]):
        assert "--hash=sha256:" in part, part


SECRETS = {
    name: f"planted{i:03d}secret"
    for i, name in enumerate(
        ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
         "AWS_SESSION_TOKEN", "GOOGLE_API_KEY", "OPENAI_API_KEY", "REST_JAX_API_KEY", "GITHUB_TOKEN", "PGPASSWORD"]
    )
}  # fmt: skip


def readable(content: bytes) -> bytes:
    """With what is compressed in it: tokens.jsonl has zlib's first byte in base64, digests.jsonl a digest under that key."""
    found = content
    if content[:2] == b"\x1f\x8b":
        found += gzip.decompress(content)
    for text in re.findall(rb'"tokens": "(e[A-P][A-Za-z0-9+/=]+)"', content):
        found += zlib.decompress(base64.b64decode(text))
    return found


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written(model, tmp_path):
    raw = recipe(model, tmp_path, seed=1, train={"steps": 1, "tensorboard": True})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    space = tmp_path / "space.yaml"
    tried = {"weights.w_max": {"choices": [2.0]}}
    space.write_text(yaml.safe_dump({"trials": 1, "sampler": "random", "parameters": tried}))
    run, out = tmp_path / "tiny", tmp_path / "exported"
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for words in (
            ["train", str(config)],
            ["audit", str(run), "--steps", "1"],
            ["report", str(run)],
            ["export", str(run), str(out)],
            ["evaluate", str(run), "synthetic:eval", "--limit", "2", "--output", str(tmp_path / "o.jsonl")],
            ["inspect", str(run)],
            ["doctor"],
            ["convert", str(model), str(tmp_path / "converted")],
            ["sweep", str(config), "--space", str(space), "--name", "searched"],
        ):  # fmt: skip
            said += finish(start_command(*words))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {"audit.json", "report.html", "README.md", "o.jsonl", "study.db", "trial-0000.log"}
    assert written <= {path.name for path in files} and (tmp_path / "converted").is_dir()
    tokens = (run / "tokens.jsonl").read_bytes()
    assert len(readable(tokens)) > len(tokens)
    for path in files:
        content = readable(path.read_bytes())
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, (path, name)
    assert not any(secret in said for secret in SECRETS.values())


def test_what_is_compressed_is_looked_into():
    """Otherwise the test above could not fail for it."""
    line = {"tokens": base64.b64encode(zlib.compress(b"planted")).decode()}
    assert b"planted" in readable(json.dumps(line).encode())
    assert b"planted" in readable(gzip.compress(b"planted"))
