"""What the wheel needs: every folder of code is a package, every module imports and says what it does, configs come along."""

import importlib
import pathlib
import re
import subprocess
import sys

import rest_jax
from tests.conftest import REPOSITORY

PACKAGE = pathlib.Path(rest_jax.__file__).parent
ASSETS = PACKAGE / "templates" / "chat"  # files that are written for other servers
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != ASSETS)


def test_every_folder_of_code_is_a_package():
    """setup.py ships packages only: a folder without __init__.py would be missing from the wheel."""
    for path in MODULES:
        assert (path.parent / "__init__.py").is_file(), path.parent


def test_every_module_imports_and_starts_with_what_it_does():
    for path in MODULES:
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        if path.stat().st_size and not name.endswith("__main__"):
            assert re.match(r"\w", importlib.import_module(name).__doc__ or ""), name


def test_the_builtin_configs_are_in_the_wheel(tmp_path):
    """As setuptools lays it out: rest_jax/_configs is where config.py looks for them first."""
    words = ["-q", "egg_info", "-e", str(tmp_path), "build_py", "-d", str(tmp_path / "lib")]
    subprocess.run([sys.executable, "setup.py", *words], cwd=REPOSITORY, check=True)
    built = tmp_path / "lib" / "rest_jax" / "_configs"
    for path in (REPOSITORY / "configs").rglob("*"):
        assert (built / path.relative_to(REPOSITORY / "configs")).exists(), path
    for path in filter(pathlib.Path.is_file, ASSETS.iterdir()):  # nor what Python compiled
        assert (tmp_path / "lib" / "rest_jax" / path.relative_to(PACKAGE)).exists(), path
    code = "from rest_jax import config; print(config.load(['scale/tiny', 'method/rest']).model.source)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, cwd=tmp_path / "lib", capture_output=True, text=True, check=True, env={}
    )
    assert done.stdout.strip() == str(built / "quickstart_policy")
