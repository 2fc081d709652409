"""The command `rest-jax serve`: a policy behind OpenAI's protocol until a signal comes.

The address is taken before the model is loaded, so that a port in use is known at once; clients that come meanwhile wait. SIGTERM
and Ctrl-C stop taking connections and let what runs finish, for `drain` seconds at most.
"""

import asyncio
import contextlib
import dataclasses
import math
import signal
import socket
import threading
import traceback
from collections.abc import Iterator

import numpy as np
import uvicorn

from rest_jax.config import Config
from rest_jax.data.tokenize import Encoder
from rest_jax.distributed import num_data_shards
from rest_jax.errors import RunStopped, UserError
from rest_jax.files import absolute
from rest_jax.models.policy import ROLLOUT_KEYS, Policy, check_positions
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.requests import Request, check_capacity, make_stream
from rest_jax.run.environment import handled
from rest_jax.run.load import load_policy
from rest_jax.serving.app import Access, make_app
from rest_jax.serving.engine import Engine
from rest_jax.serving.prompts import Served, encode_chat
from rest_jax.templates import TEMPLATES, Template
from rest_jax.texts import print_text, warn

_LAST_WORDS = 5  # seconds for clients to be told that the time is over
_KEEP_ALIVE = 65  # seconds, longer than clients keep a connection that they do not use
_LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to serve; the defaults are those of the command."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    name: str | None = None  # of the model; None: that of its folder
    max_queue: int = 256  # completions that may wait for a decode slot
    drain: float = 60.0  # seconds to finish in
    access: Access = dataclasses.field(default_factory=Access)


def serve(config: Config, options: Options) -> None:
    """Serves the policy that `config.model` names, with prompts and completions as long as the config says. UserError for a model
    that cannot be served and an address that cannot be taken; RunStopped when the engine fails.
    """
    with listen(options.host, options.port) as listener:
        served, engine = load(config, options)
        server = Server(served, engine, options)
        print_text(
            f"{served.name} at {url(listener)}/v1: template {served.encoder.template.name}, prompts of up to "
            f"{served.max_prompt_tokens:,} tokens, completions of up to {served.max_new_tokens:,}; Ctrl-C ends it"
        )
        # uvicorn raises the signals again that have ended it
        with handled(lambda *_: None, signal.SIGTERM, signal.SIGINT):
            server.run(sockets=[listener])
    if engine.failure is not None:
        traceback.print_exception(engine.failure)
        raise RunStopped(f"serve: the engine failed: {engine.failure}")


@contextlib.contextmanager
def beside(config: Config, options: Options) -> Iterator[str]:
    """A server in another thread of this process while the block runs; gives its URL. Errors as for `serve`."""
    with listen(options.host, options.port) as listener:
        server = Server(*load(config, options), options)
        thread = threading.Thread(target=server.run, args=([listener],), name="server")
        thread.start()
        try:
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join()


class Server(uvicorn.Server):
    """A server that ends when its engine fails, and in `drain` seconds when it is told to end. A resource."""

    def __init__(self, served: Served, engine: Engine, options: Options):
        app = make_app(served, engine, options.access, self._end)
        config = uvicorn.Config(
            app,
            http="h11",
            loop="asyncio",
            log_config=None,  # logging stays as other packages have set it up
            log_level="warning",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(options.drain) + _LAST_WORDS,
        )
        super().__init__(config)
        self._engine, self._drain = engine, options.drain

    def _end(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, which waits for the answers that are under way; those that take too long are told so."""
        timer = asyncio.get_running_loop().call_later(self._drain, self._cut_off)
        await super().shutdown(sockets)
        timer.cancel()

    def _cut_off(self) -> None:
        if self._engine.active:
            warn(
                f"{self._engine.active} completions did not end in {self._drain} s and are cut off"
            )
        self._engine.end("the server ends")


def load(config: Config, options: Options) -> tuple[Served, Engine]:
    """The policy, and the engine that has not been started."""
    policy = load_policy(config.model, config.mesh, config.rollout.tensor)
    template = _checked_template(config, policy)
    encoder = Encoder(policy.tokenizer, template, config.data.brief_prompt)
    encode_chat(encoder, [{"role": "user", "content": "x"}], ())
    served = Served(
        options.name or absolute(config.model.source).name,
        encoder,
        config.data.max_prompt_tokens,
        config.rollout.max_response_tokens,
    )
    longest = served.max_prompt_tokens + served.max_new_tokens
    stream = make_stream(policy, config.rollout, longest=longest)
    check_capacity(stream, longest, "serve", ROLLOUT_KEYS)
    stream.submit(Request(np.array([served.tokenizer.end_id], np.int32), 1))
    while stream.pending:  # compiles what a short request needs
        stream.step()
    slots = config.rollout.decode_slots * num_data_shards(policy.rollout_mesh)
    return served, Engine(stream, slots + options.max_queue)


def _checked_template(config: Config, policy: Policy) -> Template:
    """`template_of`, of lengths that the model has positions for. UserError tells all words that the command lacks at once."""
    prompt, answer = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    half = policy.config.max_positions // 2
    fit = f"data.max_prompt_tokens={half} rollout.max_response_tokens={half}"
    template, faults = None, []
    try:
        template = template_of(config, policy.tokenizer)
    except UserError as error:
        faults.append(str(error))
    try:
        check_positions(policy.config, prompt, answer, f"{ROLLOUT_KEYS}, say {fit}")
    except UserError as error:
        faults.append(str(error))
    if template is None or faults:
        raise UserError("; and ".join(faults))
    return template


def template_of(config: Config, tokenizer: Tokenizer) -> Template:
    """The template that the config names; else the one in whose format the model's chat template asks for calls. UserError where
    it asks in none.
    """
    if "template" in config.data.model_fields_set:
        return TEMPLATES[config.data.template]
    found = [t for t in TEMPLATES.values() if tokenizer.lists_tools(t.request)]
    if not found:
        raise UserError(
            f"model {config.model.source}: its chat template asks for tool calls in no known format; name the one that it was "
            f"trained on: --template {' | '.join(TEMPLATES)}"
        )
    return found[0]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError when the address cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"serve: {host}:{port}: {reason}; name another --host or --port") from error
    if host not in _LOCAL:
        warn(f"{host} may be reached from other machines")
    return listener


def url(listener: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
