"""Lengths that a model was not made for are refused before anything is compiled, by every command that runs one."""

import json
import shutil

import pytest

from rest_jax import cli
from rest_jax.errors import UserError
from rest_jax.models.config import DecoderConfig
from rest_jax.models.policy import check_positions

SMALL = ["data.synthetic_size=16", "data.eval_limit=2", "data.brief_prompt=true", "mesh.data=1"]
LONG = "rollout.max_response_tokens=1000"
TRAINED = ["model.source=MODEL", "name=long", "output=OUT", "mesh.fsdp=-1", *SMALL]
TRAIN = ["rollout.prompts_per_step=8", *TRAINED]


def test_prompt_and_response_share_the_positions():
    config = DecoderConfig("qwen3", 8, 8, 1, 1, 1, 8, 8, max_positions=1024)
    check_positions(config, 24, 1000)
    said = r"prompt \+ response 1,025 \(25 \+ 1,000 tokens\) exceeds the model's 1,024 positions"
    with pytest.raises(UserError, match=f"{said}.*lower rollout.max_response_tokens"):
        check_positions(config, 25, 1000, "rollout.max_response_tokens")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "scale/tiny", "method/rest", *TRAIN, LONG, "--dry-run"],
        ["train", "scale/tiny", "method/rest", *TRAIN, LONG, "data.eval=null", "--dry-run"],
        ["sft", "scale/tiny_sft", "sft.batch_size=8", *TRAINED, LONG, "--dry-run"],
        ["evaluate", "MODEL", "synthetic:eval", "--limit", "2", LONG, *SMALL],
        ["generate", "MODEL", "--prompt", "word " * 50, LONG],
        ["variance", "MODEL", "synthetic:eval", "--prompts", "2", "--limit", "8", LONG, *SMALL],
    ],
    ids=lambda words: words[0],
)
def test_commands_refuse_what_does_not_fit(words, model, tmp_path, capsys):
    places = {"MODEL": str(model), "OUT": str(tmp_path)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "exceeds the model's 1,024 positions" in said
    assert list(tmp_path.iterdir()) == []


def test_gold_answers_have_to_fit_too(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 64}))
    words = [w.replace("MODEL", str(folder)).replace("OUT", str(tmp_path)) for w in TRAINED]
    assert cli.main(["sft", "scale/tiny_sft", "sft.batch_size=8", *words, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "exceeds the model's 64 positions" in said and "lower sft.max_tokens" in said


def test_limits_that_leave_no_room_are_known_before_the_data(model, tmp_path, capsys):
    limits = ["data.max_prompt_tokens=8192", "rollout.max_response_tokens=8192"]
    words = [w.replace("MODEL", str(model)).replace("OUT", str(tmp_path)) for w in TRAIN]
    absent = f"data.train={tmp_path / 'absent.jsonl'}"
    assert cli.main(["train", "scale/tiny", "method/rest", *words, absent, *limits]) == 2
    assert "prompt + response 16,384 (8,192 + 8,192 tokens) exceeds" in capsys.readouterr().err
