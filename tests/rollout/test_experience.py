"""The collector: what it saves of a batch sampled ahead is the batch, in this process and through a checkpoint."""

import contextlib

import jax
import numpy as np
import pytest

from rest_jax import config as config_lib
from rest_jax.data.cache import load_prompts
from rest_jax.rl.view import nonzero_advantage
from rest_jax.rollout import experience
from rest_jax.rollout.experience import Collector
from rest_jax.rollout.scheduler import SamplerStats
from rest_jax.run.checkpoint import AHEAD, Checkpoints
from rest_jax.run.load import load_policy
from rest_jax.types import RolloutBatch, Routes
from tests.programs.states import make_state
from tests.runs import recipe

STEPS, TIME, GROUP = 3, 24, 4


class RandomSampler:
    """Random responses in the place of a policy's, of a model with experts or without, all alike where `alike(row)`; keeps
    the rows that it was asked for.
    """

    def __init__(self, vocabulary: int, experts: bool):
        self.vocabulary, self.experts = vocabulary, experts
        self.asked: list[list[int]] = []
        self.stats = SamplerStats()

    @staticmethod
    def alike(row: int) -> bool:
        return row % 2 == 0

    def __call__(self, params, prompts, rng, step, on_group, wanted) -> RolloutBatch:
        wanted = np.ones(len(prompts.row), bool) if wanted is None else wanted
        self.asked.append(prompts.row[wanted].tolist())
        self.stats = SamplerStats(tokens=10 + step, slot_steps=20)
        random = np.random.default_rng((step, int(prompts.row[0])))
        shape = (*prompts.length.shape, GROUP, TIME)
        length = random.integers(1, TIME + 1, shape[:2]).astype(np.int32)
        same = np.array([self.alike(row) for row in prompts.row.tolist()])
        length = np.where(same[:, None], length[:, :1], length)
        length = np.where(wanted[:, None], length, 0)
        alive = np.arange(TIME) < length[..., None]
        responses = np.where(alive, random.integers(3, self.vocabulary, shape), 0)
        values = [np.where(alive, random.normal(size=shape), 0).astype(np.float32) for _ in "leg"]
        routes = None
        if self.experts:
            sizes = ((*lead, 2, 2) for lead in (prompts.tokens.shape, shape))
            routes = Routes(*(random.integers(0, 4, size).astype(np.uint8) for size in sizes))
        sampled = responses.astype(np.int32), length, *values
        rollout = RolloutBatch(prompts.tokens, prompts.length, *sampled, routes=routes)
        for prompt in np.flatnonzero(wanted).tolist():
            on_group(prompt, jax.tree.map(lambda x, at=prompt: x[at : at + 1], rollout))
        return rollout


@pytest.fixture
def config(model, tmp_path) -> config_lib.Config:
    rollout = {"staleness": 1, "recompute_logprobs": True, "tis_cap": 2.0}
    return config_lib.Config.model_validate(recipe(model, tmp_path, rollout=rollout))


@pytest.fixture
def policy(config):
    return load_policy(config.model, config_lib.MeshConfig(data=2, fsdp=-1))


@pytest.fixture
def prompts(config, policy):
    return load_prompts(config, config.data.train, None, policy.tokenizer, False)


@pytest.fixture
def open_collector(config, policy, prompts, monkeypatch):
    """Makes collectors of one run, each with a sampler of its own."""
    with contextlib.ExitStack() as stack:

        def make(experts: bool, **rollout) -> Collector:
            sampler = RandomSampler(policy.config.vocab_size, experts)
            monkeypatch.setattr(experience, "make_sampler", lambda *_: sampler)
            changed = config.model_copy(
                update={"rollout": config.rollout.model_copy(update=rollout)}
            )
            made = Collector(changed, policy, prompts, STEPS)
            return stack.enter_context(contextlib.closing(made))

        yield make


def collect(collector: Collector, step: int) -> experience.Experience:
    return collector.collect({}, jax.random.key(0), step)


@pytest.mark.parametrize(
    ("experts", "rollout"),
    [(False, {}), (True, {}), (False, {"dynamic_sampling": 2})],
    ids=["dense", "experts", "dynamic"],
)
def test_a_batch_sampled_ahead_comes_back_from_a_checkpoint(
    open_collector, tmp_path, experts, rollout
):
    first, second = (open_collector(experts, **rollout) for _ in "ab")
    assert collect(first, 1).staleness == 0
    state = make_state()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state, first.snapshot()())
        _, saved, _ = checkpoints.restore(like)
    assert AHEAD in saved
    second.resume(saved)
    before = len(first.sampler.asked)
    expected, found = collect(first, 2), collect(second, 2)
    assert found.staleness == expected.staleness == 1
    assert second.sampler.asked == first.sampler.asked[before:]  # of step 3
    assert found.arrays().keys() == expected.arrays().keys()
    for name, value in expected.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], value)
        assert found.arrays()[name].dtype == value.dtype
    assert found.metrics() == expected.metrics()
    assert found.scores == expected.scores and found.records == expected.records
    assert second.position == first.position


def test_a_snapshot_stays_what_it_was(open_collector, monkeypatch):
    """A run that is told to stop while it samples saves that of the step before."""
    collector, other = open_collector(False), open_collector(False)
    collect(collector, 1)
    snapshot, rows = collector.snapshot(), collector.ahead.arrays()

    def stop():
        raise InterruptedError

    monkeypatch.setattr(collector, "check", stop)
    with pytest.raises(InterruptedError):
        collect(collector, 2)
    other.resume(snapshot())
    for name, value in collect(other, 2).arrays().items():
        np.testing.assert_array_equal(value, rows[name])


def test_nothing_is_sampled_behind_the_last_step(open_collector):
    collector = open_collector(False)
    for step in range(1, STEPS + 1):
        collect(collector, step)
    assert len(collector.sampler.asked) == STEPS
    assert AHEAD not in collector.snapshot()()


def test_groups_without_advantage_make_room_for_those_of_the_next_batches(open_collector, prompts):
    """Against the order of the data, by hand: each place takes the first prompt whose completions differ in reward, and all is
    counted that was sampled.
    """
    collector = open_collector(False, staleness=0, dynamic_sampling=2)
    alike, batches = RandomSampler.alike, open_collector(False, dynamic_sampling=2).batches
    replaced = 0
    for step in range(1, STEPS + 1):
        batch, _ = next(batches)
        expected, asked = batch.row.tolist(), [batch.row.tolist()]
        for _ in range(2):
            places = [i for i, row in enumerate(expected) if alike(row)]
            if not places:
                break
            rows = next(batches)[0].row.tolist()
            asked.append([rows[i] for i in places])
            for i in places:
                expected[i] = rows[i]
        collector.sampler.asked.clear()
        found = collect(collector, step)
        assert collector.sampler.asked == asked and found.row.tolist() == expected
        ids = [prompts.records[row % prompts.size].id for row in expected]
        assert [record.id for record in found.records] == ids
        metrics = found.metrics()
        assert metrics["rollout/groups_sampled"] == sum(map(len, asked))
        if len(asked) > 1:
            assert metrics["rollout/tokens"] > found.scored.rollout.response_length.sum()
            replaced += 1
        left = ~nonzero_advantage(found.scored.reward)
        assert left.tolist() == [alike(row) for row in expected]
    assert replaced


def test_groups_whose_completions_need_not_differ_stay(open_collector):
    """REINFORCE++ centres over the batch: equal completions have an advantage."""
    collector = open_collector(False, staleness=0, dynamic_sampling=2)
    loss = config_lib.LossConfig(advantage="reinforce_pp")
    collector.config = collector.config.model_copy(update={"loss": loss})
    found = collect(collector, 1)
    assert len(collector.sampler.asked) == 1
    assert not nonzero_advantage(found.scored.reward).all()
    filtered = loss.model_copy(update={"group_filter": "exact"})
    collector.config = collector.config.model_copy(update={"loss": filtered})
    collect(collector, 2)
    assert len(collector.sampler.asked) > 2
