"""The benchmark of dialogues: a few small ones, whose ids do not depend on what the stream has kept."""

import json

import pytest

from benchmarks import dialogues
from rest_jax.tool_calls import Call
from rest_jax.worlds import synthetic

SMALL = ["--dialogues", "3", "--turns", "3", "--tokens", "8", "--decode-slots", "2"]


@pytest.mark.slow
def test_new_turns_prefill_what_is_new_and_draw_the_same(configs_dir, capsys):
    source = str(configs_dir / "quickstart_policy")
    assert dialogues.main(["--model", source, *SMALL]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["same_ids"] and record["drawn_tokens"] >= 9
    assert record["prefilled_without"] == record["prompt_tokens"]
    assert record["prefilled_tokens"] <= 0.35 * record["prompt_tokens"]
    assert record["ratio"] <= record["ratio_unshared"] <= 1


def test_bad_arguments_are_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        dialogues.main(["--turns", "0"])
    assert ended.value.code == 2
    assert "0: an integer of at least 1" in capsys.readouterr().err


def test_a_turn_is_one_however_many_calls_it_has():
    talk, turns = dialogues.Talk(6), 0
    talk.reset(next(iter(synthetic.tasks(0, 1))))
    while not talk.done:
        assert len(talk.call([Call("f", {}), Call("g", {})])) == 2
        turns += 1
    assert turns == 6
