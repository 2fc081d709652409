"""Rewards of the user's own, in real workers: what they are given, what becomes of what they return, and of every way to fail."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from rest_jax.config import ConfigError, RewardConfig, validate_as
from rest_jax.data.records import from_json, to_json
from rest_jax.errors import RunStopped, UserError
from rest_jax.rewards import plugin as plugin_module
from rest_jax.rewards.plugin import RewardPlugin, check_plugin
from rest_jax.rewards.score import Outcome
from rest_jax.templates import TEMPLATES

# The text of a completion says what the function does.
SOURCE = """
import json, os, sys, time

count = 0

def score(completion, text, record, target):
    global count
    count += 1
    if text == "raise":
        raise KeyError("no such thing")
    if text == "hang":
        time.sleep(60)
    if text == "spin":
        while True:
            pass
    if text == "print":
        print("noise", flush=True)
        os.write(1, b"{}\\n")
        os.system("echo more; echo worse >&2")
        sys.stderr.write("noise")
        return 1.5
    if text == "fork":
        pid = os.fork()
        return 2.5
    if text.startswith("leave "):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        open(text.partition(" ")[2], "w").write(str(pid))
        time.sleep(60)
    if text == "exit":
        os._exit(3)
    if text == "quit":
        sys.exit("enough")
    if text == "close":
        os.closerange(0, 100)
        time.sleep(60)
    if text == "eat":
        return len(bytearray(2**30))
    if text == "secret":
        return {name: 1.0 for name in os.environ if "SECRET" in name}
    if text == "seen":
        open(record["extra"]["into"], "w").write(json.dumps([completion, record, target]))
    if text.startswith("quote"):
        raise ValueError("cannot judge " + text)
    return {
        "nan": float("nan"), "inf": -float("inf"), "huge": 1e30, "text": "1", "none": None, "list": [1.0],
        "name": {"a b": 1.0}, "many": {str(i): 0 for i in range(99)}, "parts": {"length": 0.25, "style": 1},
    }.get(text, len(text) / 8)
"""
RECORD = {"id": "r", "target": {"calls": []}}
ANSWER = TEMPLATES["toolrl"].parse(b"")


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return f"{path}:score"


def ask(cfg: RewardConfig, *texts: str, record=RECORD) -> list[Outcome]:
    with contextlib.closing(RewardPlugin(cfg)) as plugin:
        plugin.begin()
        asked = plugin.ask(record, [ANSWER] * len(texts), [text.encode() for text in texts])
        return [future.result() for future in asked]


def assert_gone(file: pathlib.Path) -> None:
    """The process whose number is in a file ends, and is reaped by whoever has it by then."""
    with pytest.raises(ProcessLookupError):
        for _ in range(500):
            os.kill(int(file.read_text()), 0)
            time.sleep(0.02)


def test_a_number_or_named_parts(file):
    found = ask(RewardConfig(plugin=file), "abcd", "parts", "")
    assert found == [({"plugin": 0.5}, None), ({"length": 0.25, "style": 1.0}, None), ({"plugin": 0.0}, None)]  # fmt: skip


def test_the_function_sees_the_parse_the_record_with_its_extra_columns_and_the_gold_answer(
    file, tmp_path
):
    raw = {"id": "r", "target": {"response": "gold"}, "difficulty": 3, "extra": {"into": str(tmp_path / "seen")}}  # fmt: skip
    record = to_json(from_json(raw))
    text = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {"é": [1]}}\n</tool_call>'
    answer = TEMPLATES["toolrl"].parse(text.encode())
    with contextlib.closing(RewardPlugin(RewardConfig(plugin=file))) as plugin:
        (future,) = plugin.ask(record, [answer], [b"seen"])
        assert future.result().fault is None
    completion, seen, target = json.loads((tmp_path / "seen").read_text())
    assert completion == {
        "calls": [{"name": "f", "arguments": {"é": [1]}}], "response": None, "think": "t",
        "blocks": ["think", "calls"], "broken_calls": 0,
    }  # fmt: skip
    assert seen == record | {"messages": None, "target": target}
    assert seen["extra"] == {"difficulty": 3, "into": str(tmp_path / "seen")}
    assert target == {"calls": [], "response": "gold", "think": None, "text": None}


FAULTS = {
    "raise": "line 10: KeyError: 'no such thing'",
    "exit": "its process ended with exit code 3",
    "quit": "line 34: SystemExit: enough",
    "nan": "plugin: nan is not between",
    "inf": "plugin: -inf is not between",
    "huge": "plugin: 1e+30 is not between",
    "text": "plugin: a number is needed, not a str",
    "none": "a number is needed, not a NoneType",
    "list": "a number is needed, not a list",
    "name": "'a b': a name has letters",
    "many": "99 parts, of which there may be 32",
    "eat": "MemoryError: reward.plugin_memory is used up",
}


def test_whatever_it_does_costs_its_own_part_alone(file, capfd):
    cfg = RewardConfig(plugin=file, plugin_memory=0.5, plugin_workers=3)
    texts = [word for name in FAULTS for word in (name, "good")]
    found = ask(cfg, *texts, "print", "fork", "good")
    for (name, said), outcome in zip(FAULTS.items(), found[::2], strict=False):
        assert outcome.parts == {} and said in str(outcome.fault), name
    assert [outcome.parts for outcome in found[1:-3:2]] == [{"plugin": 0.5}] * len(FAULTS)
    assert [x.parts["plugin"] for x in found[-3:]] == [1.5, 2.5, 0.5]
    out, err = capfd.readouterr()
    assert "noise" not in out + err and "worse" not in err
    assert err.count("warning: ") == 1 and "reward.plugin" in err and "record r: " in err


def test_what_a_fault_quotes_is_harmless_in_a_terminal(file, capfd):
    record = RECORD | {"id": "r\x1b[31m"}
    text = "quote \x1b]0;title\x07\nrest-jax: error: http://me:secret@y/?token=secret"
    (outcome,) = ask(RewardConfig(plugin=file), text, record=record)
    assert "http://me:***@y/?token=***" in str(outcome.fault)
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("rest-jax: warning: reward.plugin ") and "]0;title rest-jax" in said
    assert said.isprintable() and "record r[31m: " in said


def test_what_hangs_costs_its_own_part_alone_and_what_it_forked_is_gone(file, tmp_path):
    cfg = RewardConfig(plugin=file, plugin_timeout=1.0, plugin_workers=5)
    found = ask(cfg, "good", "hang", "spin", f"leave {tmp_path / 'pid'}", "close", *["good"] * 9)
    assert [outcome.fault is None for outcome in found] == [True, *[False] * 4, *[True] * 9]
    assert found[1].fault == found[2].fault == "no answer in 1 s"
    assert_gone(tmp_path / "pid")


def test_when_everything_hangs_the_rest_of_the_step_is_given_up(file):
    cfg = RewardConfig(plugin=file, plugin_timeout=0.2, plugin_workers=2)
    with contextlib.closing(RewardPlugin(cfg)) as plugin:
        plugin.begin()
        asked = plugin.ask(RECORD, [ANSWER] * 20, [b"hang"] * 20)
        faults = [future.result().fault for future in asked]
        given_up = "given up, since 2 others of the step gave no answer"
        assert sorted(set(faults), key=str) == [given_up, "no answer in 0.2 s"]
        assert faults.count("no answer in 0.2 s") == 2
    # the next step is asked again
    assert ask(cfg, "abcd") == [({"plugin": 0.5}, None)]


@pytest.mark.slow
@pytest.mark.parametrize(("hanging", "workers"), [(5, 6), (40, 6), (40, 1)])
def test_a_step_ends_within_the_deadline_and_two_seconds(file, hanging, workers):
    cfg = RewardConfig(plugin=file, plugin_timeout=3.0, plugin_workers=workers)
    with contextlib.closing(RewardPlugin(cfg)) as plugin:
        plugin.begin()
        begun = time.monotonic()
        asked = plugin.ask(RECORD, [ANSWER] * 50, [b"hang"] * hanging + [b"good"] * (50 - hanging))
        found = [future.result() for future in asked]
        assert time.monotonic() - begun < 5.0
        if hanging < workers:
            assert [x.fault is None for x in found] == [False] * hanging + [True] * (50 - hanging)


def test_the_number_of_workers_does_not_matter(file):
    texts = ["x" * (i % 7) for i in range(20)] + ["raise", "parts"]
    one, many = (ask(RewardConfig(plugin=file, plugin_workers=n), *texts) for n in (1, 4))
    assert one == many


def test_secrets_stay_here_unless_they_are_named(file, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "x")
    monkeypatch.setenv("OTHER_SECRET", "x")
    assert ask(RewardConfig(plugin=file), "secret")[0].parts == {}
    found = ask(RewardConfig(plugin=file, plugin_env=["MY_SECRET"]), "secret")
    assert found[0].parts == {"MY_SECRET": 1.0}


def test_a_fault_may_stop_the_run(file):
    with pytest.raises(RunStopped, match=r"mine\.py:score: record r: line 10: KeyError"):
        ask(RewardConfig(plugin=file, plugin_errors="stop"), "raise")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError: No module named"),
        ("def score(:", "line 1: SyntaxError"),
        ("x = 1\nx.y", "line 2: AttributeError"),
        ("score = 3", "score is a int, not a function"),
        ("", "AttributeError: .* no attribute 'score'"),
        ("raise SystemExit(2)", "line 1: SystemExit: 2"),
        ("import os; os._exit(4)", "its process ended with exit code 4"),
        (None, "No such file or directory"),
    ],
    ids=["import", "syntax", "raise", "kind", "name", "exit", "end", "file"],
)
def test_a_file_that_cannot_be_loaded_is_one_line(text, said, tmp_path):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"^reward\.plugin .*broken\.py:score: {said}") as fault:
        check_plugin(RewardConfig(plugin=f"{path}:score"))
    assert "\n" not in str(fault.value)


def test_the_file_is_the_one_that_was_read_first_and_may_import_its_neighbours(file, tmp_path):
    (tmp_path / "mine.py").write_text("import near\ndef score(*args): return near.VALUE")
    (tmp_path / "near.py").write_text("VALUE = 7")
    cfg = RewardConfig(plugin=file)
    assert ask(cfg, "")[0].parts == {"plugin": 7.0}
    (tmp_path / "mine.py").write_text("def score(*args): return 8")
    assert ask(cfg, "")[0].parts == {"plugin": 7.0}


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(file, tmp_path):
    """In the middle of a question, too."""
    program = (
        "from rest_jax.rewards.plugin import *; from rest_jax.templates import TEMPLATES\n"
        f"plugin = RewardPlugin(RewardConfig(plugin={file!r}))\n"
        f"text = b'leave {tmp_path / 'pid'}'\n"
        "plugin.ask({'id': 'r', 'target': {}}, [TEMPLATES['toolrl'].parse(b'')], [text])[0].result()"
    )
    started = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    started.kill()
    started.wait()
    assert_gone(tmp_path / "pid")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plugin": "mine"}, "'mine': write it as FILE.py:NAME"),
        ({"plugin": "mine.py"}, "'mine.py': write it as FILE.py:FUNCTION"),
        ({"plugin": "mine.py:a b"}, "write it as"),
        ({"builtin": False}, "builtin false: no reward is left"),
    ],
    ids=["word", "function", "name", "nothing"],
)
def test_config_that_cannot_be(changes, said):
    with pytest.raises(ConfigError, match=said):
        validate_as(RewardConfig, changes, "reward")


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch):
    monkeypatch.setattr(plugin_module, "_warned", set())


def test_only_the_standard_library_is_loaded_beside_the_file(file, tmp_path):
    """A worker starts in a moment."""
    path = pathlib.Path(tmp_path / "modules.py")
    path.write_text(
        "import sys\n"
        "def score(*args): return float(bool({'numpy', 'jax', 'pydantic'} & sys.modules.keys()))"
    )
    assert ask(RewardConfig(plugin=f"{path}:score"), "")[0].parts == {"plugin": 0.0}
