"""Tests of NAME.py against a server that only pretends to judge: python -m pytest test_NAME.py"""

import http.server
import json
import pathlib
import threading

import pytest

from rest_jax import plugins

FILE = pathlib.Path(__file__).with_name(pathlib.Path(__file__).name.removeprefix("test_"))
score = plugins.load(plugins.read(f"{FILE}:score", "test"))

RECORD = {"history": [{"role": "user", "content": "Hi"}], "extra": {}}
TARGET = {"calls": [], "response": "Hello!", "think": None, "text": None}


@pytest.fixture
def judge(monkeypatch):
    """A server whose replies are those of a list, the last one again and again; the requests that it got."""
    replies, requests = ["7"], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            message = {"role": "assistant", "content": str(reply)}
            self.wfile.write(json.dumps({"choices": [{"message": message}]}).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("JUDGE_MODEL", "judge")
    monkeypatch.setenv("JUDGE_API_KEY", "key\n")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("JUDGE_CACHE", raising=False)
    yield replies, requests
    server.shutdown()
    server.server_close()


def ask(text: str) -> float:
    return score({}, text, RECORD, TARGET)["judge"]


def test_the_mark_is_scaled_and_the_judge_sees_everything(judge):
    _, requests = judge
    assert ask("Good day!") == pytest.approx(0.7)
    ((path, key, body),) = requests
    assert (path, key, body["temperature"]) == ("/v1/chat/completions", "Bearer key", 0)
    said = body["messages"][0]["content"]
    assert "user: Hi" in said and "Hello!" in said and "Good day!" in said


def test_a_judge_that_is_busy_is_asked_again_and_one_that_refuses_is_not(judge):
    replies, requests = judge
    replies[:] = [503, "Mark: 2.5", 401]
    assert ask("a") == pytest.approx(0.25)
    with pytest.raises(OSError, match="401"):
        ask("b")
    assert len(requests) == 3


@pytest.mark.parametrize("reply", ["fine", "11"])
def test_a_reply_without_a_mark_is_a_failure(judge, reply):
    judge[0][:] = [reply]
    with pytest.raises(ValueError, match="no mark"):
        ask("a")


def test_what_was_judged_once_stays_so(judge, tmp_path, monkeypatch):
    replies, requests = judge
    monkeypatch.setenv("JUDGE_CACHE", str(tmp_path / "judged"))
    replies[:] = ["3", "9"]
    assert [ask("a"), ask("a"), ask("b")] == pytest.approx([0.3, 0.3, 0.9])
    assert len(requests) == 2
