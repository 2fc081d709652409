"""The schema of configs holds for every builtin file, says what each key means, and the page is made from it."""

import itertools
import json
import subprocess
import sys
from typing import Annotated, Literal

import pydantic
import pytest
import yaml

from rest_jax import cli
from rest_jax.config import Config, Section, from_overrides
from rest_jax.schema import descriptions, reference, schema
from tests.conftest import REPOSITORY
from tests.runs import environment

FILES = sorted(
    itertools.chain(*((REPOSITORY / "configs" / f).glob("*.yaml") for f in ("scale", "method")))
)


def test_every_key_has_its_comment_as_description():
    found = schema()
    for name, shape in [("Config", found), *found["$defs"].items()]:
        for key, value in shape["properties"].items():
            assert "$ref" in value or value["description"], f"{name}.{key}"
    group = found["$defs"]["RolloutConfig"]["properties"]["group_size"]
    assert group["description"] == "G: completions of a prompt" and group["default"] == 4
    assert found["$defs"]["DataConfig"]["description"].startswith("Training and held-out")


def test_it_holds_for_the_builtin_files_and_refuses_what_a_config_refuses():
    checker = pytest.importorskip("jsonschema").Draft202012Validator(schema())
    for file in FILES:
        checker.validate(yaml.load(file.read_text(), yaml.SafeLoader))
    checker.validate({"seed": "${rollout.group_size}", "train": {"steps": None}})
    for targets in ("q", ["q", "up"], "${name}"):
        checker.validate({"lora": {"targets": targets}})
    for wrong in ({"sed": 1}, {"rollout": {"group_size": 1}}, {"loss": {"advantage": "ppo"}},
                  {"lora": {"targets": []}}, {"lora": {"targets": "w"}}, {"train": {"steps": "many"}},
                  {"data": {"shuffle": 3}}):  # fmt: skip
        assert not checker.is_valid(wrong), wrong


def test_the_page_is_up_to_date():
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert page == reference(), "run python tools/make_configuration.py"
    leaves = sum(
        len(field.annotation.model_fields) if issubclass(field.annotation, Section) else 1
        for field in Config.model_fields.values()
    )
    assert page.count("\n| `") == leaves


def test_the_default_of_a_mapping_is_one_that_a_config_takes():
    made = from_overrides({"name": "a", "model": {"source": "m"}}, ["loss.policy_options={}"])
    assert made.loss.policy_options == Config.model_fields["loss"].default.policy_options
    found = schema()["$defs"]
    assert found["WeightsConfig"]["properties"]["options"]["default"] == {}
    for key in ("advantage_options", "policy_options"):
        assert found["LossConfig"]["properties"][key]["default"] == {}
    assert "| mapping | `{}` |" in reference() and "| mapping | `[]` |" not in reference()


@pytest.mark.parametrize("name", ["configuration", "metrics"])
def test_a_tool_that_writes_a_page_takes_no_words(name):
    page = REPOSITORY / "docs" / f"{name}.md"
    before = page.stat().st_mtime_ns
    for word, code in (("--help", 0), ("OTHER.md", 2)):
        command = [sys.executable, f"tools/make_{name}.py", word]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True)
        assert done.returncode == code
    assert page.stat().st_mtime_ns == before


class Example(Section):
    """Fields with comments in every place."""

    # above, over
    # two lines
    a: Literal["x"] = "x"
    b: Annotated[int, pydantic.Field(ge=0)] = 0  # behind
    # above, for two
    c: float = 0.0
    d: float = 1.0
    a_name_so_long_that_the_formatter_breaks_the_line: int | None = (
        None  # behind, in the brackets that it makes of it
    )


def test_comments_above_hold_for_the_fields_after_them_of_one_type():
    assert descriptions(Example) == {
        "a": "above, over two lines",
        "b": "behind",
        "c": "above, for two",
        "d": "above, for two",
        "a_name_so_long_that_the_formatter_breaks_the_line": "behind, in the brackets that it makes of it",
    }


def test_a_field_without_a_comment_is_named():
    class Bare(Section):
        a: int = 0  # behind
        b: int = 1

    with pytest.raises(ValueError, match="Bare: no comment says what is b"):
        descriptions(Bare)


def test_the_command_prints_it_or_writes_it(tmp_path, capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema()))
    assert cli.main(["schema", "--output", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["properties"].keys() >= {"model", "train"}
    assert "yaml-language-server" in capsys.readouterr().out
