"""From ids to rewards and regions, with a tokenizer whose ids are pieces of bytes cut anywhere."""

from concurrent.futures import Future

import numpy as np
import pytest

from rest_jax.config import RewardConfig
from rest_jax.data.records import StepRecord
from rest_jax.rewards.score import Outcome, Score
from rest_jax.rollout import scoring
from rest_jax.rollout.scoring import (
    plugin_metrics,
    score_records,
    score_rollout,
    summarise_scores,
    truncated,
)
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Region, Target
from rest_jax.types import RolloutBatch

STOP, EMPTY, PAD = 0, 1, 2
CFG = RewardConfig()


class Pieces:
    """Byte pieces as a vocabulary that grows; ids 0 to 2 are the stop, a word without bytes, the padding."""

    stop_ids = (STOP,)

    def __init__(self):
        self.pieces = [b"<|im_end|>", b"", b"<|pad|>"]

    @property
    def piece_lengths(self):
        return np.array([len(p) for p in self.pieces], np.int32)

    def bytes_of(self, ids):
        return b"".join(self.pieces[i] for i in ids)

    def encode(self, text: str, size: int) -> list[int]:
        data = text.encode()
        cut = [data[i : i + size] for i in range(0, len(data), size)]
        self.pieces += [p for p in dict.fromkeys(cut) if p not in self.pieces]
        return [self.pieces.index(p) for p in cut]


def rollout_of(groups: list[list[list[int]]], width: int) -> RolloutBatch:
    prompts, group = len(groups), len(groups[0])
    responses = np.full((prompts, group, width), PAD, np.int32)
    length = np.zeros((prompts, group), np.int32)
    for p, rows in enumerate(groups):
        for g, ids in enumerate(rows):
            responses[p, g, : len(ids)] = ids
            length[p, g] = len(ids)
    zeros = np.zeros(responses.shape, np.float32)
    return RolloutBatch(
        prompt=np.ones((prompts, 2), np.int32),  # type: ignore[arg-type]
        prompt_length=np.full(prompts, 2, np.int32),  # type: ignore[arg-type]
        responses=responses,  # type: ignore[arg-type]
        response_length=length,  # type: ignore[arg-type]
        logp=zeros,  # type: ignore[arg-type]
        entropy=zeros,  # type: ignore[arg-type]
        gini=zeros,  # type: ignore[arg-type]
    )


CALLED = '<think> é </think>\n<tool_call>\n{"name": "f", "parameters": {"a": "ü"}}\n</tool_call>'
SAID = "<think> é </think>\n<response> hi </response>"
TARGETS = [Target(calls=(Call("f", {"a": "ü"}),)), Target(response="hi")]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_rewards_and_regions_of_two_groups(size):
    tokenizer = Pieces()
    called, said = tokenizer.encode(CALLED, size), tokenizer.encode(SAID, size)
    groups = [[[*called, STOP], [*said, STOP]], [[*called, STOP], said]]
    scored, scores = score_rollout(
        rollout_of(groups, len(called) + 3), TARGETS, tokenizer, TEMPLATES["toolrl"], CFG, 1.0
    )
    np.testing.assert_array_equal(scored.reward, [[4.0, -4.0], [-4.0, 1.0]])
    np.testing.assert_array_equal(scored.format_score, [[1.0, 0.0], [0.0, 1.0]])
    assert [[s.exact for s in row] for row in scores] == [[True, False], [False, True]]
    assert [[s.spurious for s in row] for row in scores] == [[False, False], [True, False]]
    np.testing.assert_array_equal(scored.exact, [[True, False], [False, True]])
    np.testing.assert_array_equal(
        scored.parts, [[[1, 3, 0, 0], [-1, -3, 0, 0]], [[-1, -3, 0, 0], [1, 0, 0, 0]]]
    )
    assert scored.marked is None
    region = np.asarray(scored.region)
    assert (region.dtype, scored.reward.dtype) == (np.int8, np.float32)
    for p, rows in enumerate(groups):
        for g, ids in enumerate(rows):
            assert (region[p, g, : len(ids)] != Region.NONE).all()
            assert (region[p, g, len(ids) :] == Region.NONE).all()
            if ids[-1] == STOP:
                assert region[p, g, len(ids) - 1] == Region.TAG
    if size == 1:
        name = CALLED.encode().index(b'"f"') + 1
        assert region[0, 0, name] == Region.NAME
        assert (region[0, 0] == Region.NAME).sum() == 1
        assert (region[0, 0] == Region.PARAM).sum() == len('{"a": "ü"}'.encode())


def test_parts_add_up_to_the_reward_and_phrases_are_marked():
    tokenizer = Pieces()
    ids = [*tokenizer.encode(SAID, 1), STOP]
    cfg = RewardConfig(length_weight=0.5, length_target_tokens=len(ids) * 2)
    rollout = rollout_of([[ids]], len(ids) + 2)
    template = TEMPLATES["toolrl"]
    scored, _ = score_rollout(rollout, TARGETS[1:], tokenizer, template, cfg, 1.0, ["hi", "ho"])
    np.testing.assert_array_equal(scored.parts, [[[1, 0, 0.25, 0]]])
    np.testing.assert_array_equal(scored.reward, scored.parts.sum(-1))
    at = SAID.index(" hi") + 2  # a character of two bytes is before it
    assert np.flatnonzero(scored.marked[0, 0]).tolist() == [at, at + 1]


PLUGIN = """
def score(completion, text, record, target):
    if record["extra"].get("bad"):
        raise ValueError("bad")
    return {"calls": len(completion["calls"]), "hi": 0.5 * (completion["response"] == target["response"])}
"""


@pytest.mark.parametrize("builtin", [True, False])
def test_what_a_plugin_gives_is_a_part_of_the_reward(tmp_path, builtin):
    (tmp_path / "mine.py").write_text(PLUGIN)
    cfg = RewardConfig(
        plugin=f"{tmp_path}/mine.py:score", builtin=builtin, length_weight=float(builtin)
    )
    tokenizer = Pieces()
    called, said = ([*tokenizer.encode(text, 3), STOP] for text in (CALLED, SAID))
    rollout = rollout_of([[called, said], [said, said], [said, said]], len(called))
    targets = [TARGETS[0], TARGETS[1], TARGETS[1]]
    records = [
        StepRecord(f"r{i}", "", (), (), target, extra={"bad": 1} if i == 2 else {})
        for i, target in enumerate(targets)
    ]
    known = tokenizer, TEMPLATES["toolrl"]
    scored, scores = score_records(rollout, records, *known, cfg)
    plain = RewardConfig(length_weight=1.0)
    without, old = score_rollout(rollout, targets, *known, plain, 1.0)
    given = np.array([[1.5, 0.0], [0.5, 0.5], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(scored.reward, builtin * np.asarray(without.reward) + given)
    np.testing.assert_array_equal(scored.parts[..., 3], given)
    np.testing.assert_allclose(scored.parts.sum(-1), scored.reward)
    np.testing.assert_array_equal(scored.exact, without.exact)
    np.testing.assert_array_equal(scored.format_score, without.format_score)
    assert scores[0][0].plugin_parts == {"calls": 1.0, "hi": 0.5}
    assert scores[2][1].plugin_fault == "line 4: ValueError: bad"
    assert scores[2][1].reward == builtin * old[2][1].reward
    outcomes = [score.outcome for group in scores for score in group]
    assert plugin_metrics(outcomes) == pytest.approx(
        {"plugin_part": 2.5 / 6, "plugin_failures": 2, "part/calls": 1 / 6, "part/hi": 1.5 / 6}
    )
    assert plugin_metrics([]) == {}


def test_processes_with_the_same_row_take_the_same_outcome(monkeypatch):
    """Whatever their own workers say: the process that comes first decides."""
    own: Future[Outcome] = Future()
    own.set_result(Outcome({"a": 2.0}))
    theirs = '{"3": [[{"a": 1.0}, null]], "4": [[{}, "hung"]]}'
    monkeypatch.setattr(scoring, "exchange", lambda text, _: [theirs, text])
    found = scoring.share_outcomes({3: [own], 5: [own]})
    assert found == {3: [({"a": 1.0}, None)], 4: [({}, "hung")], 5: [({"a": 2.0}, None)]}


def test_padding_ids_inside_a_response_are_its_text():
    tokenizer = Pieces()
    ids = [*tokenizer.encode(SAID, 5), PAD, EMPTY, STOP]
    scored, ((found,),) = score_rollout(
        rollout_of([[ids]], 40), TARGETS[1:], tokenizer, TEMPLATES["toolrl"], CFG, 1.0
    )
    assert found.format_score == 0.0
    assert np.asarray(scored.region)[0, 0, len(ids) - 3 :].tolist()[:3] == [
        Region.OTHER,
        Region.OTHER,
        Region.TAG,
    ]


@pytest.mark.parametrize("ids", [[], [STOP], [EMPTY]])
def test_responses_without_text(ids):
    scored, ((found,),) = score_rollout(
        rollout_of([[ids]], 3), TARGETS[:1], Pieces(), TEMPLATES["toolrl"], CFG, 1.0
    )
    assert found.reward == -4.0
    assert (np.asarray(scored.region)[0, 0] > 0).sum() == len(ids)


def test_a_character_cut_in_two_is_scored():
    tokenizer = Pieces()
    cut = tokenizer.encode(SAID, 1)[: SAID.encode().index("é".encode()) + 1]
    scored, _ = score_rollout(
        rollout_of([[cut]], 20), TARGETS[1:], tokenizer, TEMPLATES["toolrl"], CFG, 1.0
    )
    assert np.asarray(scored.region)[0, 0, len(cut) - 1] == Region.THINK


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 targets for 1 prompts"):
        score_rollout(rollout_of([[[STOP]]], 2), TARGETS, Pieces(), TEMPLATES["toolrl"], CFG, 1.0)
    with pytest.raises(ValueError, match="ids 2 to 9 for a vocabulary of 3"):
        score_rollout(rollout_of([[[9]]], 2), TARGETS[:1], Pieces(), TEMPLATES["toolrl"], CFG, 1.0)


def test_summaries_are_means_and_spurious_is_among_prompts_without_calls():
    def one(reward, exact, spurious):
        return Score(reward, 0.5, reward - 0.5, 1.0, 0.25, exact, spurious)

    scores = [
        [one(1.0, True, False), one(2.0, False, False)],
        [one(0.0, False, True), one(3.0, True, False)],
    ]
    means = summarise_scores(scores, TARGETS)
    assert means["reward"] == 1.5 and means["exact"] == 0.5 and means["accuracy"] == 0.25
    assert means["spurious"] == 0.5  # of the second prompt alone
    assert summarise_scores(scores[:1], TARGETS[:1])["spurious"] == 0.0


def test_truncated_are_those_whose_last_token_is_no_stop():
    rollout = rollout_of([[[3, STOP], [3, 4]], [[STOP], [4, STOP, 5]]], 4)
    assert truncated(rollout, (STOP,)).mean() == 0.5
