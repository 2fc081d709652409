"""Folders of strangers: whatever is in their files, commands end, within seconds, with one line or with what was asked for."""

import json
import pathlib
import shutil
import signal

import jinja2
import numpy as np
import pytest

from rest_jax import cli
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer

SECONDS = 30
VALUES = [
    None,
    "x",
    "",
    -1,
    0,
    1,
    7,
    True,
    1.5,
    1e308,
    10**9,
    10**18,
    10**40,
    [],
    [7],
    {},
    {"a": 1},
]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = [
    LOOP,
    "{{ 'x' * 10 ** 10 }}",
    "{% for m in messages %}{{ m.content * 10 ** 9 }}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(300) }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% if %}",
    "{{ 1 / 0 }}",
    "{% include 'config.json' %}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "x" * 10**6,
]


def change_json(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Gives one value of the file another one, or writes it with a fault."""
    raw = json.loads(path.read_text())
    kind = rng.integers(4)
    if kind:
        at = raw
        while True:
            key = rng.choice(np.asarray([*at] if isinstance(at, dict) else range(len(at)), object))
            if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.3:
                break
            at = at[key]
        at[key] = VALUES[rng.integers(len(VALUES))]
        if isinstance(raw, dict) and rng.random() < 0.2:
            raw.pop(key, None)
        text = json.dumps(raw)
    else:
        text = [
            json.dumps(raw)[: rng.integers(200)],
            "[" * 100_000,
            json.dumps([raw]),
            "null",
            '{"a": ' + "9" * 5000 + "}",
            "\x00" * 50,
            json.dumps(raw).replace(":", ": NaN, ", 1),
        ][rng.integers(7)]
    path.write_text(text)


def change_weights(path: pathlib.Path, rng: np.random.Generator) -> None:
    """A header that lies, a file cut short, or one that is something else."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = [*header][rng.integers(1, len(header))]
    kind = rng.integers(7)
    if kind == 0:
        path.write_bytes(content[: rng.integers(len(content))])
    elif kind == 1:
        path.write_bytes(int(rng.integers(2**62)).to_bytes(8, "little") + content[8:])
    elif kind == 2:
        path.unlink()
        path.mkdir()
    else:
        if kind == 3:
            header[name]["shape"] = [10**9, 10**9]
        elif kind == 4:
            header[name]["data_offsets"] = [0, 10**15]
        elif kind == 5:
            header[name]["dtype"] = "F99"
        else:
            header[name] = VALUES[rng.integers(len(VALUES))]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def change(folder: pathlib.Path, seed: int) -> None:
    """One hostile change to a sound folder."""
    rng = np.random.default_rng(seed)
    kind = ("config", "config", "tokenizer", "weights", "template", "generation", "index")[seed % 7]
    if kind == "config":
        change_json(folder / "config.json", rng)
    elif kind == "tokenizer":
        name = ("tokenizer.json", "tokenizer_config.json")[rng.integers(2)]
        change_json(folder / name, rng)
    elif kind == "weights":
        change_weights(folder / "model.safetensors", rng)
    elif kind == "template":
        (folder / "chat_template.jinja").write_text(TEMPLATES[seed // 7 % len(TEMPLATES)])
    elif kind == "generation":
        change_json(folder / "generation_config.json", rng)
    else:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        index = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        change_json(folder / "model.safetensors.index.json", rng)


def in_time(*_) -> None:
    raise AssertionError(f"not done after {SECONDS} s")


# a few by default, of every kind of change
SEEDS = [seed if seed < 14 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(98)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hostile_folder_is_one_line(model, tmp_path, capfd, seed):
    folder = shutil.copytree(model, tmp_path / "model")
    change(folder, seed)
    before = signal.signal(signal.SIGALRM, in_time)
    signal.alarm(SECONDS)
    try:
        code = cli.main(["convert", str(folder), str(tmp_path / "out")])
        said = capfd.readouterr().err
        if code:
            assert code == 2 and said.startswith("rest-jax: error: ") and said.count("\n") == 1
            assert len(said) < 5000 and not (tmp_path / "out").exists()
        try:
            tokenizer = Tokenizer.load(folder)
            tokenizer.encode(tokenizer.render_prompt([{"role": "user", "content": "hello"}]))
        except (UserError, jinja2.TemplateError) as error:  # of a template: one record is refused
            assert len(str(error)) < 5000
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
