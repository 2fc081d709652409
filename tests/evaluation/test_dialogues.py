"""Many dialogues at once: with a scripted model every task of a world is met, and what was read and written is known by token."""

import dataclasses
import itertools

import numpy as np
import pytest
import transformers

from rest_jax.data import fields
from rest_jax.data.convert import openai
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Encoder
from rest_jax.errors import UserError
from rest_jax.evaluation.dialogues import Conversation, Settings, answer_all
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.requests import Piece
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Region, Target
from rest_jax.worlds import synthetic
from rest_jax.worlds.dialogues import Dialogues
from rest_jax.worlds.records import Query

LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
NATIVE = {
    **dict.fromkeys(("qwen2.5", "qwen3", "qwen3_2507", "qwen3_thinking_2507"), "hermes"),
    **dict.fromkeys(("llama3.1", "llama3.2"), "llama3"),
}
WRITTEN = {"smollm2": "hermes", "qwen2.5": "toolrl", "qwen3_thinking_2507": "toolrl"}
FAMILIES = [*NATIVE.items(), *WRITTEN.items()]
TASKS = {task.id: task for task in synthetic.tasks(0, 6)}
SETTINGS = Settings(max_tokens=400, max_length=100_000)


@pytest.fixture(scope="module")
def encoders(tokenizers, tmp_path_factory):
    """(family, template) -> the encoder; Llama's families have their control tokens."""
    folder = tmp_path_factory.mktemp("llama")
    made = {}
    for family, template in FAMILIES:
        tokenizer = tokenizers[family]
        if template == "llama3":
            tokenizer.hf.save_pretrained(folder / family)
            own = transformers.AutoTokenizer.from_pretrained(folder / family)
            own.add_special_tokens({"additional_special_tokens": list(LLAMA_TOKENS)})
            own.save_pretrained(folder / family)
            tokenizer = Tokenizer.load(folder / family)
        made[family, template] = Encoder(tokenizer, TEMPLATES[template])
    return made


def turn_of(query) -> int:
    return sum(message["role"] == "assistant" for message in query.messages)


def truthful(encoder, thought=True):
    """Writes the gold turns, with a thought before each."""

    def write(key, query) -> str:
        turn = TASKS[key].gold[turn_of(query)]
        calls, response = ((), turn) if isinstance(turn, str) else (turn, None)
        think = f"turn {turn_of(query)} of {key}" if thought else None
        return encoder.template.render_answer(Target(calls, response, think))

    return write


def played(script, encoder, write, at_once=4, settings=SETTINGS, tasks=TASKS):
    """(the finished dialogues, the script, the conversations)."""
    dialogues = Dialogues(synthetic.Shop, tasks, at_once)
    made = script(dialogues, encoder.tokenizer, write)
    conversations = answer_all(made, made, encoder, settings)
    return dialogues.finished, made, conversations


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_the_truth_does_every_task(script, encoders, family):
    finished, made, conversations = played(script, encoders[family], truthful(encoders[family]))
    assert finished.keys() == conversations.keys() == TASKS.keys()
    assert {dialogue.score for dialogue in finished.values()} == {1.0}
    assert [finished[key].turns for key in TASKS] == [len(task.gold) for task in TASKS.values()]
    assert made.most_open == 4 > made.slots


def no_calls(key, query):
    return "It is done."


def unknown_tools(key, query):
    return TEMPLATES["hermes"].render_answer(Target((Call("no_such_tool", {"order": "o1"}),)))


def unreadable(key, query):
    return '<tool_call>\n{"name": "cancel_order", "arguments": {"order": \n</tool_call>'


def nameless(key, query):
    return TEMPLATES["hermes"].render_answer(Target((Call(" ", {"order": "o1"}),)))


@pytest.mark.parametrize("write", [no_calls, unknown_tools, unreadable, nameless])
def test_a_broken_model_does_none(script, encoders, write):
    few = dict(itertools.islice(TASKS.items(), 2))
    finished, _, _ = played(script, encoders["qwen3", "hermes"], write, tasks=few)
    assert {dialogue.score for dialogue in finished.values()} == {0.0}
    most = synthetic.MAX_TURNS if write is unknown_tools else 2
    assert max(dialogue.turns for dialogue in finished.values()) == most


def test_a_turn_that_is_cut_makes_no_calls(script, encoders):
    encoder = encoders["qwen2.5", "hermes"]
    settings = Settings(max_tokens=12, max_length=100_000)
    finished, made, _ = played(script, encoder, truthful(encoder), settings=settings)
    assert {dialogue.score for dialogue in finished.values()} == {0.0}
    assert all(dialogue.truncated for dialogue in finished.values())
    assert all(reply.truncated and len(reply.ids) == 12 for _, reply in made.replies)


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_prompts_are_those_of_the_template_and_drawn_ids_stand(script, encoders, family):
    """Every prompt reads as a fresh rendering of its messages; where it continues the last one, the drawn ids are in it."""
    encoder = encoders[family]
    queries = {}
    write = truthful(encoder)

    def remember(key, query):
        queries[key, turn_of(query)] = query
        return write(key, query)

    _, made, conversations = played(script, encoder, remember)
    turns = dict.fromkeys(TASKS, 0)
    for key, request in made.requests:
        (fresh,) = fresh_prompt(encoder, queries[key, turns[key]])
        assert encoder.tokenizer.text(request.ids) == encoder.tokenizer.text(fresh)
        turns[key] += 1
    drawn = {key: [r.ids for k, r in made.replies if k == key] for key in TASKS}
    for key, conversation in conversations.items():
        segments = conversation.segments
        written = [
            s.ids[(s.region != Region.NONE) & (s.turn == t)]
            for s in segments
            for t in np.unique(s.turn)
        ]
        assert [ids.tolist() for ids in written] == [ids.tolist() for ids in drawn[key]]


def fresh_prompt(encoder, query):
    tools = fields.tools(list(query.tools), "")
    record = StepRecord("", "", tools, openai.history(query.messages, tools, ""), Target())
    return encoder([record])[0]


def stretches(conversation) -> list[list[int]]:
    """The turns of each segment."""
    return [np.unique(segment.turn).tolist() for segment in conversation.segments]


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_a_segment_ends_where_the_template_tells_earlier_turns_anew(script, encoders, family):
    """Qwen3's thoughts are dropped once the user says more; a dialogue of the toolrl template is one message of the user."""
    _, _, conversations = played(script, encoders[family], truthful(encoders[family]))
    for key, conversation in conversations.items():
        gold = TASKS[key].gold
        ends = [i + 1 for i, turn in enumerate(gold) if isinstance(turn, str)]
        if family[1] == "toolrl":
            expected = [[i] for i in range(len(gold))]
        elif family[0].startswith("qwen3"):
            expected = [list(range(a, b)) for a, b in itertools.pairwise([0, *ends])]
        else:
            expected = [list(range(len(gold)))]
        assert stretches(conversation) == expected


def test_of_earlier_segments_nothing_is_kept_where_nobody_wants_them(encoders, script):
    encoder = encoders["qwen2.5", "toolrl"]
    few = dataclasses.replace(SETTINGS, keep_segments=False)
    _, made, all_of_them = played(script, encoder, truthful(encoder))
    _, again, last = played(script, encoder, truthful(encoder), settings=few)
    assert [r.ids.tolist() for _, r in made.requests] == [r.ids.tolist() for _, r in again.requests]
    for key, conversation in last.items():
        (segment,) = conversation.segments
        np.testing.assert_array_equal(segment.ids, all_of_them[key].segments[-1].ids)


@pytest.mark.parametrize("ending", ["end of turn", "another stop token", "none", "nothing drawn"])
def test_a_turn_that_ends_otherwise_than_the_template_ends_it(encoders, ending):
    """Cut turns are ended by the template; other stop tokens are not in what it writes."""
    encoder = encoders["llama3.1", "llama3"]
    tokenizer = encoder.tokenizer
    (other,) = set(tokenizer.stop_ids) - {tokenizer.end_id}
    messages = ({"role": "user", "content": "Hello?"},)
    conversation = Conversation(encoder)
    first = conversation.ask(Query(messages), "chat")
    stop = {"end of turn": [tokenizer.end_id], "another stop token": [other]}.get(ending, [])
    text = "" if ending == "nothing drawn" else "Yes."
    ids = np.append(tokenizer.encode(text), stop).astype(np.int32)
    numbers = np.zeros(len(ids), np.float32)
    pieces = [Piece(0, ids, numbers, numbers, None, "stop" if stop else "length")]
    reply = conversation.add(pieces if len(ids) else [])
    assert (reply.text, reply.truncated) == (text, not stop)
    said = {"role": "assistant", "content": reply.text}
    more = {"role": "user", "content": "And now?"}
    query = Query((*messages, *([said] if text else []), more))
    second = conversation.ask(query, "chat")
    assert tokenizer.text(second) == tokenizer.text(fresh_prompt(encoder, query)[0])
    assert tokenizer.text(first) in tokenizer.text(second) or not text
    new = ending in ("another stop token", "nothing drawn")
    assert len(conversation.segments) == 1 + new


def test_every_token_has_its_record(encoders, script):
    """What the model wrote has its log-probability, entropy and region; the rest has none."""
    encoder = encoders["qwen2.5", "hermes"]
    _, made, conversations = played(script, encoder, truthful(encoder))
    for key, conversation in conversations.items():
        (segment,) = conversation.segments
        replies = [reply for k, reply in made.replies if k == key]
        wrote = segment.region != Region.NONE
        for field in ("ids", "logp", "entropy", "region"):
            expected = np.concatenate([getattr(reply, field) for reply in replies])
            np.testing.assert_array_equal(getattr(segment, field)[wrote], expected)
        assert not segment.logp[~wrote].any() and not segment.entropy[~wrote].any()
        assert (np.diff(segment.turn) >= 0).all()
        counts = [len(reply.ids) for reply in replies]
        assert np.bincount(segment.turn[wrote]).tolist() == counts
        text = encoder.tokenizer.text(segment.ids[segment.region == Region.THINK])
        said = [f"turn {i} of {key}" for i in range(len(TASKS[key].gold))]
        assert [line for line in text.split("\n") if line] == said
        results = encoder.tokenizer.text(segment.ids[~wrote])
        assert results.count("<tool_response>") == sum(
            not isinstance(t, str) for t in TASKS[key].gold
        )


def test_a_new_turn_prefills_what_is_new(encoders, script):
    encoder = encoders["qwen2.5", "hermes"]
    _, made, conversations = played(script, encoder, truthful(encoder))
    unwritten = sum(int((c.segments[0].region == 0).sum()) for c in conversations.values())
    assert made.prefilled_tokens <= unwritten < 0.35 * made.prompt_tokens


class Slow:
    """A source whose tools take their time in one dialogue: as long as there is anything else to do."""

    def __init__(self, source, key):
        self.source, self.key, self.late = source, key, []

    def poll(self, block):
        queries = self.source.poll(block and not self.late) or []
        ready = [(key, query) for key, query in queries if key != self.key or not turn_of(query)]
        self.late += [asked for asked in queries if asked not in ready]
        if block and not ready:
            ready, self.late = self.late, []
        return ready or (None if block else [])

    def reply(self, key, reply):
        self.source.reply(key, reply)


def test_others_go_on_while_a_dialogue_waits_for_its_tools(encoders, script):
    encoder, (slow, *_) = encoders["qwen2.5", "hermes"], TASKS
    dialogues = Dialogues(synthetic.Shop, TASKS, at_once=4)
    made = script(Slow(dialogues, slow), encoder.tokenizer, truthful(encoder))
    answer_all(made, made, encoder, SETTINGS)
    assert {dialogue.score for dialogue in dialogues.finished.values()} == {1.0}
    later = len(TASKS[slow].gold) - 1
    keys = [key for key, _ in made.requests]
    assert keys[0] == slow and keys[-later:] == [slow] * later
    assert slow not in keys[1:-later]


def test_draws_do_not_depend_on_what_else_runs(encoders, script):
    encoder = encoders["qwen3", "hermes"]
    found = []
    for at_once in (1, 5):
        _, made, _ = played(script, encoder, truthful(encoder), at_once)
        turns, seeds = dict.fromkeys(TASKS, 0), {}
        for key, request in made.requests:
            seeds[key, turns[key]] = (request.seed, request.ids.tolist())
            turns[key] += 1
        assert made.most_open == at_once
        found.append(seeds)
    assert found[0] == found[1]
    assert len({seed for seed, _ in found[0].values()}) == len(found[0])


def test_a_dialogue_without_room_ends(encoders, script):
    encoder = encoders["qwen2.5", "hermes"]
    _, made, _ = played(script, encoder, truthful(encoder))
    lengths = [len(request.ids) for _, request in made.requests]
    settings = Settings(max_tokens=400, max_length=min(lengths) + 60)
    finished, made, _ = played(script, encoder, truthful(encoder), settings=settings)
    assert {dialogue.score for dialogue in finished.values()} == {0.0}
    assert all(len(r.ids) + r.max_tokens <= settings.max_length for _, r in made.requests)
    assert {len(reply.ids) for _, reply in made.replies} >= {0}


def test_a_first_prompt_that_does_not_fit_is_refused(encoders, script):
    encoder = encoders["qwen2.5", "hermes"]
    settings = Settings(max_tokens=400, max_length=100)
    with pytest.raises(UserError, match=r"^dialogue shop-0-0: its first prompt has \d+ tokens, "):
        played(script, encoder, truthful(encoder), settings=settings)
