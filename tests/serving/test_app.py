"""OpenAI's client against the server: chat with tools, streams, log-probabilities, limits, clients that leave."""

import asyncio
import concurrent.futures
import json
import socket
import time

import httpx
import openai
import pytest

from tests.serving.servers import FakeStream, serving

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TURN = f"<think>\nhm\n</think>\n\nSo é.\n{CALL}"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def refusing(tokenizer):
    """A server that draws nothing."""
    with serving(FakeStream(tokenizer), tokenizer, max_body=20_000) as running:
        yield running
        assert not running.engine.stream.seen


@pytest.fixture(scope="module")
def running(tokenizer):
    with serving(FakeStream(tokenizer), tokenizer) as running:
        yield running


@pytest.fixture
def server(running):
    """A server whose stream is as new."""
    running.engine.stream.reset()
    yield running
    running.until_idle()


@pytest.fixture
def stream(server) -> FakeStream:
    return server.engine.stream


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def says(stream: FakeStream, text: str) -> None:
    stream.answer = lambda _: stream.tokenizer.encode(text).tolist()


def ask(client, **options):
    return client.chat.completions.create(**({"model": "tiny", "messages": USER} | options))


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_chat_with_tools(client, stream):
    says(stream, TURN)
    reply = ask(client, tools=[TOOL])
    (choice,) = reply.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 1}
    assert choice.message.content == "So é." and choice.message.reasoning_content == "hm"
    drawn = len(stream.tokenizer.encode(TURN)) + 1
    assert reply.usage.completion_tokens == drawn
    assert reply.usage.prompt_tokens == len(stream.seen[0].ids)
    # the client's own record of the message goes back, with the result
    says(stream, "2")
    result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    again = ask(client, tools=[TOOL], messages=[*USER, choice.message, result])
    assert again.choices[0].message.content == "2" and again.choices[0].finish_reason == "stop"
    text = stream.tokenizer.text(stream.seen[1].ids)
    assert CALL in text and "<tool_response>\n2\n</tool_response>" in text and "hm" in text


def test_a_stream_adds_up_to_the_reply(client, stream):
    says(stream, TURN)
    options = {
        "tools": [TOOL],
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"return_token_ids": True},
    }
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    message = whole.choices[0].message
    assert choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for c in choices) == message.content
    assert "".join(getattr(c.delta, "reasoning_content", "") for c in choices) == "hm"
    (call,) = [call for c in choices for call in c.delta.tool_calls or ()]
    assert call.index == 0
    assert call.function.model_dump() == message.tool_calls[0].function.model_dump()
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    tokens = [token for c in choices if c.logprobs for token in c.logprobs.content]
    assert tokens == whole.choices[0].logprobs.content
    ids = [i for c in choices for i in getattr(c, "token_ids", [])]
    assert ids == whole.choices[0].token_ids and len(tokens) == len(ids)
    (prompt,) = [p for chunk in chunks if (p := getattr(chunk, "prompt_token_ids", None))]
    assert prompt == whole.prompt_token_ids == stream.seen[0].ids.tolist()


def test_log_probabilities_say_their_bytes(client, stream):
    says(stream, "é")
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert bytes(b for token in content[:-1] for b in token.bytes) == "é".encode()
    assert content[-1].token == "<|im_end|>"  # the end of the turn is a token that was drawn
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)
    assert ask(client).choices[0].logprobs is None


def test_completions(client, stream):
    says(stream, "a b c d")
    reply = client.completions.create(
        model="tiny",
        prompt=["x", "yy"],
        n=2,
        stop="c",
        logprobs=1,
        extra_body={"return_token_ids": True},
    )
    assert [c.text for c in reply.choices] == ["a b "] * 4
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    assert [len(c.prompt_token_ids) for c in reply.choices] == [1, 1, 2, 2]
    assert reply.choices[0].logprobs.tokens == ["a", " b", " c"]
    assert reply.choices[0].logprobs.text_offset == [0, 1, 3]
    assert reply.choices[0].finish_reason == "stop" and reply.usage.prompt_tokens == 3
    ids = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=2)
    assert stream.seen[-1].ids.tolist() == [5, 6, 7] and ids.choices[0].finish_reason == "length"
    chunks = client.completions.create(model="tiny", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a b c d"


def test_samples_and_seeds(client, stream):
    same = [ask(client, n=3, seed=7, max_tokens=9) for _ in range(2)]
    texts = [[choice.message.content for choice in reply.choices] for reply in same]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert [(r.seed, r.sample) for r in stream.seen[:3]] == [(7, 0), (7, 1), (7, 2)]
    ask(client, temperature=0, top_p=0.5, max_tokens=2)
    ask(client, max_completion_tokens=3)
    assert [(r.temperature, r.top_p, r.max_tokens) for r in stream.seen[-2:]] == [
        (0, 0.5, 2),
        (1, 1, 3),
    ]
    assert stream.seen[-1].seed != stream.seen[-2].seed


@pytest.mark.parametrize("body", [
    {"tools": None, "stop": None, "n": None, "stream": None, "tool_choice": None, "seed": None, "model": None},
    {"stream_options": {"include_usage": None}, "logprobs": False, "top_logprobs": 0},
    {"frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}, "functions": []},
    {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "unknown": [1]},
    {"tools": [], "tool_choice": "auto", "seed": -(2**63), "temperature": 1e-9},
    {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "y", "name": "z"}]},
    {"messages": [*USER, {"role": "assistant", "content": "and"}]},
], ids=["null", "nested null", "neutral", "unknown", "edges", "developer", "assistant last"])  # fmt: skip
def test_what_is_taken(server, body):
    body = {"messages": USER, "max_tokens": 2} | body
    got = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert got.status_code == 200 and got.json()["usage"]["completion_tokens"] == 2, got.text


def test_a_required_call_is_begun_for_the_policy(client, stream):
    prompts = {}
    both = [TOOL, {"type": "function", "function": TOOL["function"] | {"name": "multiply"}}]
    for choice in ("auto", "required", {"type": "function", "function": {"name": "add"}}):
        says(stream, ' "add", "arguments": {"a": 1}}\n</tool_call>' if choice == "required"
             else ' {"a": 1}}\n</tool_call>' if choice != "auto" else CALL)  # fmt: skip
        (made,) = ask(client, tools=both, tool_choice=choice).choices
        assert made.finish_reason == "tool_calls" and made.message.content is None
        assert made.message.tool_calls[0].function.arguments == '{"a": 1}'
        prompts[str(choice)[:4]] = stream.tokenizer.text(stream.seen[-1].ids)
    assert prompts["requ"] == prompts["auto"] + '<tool_call>\n{"name":'
    assert prompts["{'ty"] == prompts["auto"] + '<tool_call>\n{"name": "add", "arguments":'
    says(stream, ' {"a": ')
    (cut,) = ask(client, tools=[TOOL], tool_choice="required").choices
    only = stream.tokenizer.text(stream.seen[-1].ids)
    assert only.endswith('<tool_call>\n{"name": "add", "arguments":')  # there is no other
    assert cut.message.tool_calls is None and cut.finish_reason == "stop"


def test_without_a_choice_of_tools_none_is_told_of_and_none_is_called(client, stream):
    says(stream, CALL)
    for options in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        (made,) = ask(client, **options).choices
        assert made.message.tool_calls is None and made.finish_reason == "stop"
        assert '"name": "add"' in made.message.content
    assert stream.seen[0].ids.tolist() == stream.seen[1].ids.tolist()


def test_control_tokens_in_a_chat_are_plain_text(client, stream):
    ask(client, messages=[{"role": "user", "content": "<|im_end|>"}], max_tokens=1)
    ids = stream.seen[0].ids.tolist()
    assert ids.count(stream.tokenizer.end_id) == 1


def test_many_at_once_are_answered_as_one_after_the_other(client, server, stream):
    def one(number: int) -> list[int]:
        messages = [{"role": "user", "content": f"number {number}"}]
        options = {"messages": messages, "seed": number, "max_tokens": 1 + number % 40}
        extra = {"return_token_ids": True}
        if number % 3:
            return ask(client, extra_body=extra, **options).choices[0].token_ids
        chunks = ask(client, extra_body=extra, stream=True, **options)
        return [i for chunk in chunks for i in getattr(chunk.choices[0], "token_ids", [])]

    sequential = [one(number) for number in range(64)]
    before = stream.steps
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, range(64))) == sequential
    assert stream.steps - before < before / 2  # they shared steps


@pytest.mark.parametrize(("body", "status", "param"), [
    ({"messages": []}, 400, "messages"),
    ({"messages": USER, "model": "other"}, 404, "model"),
    ({"messages": USER, "temperature": 2.1}, 400, "temperature"),
    ({"messages": USER, "temperature": True}, 400, "temperature"),
    ({"messages": USER, "top_p": 0}, 400, "top_p"),
    ({"messages": USER, "n": "2"}, 400, "n"),
    ({"messages": USER, "n": 65}, 400, "n"),
    ({"messages": USER, "stop": ""}, 400, "stop"),
    ({"messages": USER, "stop": ["a"] * 17}, 400, "stop"),
    ({"messages": USER, "stop": "a" * 1001}, 400, "stop"),
    ({"messages": USER, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": USER, "max_tokens": 129}, 400, "max_tokens"),
    ({"messages": USER, "max_tokens": 9, "max_completion_tokens": 129}, 400, "max_completion_tokens"),
    ({"messages": USER, "top_logprobs": 2}, 400, "top_logprobs"),
    ({"messages": USER, "logit_bias": {"1": 2}}, 400, "logit_bias"),
    ({"messages": USER, "tool_choice": "required"}, 400, "tool_choice"),
    ({"messages": USER, "tool_choice": "some"}, 400, "tool_choice"),
    ({"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400,
     "tool_choice"),
    ({"messages": USER, "tools": [{"type": "web_search"}]}, 400, "tools"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
    ({"messages": [*USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages"),
    ({"messages": USER, "seed": 2**63}, 400, "seed"),
    ([], 400, None),
])  # fmt: skip
def test_what_is_refused(refusing, body, status, param):
    got = httpx.post(f"{refusing.url}/v1/chat/completions", json=body)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, param)
    assert error["message"].startswith(param or "body")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], [[]], [1, "a"], ["a", [1]], [-1], [True], [10**9], {}]
)
def test_prompts_that_are_none(refusing, prompt):
    got = httpx.post(f"{refusing.url}/v1/completions", json={"prompt": prompt})
    assert (got.status_code, got.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(("data", "kind", "status"), [
    (b"{", "application/json", 400), (b"\xff", "application/json", 400), (b"NaN", "application/json", 400),
    (b"[" * 10_000, "application/json", 400), (b'{"n": 1, "n": 2}', "application/json", 400),
    (b"{}", "text/plain", 415), (b"x" * 20_001, "application/json", 413),
], ids=["cut", "bytes", "NaN", "deep", "twice", "text", "long"])  # fmt: skip
def test_bodies_that_are_none(refusing, data, kind, status):
    headers = {"Content-Type": kind}
    for content in (data, iter([data])):  # with a length and without
        got = httpx.post(f"{refusing.url}/v1/completions", content=content, headers=headers)
        assert got.status_code == status and got.json()["error"]["message"]


def test_paths_and_methods(refusing):
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        got = httpx.get(refusing.url + path)
        assert got.status_code == status and got.json()["error"]["type"] == "invalid_request_error"


def test_a_key(tokenizer):
    stream = FakeStream(tokenizer)
    with serving(stream, tokenizer, api_key="right") as server:
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="right").models.list().data
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_full_queue_says_when_to_come_back(tokenizer):
    stream = FakeStream(tokenizer)
    stream.seconds = 0.01
    with serving(stream, tokenizer, most=3) as server:
        url = f"{server.url}/v1/completions"

        def post(n: int) -> httpx.Response:
            return httpx.post(url, json={"prompt": "x", "n": n, "max_tokens": 60}, timeout=30)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(post, 2)
            while server.engine.active < 2:
                time.sleep(0.01)
            full = post(2)
            assert full.status_code == 429 and 1 <= int(full.headers["Retry-After"]) <= 60
            assert full.json()["error"]["code"] == "queue_full"
            assert post(1).status_code == 200 and running.result().status_code == 200
        assert post(2).status_code == 200


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_slots(server, stream, streams):
    stream.seconds, stream.answer = 0.02, lambda request: [10] * request.max_tokens
    body = json.dumps({"prompt": "x", "max_tokens": 128, "n": 6, "stream": streams})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as link:
        link.sendall((head + body).encode())
        while server.engine.active < 6 or not stream.running:
            time.sleep(0.01)
        if streams:
            link.recv(1000)
    left = stream.steps
    server.until_idle()
    assert stream.steps - left < 20  # 43 would be the end of the answers
    assert '"/v1/completions"' in httpx.get(f"{server.url}/metrics").text


def test_one_call_when_parallel_ones_are_not_wanted(client, stream):
    says(stream, f"{CALL}\n{CALL}")
    for wanted, count in ((True, 2), (False, 1)):
        (made,) = ask(client, tools=[TOOL], parallel_tool_calls=wanted).choices
        assert len(made.message.tool_calls) == count


def test_a_request_that_the_stream_refuses(client, stream, monkeypatch):
    def refuse(request):
        raise ValueError("no room")

    monkeypatch.setattr(stream, "submit", refuse)
    with pytest.raises(openai.BadRequestError, match="no room"):
        ask(client, n=3)
    monkeypatch.undo()
    assert ask(client, max_tokens=3).choices


def test_a_stop_string_frees_the_slot(client, server, stream):
    stream.answer = lambda request: stream.tokenizer.encode("ab" + "c" * 100).tolist()
    ask(client, stop="b", max_tokens=100)
    server.until_idle()
    assert stream.steps < 5


def test_an_engine_that_fails_answers_503(tokenizer):
    stream = FakeStream(tokenizer)
    stream.seconds = 0.02
    with serving(stream, tokenizer) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        chunks = ask(client, stream=True, max_tokens=100)
        next(chunks)
        stream.failure = RuntimeError("out of memory")
        with pytest.raises(openai.APIError, match="the engine has failed: out of memory"):
            list(chunks)
        server.thread.join(5)  # the server ends
        assert not server.thread.is_alive() and server.engine.failure is stream.failure


@pytest.mark.parametrize(("drain", "status"), [(5.0, 200), (0.2, 503)], ids=["in time", "too late"])
def test_a_server_that_ends_finishes_what_runs(tokenizer, capsys, drain, status):
    stream = FakeStream(tokenizer, seconds=0.03)
    body = {"prompt": "x", "max_tokens": 60}
    with (
        serving(stream, tokenizer, drain=drain) as server,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):

        def stream_it() -> list[str]:
            with httpx.stream("POST", url, json=body | {"stream": True}) as got:
                return list(filter(None, got.iter_lines()))

        url = f"{server.url}/v1/completions"
        whole, events = pool.submit(httpx.post, url, json=body), pool.submit(stream_it)
        while len(stream.running) < 2:
            time.sleep(0.01)
        server.server.should_exit = True
        assert whole.result().status_code == status
        if status == 200:
            assert whole.result().json()["usage"]["completion_tokens"] == 60
            assert events.result()[-1] == "data: [DONE]"
        else:
            assert (
                "the server ends" in whole.result().text
                and "the server ends" in events.result()[-1]
            )
        server.thread.join()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    said = capsys.readouterr().err
    assert said == "" if status == 200 else "2 completions did not end in 0.2 s" in said


def test_a_client_that_says_nothing_does_not_keep_a_server(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("rest_jax.serving.server._LAST_WORDS", 0)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with serving(FakeStream(tokenizer), tokenizer, drain=0.2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as link:
            link.sendall(head.encode())
            while not server.server.server_state.tasks:
                time.sleep(0.01)
            server.server.should_exit = True
            assert link.recv(100).startswith(b"HTTP/1.1 503")
    assert not any(record.exc_info for record in caplog.records)


def test_metrics(tokenizer):
    with serving(FakeStream(tokenizer), tokenizer) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ask(client, n=2, max_tokens=5)
        with pytest.raises(openai.BadRequestError):
            ask(client, n=0)
        page = httpx.get(f"{server.url}/metrics")
    assert page.headers["Content-Type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    path = 'path="/v1/chat/completions"'
    assert float(lines[f'rest_jax_requests_total{{{path},status="200"}}']) == 1
    assert float(lines[f'rest_jax_requests_total{{{path},status="400"}}']) == 1
    counted = {name for name in lines if "{" not in name and name.endswith("_total")}
    drawn = ("tokens", "prompt_tokens", "prefilled_tokens", "reused_tokens")
    calls = ("calls", "prefill_calls", "slot_steps")
    # dashboards name them
    assert counted == {f"rest_jax_{name}_total" for name in (*drawn, *calls)}
    assert float(lines["rest_jax_tokens_total"]) == 10
    assert float(lines["rest_jax_prompt_tokens_total"]) > 0
    assert float(lines["rest_jax_request_seconds_count"]) == 1
    assert float(lines["rest_jax_active"]) == 0


def test_clients_of_one_loop(server, stream):
    """Asynchronous streams side by side."""

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:

            async def one(seed: int) -> str:
                chunks = await client.completions.create(
                    model="tiny", prompt="x", seed=seed, max_tokens=20, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*map(one, range(8)))

    texts = asyncio.run(all_of_them())
    assert len(set(texts)) == 8 and max(len(stream.running), 0) == 0
