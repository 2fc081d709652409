"""The driver of dialogues: many at once, each turn drawn by a stream of requests (`rollout/requests.py`).

    answer_all(source, stream, encoder, settings) -> {key: Conversation}

In: a source of queries (`worlds/records.py`), the stream of a policy, and what makes prompts. Every query that is ready is
submitted, and a dialogue that waits for its world holds no decode slot. Out: what was read and written, token by token.

A prompt that says what the ids so far say, and more, has only the rest encoded: what the model drew is never tokenised again, and
the stream, which keeps the keys and values of what it has seen, prefills only what is new. Where the chat template tells the
earlier turns otherwise than before (without their thoughts, or, in the toolrl template, in one message of the user), the prompt
is encoded anew. Ids do not depend on what the stream keeps.
"""

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np

from rest_jax.data import fields
from rest_jax.data.convert import openai
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Encoder
from rest_jax.rl.regions import label_tokens
from rest_jax.rollout.requests import Piece, Request
from rest_jax.tool_calls import Answer, Target
from rest_jax.worlds.records import Query, Reply, Source, Tokens


class Stream(Protocol):
    """What the driver asks of `rollout.requests.Stream`."""

    def submit(self, request: Request) -> int: ...

    def step(self) -> list[Piece]: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """How completions are drawn."""

    max_tokens: int  # of a completion
    max_length: int  # of a prompt with its completion
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    keep_segments: bool = True  # else the last one of each dialogue alone


def answer_all(
    source: Source, stream: Stream, encoder: Encoder, settings: Settings
) -> dict[Hashable, "Conversation"]:
    """Answers every query until the source has no more. A completion depends on the prompt, the seed, the dialogue's key and the
    turn; a query whose prompt leaves no room in `max_length` has a reply without a token. RecordError for a dialogue that no
    prompt can say.
    """
    conversations: dict[Hashable, Conversation] = {}
    drawn: dict[int, tuple[Hashable, list[Piece]]] = {}
    while True:
        queries = source.poll(block=not drawn)
        if queries is None and not drawn:
            return conversations
        for key, query in queries or ():
            conversation = conversations.setdefault(
                key, Conversation(encoder, settings.keep_segments)
            )
            request = _request(key, query, conversation, settings)
            if request is None:
                source.reply(key, conversation.add([]))
            else:
                drawn[stream.submit(request)] = (key, [])
        for piece in stream.step() if drawn else ():
            key, pieces = drawn[piece.request]
            pieces.append(piece)
            if piece.finish is not None:
                del drawn[piece.request]
                source.reply(key, conversations[key].add(pieces))


def _request(
    key: Hashable, query: Query, conversation: "Conversation", settings: Settings
) -> Request | None:
    """The next request of a dialogue, None where it is too long for one more token."""
    ids = conversation.ask(query, where=f"dialogue {key}")
    limit = settings.max_tokens if query.max_tokens is None else query.max_tokens
    most = min(limit, settings.max_length - len(ids))
    seed = _seed(settings.seed, key, conversation.turn)
    return None if most < 1 else Request(ids, most, settings.temperature, settings.top_p, seed)


def _seed(seed: int, key: Hashable, turn: int) -> int:
    """A number of 31 bits for the draws of one turn."""
    digest = hashlib.sha256(repr((seed, key, turn)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class Conversation:
    """One dialogue in tokens. `turn` counts the completions, `segments` are its tokens: a new one begins where the template has
    told the earlier turns anew.
    """

    def __init__(self, encoder: Encoder, keep_segments: bool = True):
        self.turn = 0
        self._encoder, self._keep = encoder, keep_segments
        self._prompt = ""  # the last one, as text with masked control tokens
        self._answer: Answer | None = None  # to it
        self._segments: list[list[Tokens]] = []  # pieces of each

    @property
    def segments(self) -> list[Tokens]:
        """Each is the last prompt of its turns, with their completions in it and one behind it."""
        return [_joined(pieces) for pieces in self._segments]

    def ask(self, query: Query, where: str) -> np.ndarray:
        """int32 [T]: the prompt of the next turn. RecordError for messages or tools that are none, and where the chat template
        refuses them.
        """
        tools = fields.tools(list(query.tools), f"{where}: tools")
        turns = openai.history(query.messages, tools, f"{where}: messages")
        record = StepRecord(where, "", tools, turns, Target())
        prompt = self._encoder.prompt(record)
        rest = self._rest(prompt)
        if rest is None:
            (rest,) = self._encoder.tokenizer.encode_all([prompt])
            self._segments = [*(self._segments if self._keep else ()), []]
        self._segments[-1].append(_unwritten(rest, self.turn))
        self._prompt, self._answer = prompt, None
        return np.concatenate([piece.ids for piece in self._segments[-1]])

    def add(self, pieces: Sequence[Piece]) -> Reply:
        """The completion of the prompt of `ask`, from what was drawn; nothing, where there was no room."""
        tokenizer, template = self._encoder.tokenizer, self._encoder.template
        ids = np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in pieces)])
        logp = np.concatenate([np.zeros(0, np.float32), *(piece.logp for piece in pieces)])
        entropy = np.concatenate([np.zeros(0, np.float32), *(piece.entropy for piece in pieces)])
        stopped = bool(pieces) and pieces[-1].finish == "stop"
        length = len(ids) - stopped
        data = tokenizer.bytes_of(ids[:length])
        answer = _sayable(template.parse(data))
        region = label_tokens(
            [answer],
            tokenizer.piece_lengths[ids][None],
            np.array([length]),
            np.array([stopped]),
        )[0]
        reply = Reply(
            text=("<think>" if template.thought_open else "") + data.decode("utf-8", "replace"),
            answer=answer,
            ids=ids,
            logp=logp,
            entropy=entropy,
            region=region,
            truncated=not stopped,
            prompt_tokens=sum(len(piece.ids) for piece in self._segments[-1]),
        )
        turn = np.full(len(ids), self.turn, np.int32)
        self._segments[-1].append(Tokens(ids, logp, entropy, region, turn))
        self._answer = answer
        self.turn += 1
        return reply

    def _rest(self, prompt: str) -> np.ndarray | None:
        """int32 [T]: the ids of what the prompt says behind the last completion. None where it does not begin with the last
        prompt and a turn that says what was drawn, and where the model has ended its turn otherwise than the template does.
        """
        tokenizer = self._encoder.tokenizer
        if self._answer is None or not prompt.startswith(self._prompt):
            return None
        drawn = self._segments[-1][-1].ids.tolist()
        last = drawn[-1] if drawn else None
        if last in tokenizer.stop_ids and last != tokenizer.end_id:
            return None
        end = tokenizer.bytes_of([tokenizer.end_id]).decode()
        turn, found, behind = prompt[len(self._prompt) :].partition(end)
        told = _sayable(self._encoder.template.parse(tokenizer.unmask(turn).encode()))
        if not found or _says(told) != _says(self._answer):
            return None
        # Encoded behind the end of the turn: some tokenizers begin a text otherwise.
        (ids,) = tokenizer.encode_all([end + behind])
        if not len(ids) or ids[0] != tokenizer.end_id:
            return None
        return ids[1:] if last == tokenizer.end_id else ids


def _sayable(answer: Answer) -> Answer:
    """The answer with the calls that a message can say: one without a name is as broken as one that cannot be read."""
    calls = tuple(call for call in answer.calls if call.name.strip())
    broken = answer.broken_calls + len(answer.calls) - len(calls)
    return dataclasses.replace(answer, calls=calls, broken_calls=broken)


def _says(answer: Answer) -> tuple:
    return answer.calls, answer.response or "", answer.think or "", answer.broken_calls


def _unwritten(ids: np.ndarray, turn: int) -> Tokens:
    """Tokens that the model has only read."""
    nothing = np.zeros(len(ids), np.float32)
    region = np.zeros(len(ids), np.int8)
    return Tokens(ids, nothing, nothing, region, np.full(len(ids), turn, np.int32))


def _joined(pieces: Sequence[Tokens]) -> Tokens:
    names = [field.name for field in dataclasses.fields(Tokens)]
    return Tokens(
        **{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names}
    )
