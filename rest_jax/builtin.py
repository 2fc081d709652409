"""The recipes that come with the package: configs/ of the repository, `rest_jax/_configs` of an installed wheel.

A name or path given by the user is always tried first as it stands, so that own files win over shipped ones.
"""

import pathlib

from rest_jax.errors import UserError

_PREFIX = "configs/"
_SWEEPS = "sweeps"
_STUDIES = "studies"


def folder() -> pathlib.Path:
    """The folder of the shipped recipes."""
    package = pathlib.Path(__file__).resolve().parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The shipped recipes, by the name that `find_config` takes."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find_config(name: str) -> pathlib.Path:
    """The config file for a path, or for the bare name of a shipped recipe. UserError when there is none."""
    path = pathlib.Path(name)
    if path.is_file():
        return path
    found = shipped_config(name)
    if found is None:
        raise UserError(f"config {name}: no such file, nor a shipped one ({', '.join(names())})")
    return found


def find_space(name: str) -> pathlib.Path:
    """The file of a sweep's space for a path, or for the bare name of one in configs/sweeps. UserError when there is none."""
    return _find_in(_SWEEPS, "space", name)


def find_study(name: str) -> pathlib.Path:
    """The file of a study for a path, or for the bare name of one in configs/studies. UserError when there is none."""
    return _find_in(_STUDIES, "study", name)


def _find_in(subfolder: str, kind: str, name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.is_file():
        return path
    found = shipped_config(
        f"{subfolder}/{name.removeprefix(_PREFIX).removeprefix(f'{subfolder}/')}"
    )
    if found is None or path.is_absolute():
        known = ", ".join(sorted(path.stem for path in (folder() / subfolder).glob("*.yaml")))
        raise UserError(f"{kind} {name}: no such file, nor a shipped one ({known})")
    return found


def shipped_config(name: str) -> pathlib.Path | None:
    """The shipped recipe of that name (`grpo`, `grpo.yaml`, `configs/grpo.yaml`), if there is one."""
    found = folder() / (name.removeprefix(_PREFIX).removesuffix(".yaml") + ".yaml")
    return found if found.is_file() and not pathlib.Path(name).is_absolute() else None


def locate(source: str) -> str:
    """`source` as it is, unless it is a path `configs/...` that exists only among the shipped files: then that one."""
    if source.startswith(_PREFIX) and not pathlib.Path(source).exists():
        found = folder() / source.removeprefix(_PREFIX)
        if found.exists():
            return str(found)
    return source
