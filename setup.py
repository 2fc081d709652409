"""Packages of the wheel: rest_jax, and the files of configs/ as the data of rest_jax._configs."""

import pathlib

from setuptools import find_packages, setup

CONFIGS = pathlib.Path("configs")
folders = [CONFIGS, *sorted(path for path in CONFIGS.rglob("*") if path.is_dir())]
builtin = {
    "rest_jax._configs" + "".join(f".{part}" for part in path.relative_to(CONFIGS).parts): path
    for path in folders
}

setup(
    packages=[*find_packages(include=["rest_jax", "rest_jax.*"]), *builtin],
    package_dir={name: path.as_posix() for name, path in builtin.items()},
    package_data={name: ["*"] for name in builtin}
    | {"rest_jax.experiments": ["*.jinja"], "rest_jax.planning": ["*.txtpb"]}
    | {"rest_jax.templates": ["chat/*"], "rest_jax.analysis": ["assets/*"]},
)
