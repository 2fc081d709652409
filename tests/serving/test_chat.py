"""The chat in the terminal, against a server without a model: tools that are called, errors, and what is shown."""

import io
import json
import types

import pytest

from rest_jax import cli
from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.serving.chat import load_tools
from rest_jax.worlds.synthetic import Shop, tasks
from tests.serving.servers import FakeStream, serving

PYTHON = '''
import math

HOUR = 3600

def root(x: float) -> float:
    """The square root.

    Args:
        x: a number
    """
    return math.sqrt(x)

def _hidden():
    pass
'''


@pytest.fixture
def talk(tokenizer, monkeypatch, capsys):
    """Answers, lines that the user types, options -> (what is shown, the prompts)."""

    def told(answers: list[str], typed: str, *words: str, **access) -> tuple[str, list[str]]:
        stream, left = FakeStream(tokenizer), list(answers)
        stream.answer = lambda _: tokenizer.encode(left.pop(0)).tolist()
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        with serving(stream, tokenizer, **access) as server:
            assert cli.main(["chat", server.url, *words]) == 0
        return capsys.readouterr().out, [tokenizer.text(request.ids) for request in stream.seen]

    return told


def call(name: str, /, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_dialogue(talk):
    shown, prompts = talk(
        ["<think>\nhm\n</think>\n\nHi.", "Bye."], "one\n\ntwo\n", "--system", "be brief"
    )
    assert all(word in shown for word in ("tiny", "hm\nHi.\n", "Bye.\n"))
    assert "be brief" in prompts[0] and all(word in prompts[1] for word in ("one", "Hi.", "two"))


def test_new_begins_anew(talk):
    _, prompts = talk(["a", "b"], "one\n/new\ntwo\n")
    assert "one" not in prompts[1]


def test_functions_are_called(talk, tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(PYTHON)
    answers = [call("root", x=16), call("root", x=-1), call("other"), "Four."]
    shown, prompts = talk(answers, "go\n", "--tools", str(path))
    assert (
        '"name": "root"' in prompts[0]
        and "square root" in prompts[0]
        and "_hidden" not in prompts[0]
    )
    assert 'root {"x": 16}\n4.0\n' in shown and shown.index("4.0") < shown.index("Four.")
    assert "<tool_response>\n4.0\n</tool_response>" in prompts[1]
    assert "error: ValueError: math domain error" in prompts[2]
    assert "error: LookupError: there is no tool other" in prompts[3]


def test_results_are_typed_for_tools_of_a_list(talk, tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"name": "weather", "parameters": {}}]))
    shown, prompts = talk([call("weather"), "Sunny."], "go\n25 degrees\n", "--tools", str(path))
    assert "weather {}" in shown and "25 degrees" in prompts[1] and "Sunny." in shown


def test_a_world_makes_the_calls(talk):
    task = tasks(0, 3)[2]
    gold = [turn for turn in task.gold if isinstance(turn, tuple)]
    answers = ["".join(call(c.name, **c.arguments) for c in turn) for turn in gold]
    shown, prompts = talk(
        [*answers, "Done.", "Hm."], "please\n/new\nagain\n", "--world", "synthetic:2"
    )
    assert (
        shown.count(f"(your task: {task.requests[0]})") == 2 and task.requests[0] not in prompts[0]
    )
    assert "find_customer" in prompts[0] and "orders of a shop" in prompts[0]
    first, again = shown.split("Done.")
    assert '{"customer": "c' in first and "score" not in first
    assert again.startswith("\n(score 1)") and "(score 0)" in again  # begun anew


def test_tickets_of_tau2_are_a_world(talk, monkeypatch, capsys):
    class Package:
        def __init__(self, venv):
            assert venv == "VENV"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def load(self, limit):
            return [types.SimpleNamespace(id=task) for task in tasks(0, 2)]

        def world(self):
            return Shop()

    monkeypatch.setattr("rest_jax.serving.chat.Tau2", Package)
    words = ["--data", "VENV", "--world"]
    shown, prompts = talk(["Hm."], "please\n", *words, "tau2:telecom:1")
    assert f"(your task: {tasks(0, 2)[1].requests[0]})" in shown and "find_customer" in prompts[0]
    assert cli.main(["chat", "http://127.0.0.1:9", *words, "tau2:telecom:2"]) == 2
    assert "--world tau2:telecom:2: the tasks are 0 to 1" in capsys.readouterr().err


def test_worlds_that_are_none(capsys):
    for words in (
        ["--world", "moon"],
        ["--world", "synthetic:x"],
        ["--world", "synthetic", "--tools", "t.py"],
    ):
        assert cli.main(["chat", "http://127.0.0.1:9", *words]) == 2
        assert "world" in capsys.readouterr().err


def test_a_fault_takes_back_what_was_said(talk):
    shown, prompts = talk(["fine"], f"{'word ' * 3000}\nshort\n")
    assert "at most 2,048 are taken" in " ".join(shown.split()) and "fine" in shown
    assert len(prompts) == 1 and "word" not in prompts[0]


def test_what_moves_the_cursor_is_not_shown(talk):
    shown, _ = talk(["a\x1b[2Jb\x07\x9b"], "go\n")
    assert "a[2Jb" in shown and not set("\x1b\x07\x9b") & set(shown)


def test_a_key(talk, capsys, monkeypatch):
    assert "yes" in talk(["yes"], "go\n", "--api-key", "right", api_key="right")[0]
    with pytest.raises(AssertionError):
        talk(["yes"], "go\n", api_key="right")
    assert "an API key is needed" in capsys.readouterr().err


def test_a_key_that_is_none_is_not_told(capsys):
    for key in ("secret\n", "secr\x1bet", "secreté"):
        assert cli.main(["chat", "http://127.0.0.1:9", "--api-key", key]) == 2
        error = capsys.readouterr().err
        assert "secr" not in error and "--api-key" in error


def test_classes_are_no_tools_and_coroutines_are_run(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(
        '''import dataclasses, enum
class Unit(enum.Enum):
    C = 1
@dataclasses.dataclass
class Place:
    """A place."""
    name: str
async def weather(city: str) -> str:
    """
    The weather.

    Args:
        city: where
    """
    return f"rain in {city}"
'''
    )
    tools = load_tools(str(path))
    assert [schema["function"]["name"] for schema in tools.schemas] == ["weather"]
    assert tools.call is not None and tools.call("weather", {"city": "Rome"}) == "rain in Rome"


@pytest.mark.parametrize(("name", "content", "says"), [
    ("t.py", "def f(:", "SyntaxError"),
    ("t.py", "x = 1", "no function is defined there"),
    ("t.py", "def f(x): pass", "docstring"),
    ("t.py", "import no_such_module", "no_such_module"),
    ("t.py", "import sys; sys.exit(3)", "SystemExit: 3"),
    ("t.json", "{", "not JSON"),
    ("none.json", None, "No such file"),
])  # fmt: skip
def test_files_without_tools(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        load_tools(str(path))
    assert str(path) in str(caught.value)


def test_tools_by_url_are_a_json_list(memory_store):
    url = f"{memory_store}/tools.json"
    as_path(url).write_text('[{"name": "f"}]')
    assert load_tools(url).schemas[0]["function"]["name"] == "f"
    with pytest.raises(UserError, match=r"^tools s3://b/t\.py: a local path is needed here"):
        load_tools("s3://b/t.py")


@pytest.mark.parametrize(
    "words", [["http://127.0.0.1:9"], ["http://no host"], ["http://127.0.0.1:9", "seed=1"]]
)
def test_no_server_is_one_line(words, capsys):
    assert cli.main(["chat", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rest-jax: error: chat http") and error.count("\n") == 1
