"""Config files built on one another: what wins, what is never taken over, how runs are called, and every fault in one line."""

import pathlib

import pytest
import yaml
from rest_jax.config_tree import ConfigError

from rest_jax import builtin, config, config_tree


@pytest.fixture
def write(tmp_path):
    def write_file(stem: str, /, **tree) -> pathlib.Path:
        path = tmp_path / f"{stem}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path

    return write_file


@pytest.fixture
def scales(write):
    """Two scales, small and large, each with what differs in supervised runs."""
    for name, rate in (("small", 1e-3), ("large", 1e-6)):
        write(
            name,
            name=f"the-{name}",
            seed=4,
            model={"source": name, "dtype": "float32"},
            optimizer={"learning_rate": rate, "beta2": 0.95},
            train={"steps": 7},
            supervised={"optimizer": {"learning_rate": 10 * rate}, "sft": {"batch_size": 3}},
        )


def test_a_file_wins_over_its_base_key_by_key(write, scales):
    write("middle", base="small.yaml", optimizer={"beta2": 0.9}, train={"steps": 8})
    top = write("top", base="middle", train={"eval_every": 2})
    loaded = config.load(top, ["train.checkpoint_every=5"])
    assert (loaded.name, loaded.seed, loaded.model.source) == ("top", 4, "small")
    assert (loaded.optimizer.learning_rate, loaded.optimizer.beta2) == (1e-3, 0.9)
    train = loaded.train
    assert (train.steps, train.eval_every, train.checkpoint_every) == (8, 2, 5)
    assert config.validate(yaml.safe_load(config.dump(loaded))) == loaded
    assert not {"base", "supervised"} & yaml.safe_load(config.dump(loaded)).keys()


def test_another_base_names_the_run_after_it(write, scales, monkeypatch):
    top = write("top", base="small", loss={"clip_low": 0.1})
    monkeypatch.chdir(top.parent)
    large = config.load(top, base="large")
    assert (large.name, large.model.source, large.loss.clip_low) == ("top-the-large", "large", 0.1)
    assert config.load(top, base=str(top.with_name("small.yaml"))) == config.load(top)
    assert config.load(top, ["name=mine"], base="large").name == "mine"
    assert config.load(write("alone", model={"source": "x"}), base="small").model.source == "x"


def test_a_base_is_looked_for_beside_the_file_then_among_the_shipped(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    top = write("sub/top", base="quickstart")
    expected = config.load(builtin.find_config("quickstart"), ["name=top"])
    assert config.load(top) == expected
    write("sub/quickstart", model={"source": "beside"})
    assert config.load(top).model.source == "beside"


def test_supervised_runs_differ_where_the_base_says_so(write, scales):
    rl = write("rl", base="small")
    sft = write("gold", base="small", trainer="sft", sft={"tool_call_weight": 2.0})
    assert config.load(rl).optimizer.learning_rate == 1e-3
    for loaded in (
        config.load(sft),
        config.load(rl, trainer="sft"),
        config.load(rl, ["trainer=sft"]),
    ):
        assert loaded.trainer == "sft"
        assert (loaded.optimizer.learning_rate, loaded.optimizer.beta2) == (1e-2, 0.95)
        assert loaded.sft.batch_size == 3
    assert config.load(sft).sft.tool_call_weight == 2.0


def test_the_warm_start_follows_base_and_shared_overrides(write, scales, monkeypatch):
    write("gold", base="small", trainer="sft")
    top = write("both", base="small", warm_start="gold", weights={"rule": "uniform"})
    loaded = config.load(top)
    assert loaded.warm_start == config.load(top.with_name("gold.yaml"))
    assert (loaded.trainer, loaded.name) == ("rl", "both")
    words = ["seed=9", "model.dtype=auto", "output=o", "train.steps=2", "warm_start.train.steps=5"]
    monkeypatch.chdir(top.parent)
    loaded = config.load(top, words, base="large")
    start = loaded.warm_start
    assert start is not None
    assert (loaded.seed, start.seed, loaded.train.steps, start.train.steps) == (9, 4, 2, 5)
    assert (start.name, start.output, start.model.dtype) == ("gold-the-large", "o", "auto")
    assert (start.model.source, start.optimizer.learning_rate) == ("large", pytest.approx(1e-5))
    assert start.weights.rule != "uniform"
    assert config.load(top, ["warm_start=null"]).warm_start is None
    whole = write("whole", model={"source": "own"}, warm_start="gold")
    found = config.load(whole).warm_start
    assert found is not None and (found.model.source, found.name) == ("own", "gold-whole")


def refused(path: pathlib.Path, *overrides: str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        config.load(path, overrides, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_faults_of_bases_are_one_line_with_the_chain(write, tmp_path):
    a, b = write("a", base="b"), write("b", base="c")
    line = refused(a)
    assert f"{a} -> {b} -> c" in line and "'c'" in line and "quickstart" in line
    c = write("c", base="a")
    assert f"{a} -> {b} -> {c} -> {a}" in refused(a)
    assert "circle" in refused(write("self", base="self"))
    assert "[1]" in refused(write("list", base=[1]))
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "broken.yaml: not YAML" in refused(write("on_broken", base="broken"))
    assert "nowhere" in refused(write("fine", model={"source": "x"}), base="nowhere")
    assert "supervised" in refused(write("odd", model={"source": "x"}, supervised=3))


def test_faults_of_warm_starts(write, scales):
    write("gold", base="small", trainer="sft")
    assert "'absent'" in refused(write("a", base="small", warm_start="absent"))
    write("rl", base="small")
    assert "not a supervised recipe" in refused(write("b", base="small", warm_start="rl"))
    write("twice", base="small", trainer="sft", warm_start="gold")
    assert "not a supervised recipe" in refused(write("c", base="small", warm_start="twice"))
    top = write("d", base="small", warm_start="gold")
    assert "share the folder" in refused(top, "name=gold")
    line = refused(top, "warm_start.sft.batch_sise=3")
    assert "warm_start.sft.batch_sise: unknown key (nearest: batch_size)" in line


def test_merge_leaves_its_arguments_alone():
    under, over = {"a": {"b": 1, "c": 2}, "d": {"e": 1}}, {"a": {"b": 3}, "d": 4}
    assert config_tree.merge(under, over) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert under == {"a": {"b": 1, "c": 2}, "d": {"e": 1}} and over == {"a": {"b": 3}, "d": 4}


def test_a_forced_supervised_run_has_no_warm_start(write, scales):
    write("gold", base="small", trainer="sft")
    top = write("both", base="small", warm_start="gold")
    loaded = config.load(top, trainer="sft")
    assert (loaded.trainer, loaded.warm_start, loaded.name) == ("sft", None, "both")
    assert loaded.optimizer.learning_rate == 1e-2
    said = "warm_start: only a run with trainer rl"
    assert said in refused(top, "warm_start=gold", trainer="sft")  # asked for, so not dropped
    assert said in refused(top, "trainer=sft")


def test_another_base_never_changes_the_trainer(write, scales, monkeypatch):
    rl = write("rl", base="small")
    gold = write("gold", base="small", trainer="sft")
    warm = write("warm", base="small", warm_start="gold")
    write("scale", base="small", trainer="sft")
    on_scale = write("on_scale", base="scale")
    monkeypatch.chdir(rl.parent)
    for base in ("scale", "on_scale"):
        loaded = config.load(rl, base=base)
        assert (loaded.trainer, loaded.optimizer.learning_rate) == ("rl", 1e-3)
        loaded = config.load(warm, base=base)
        assert loaded.trainer == "rl" and loaded.warm_start is not None
        assert loaded.warm_start.trainer == "sft"
    loaded = config.load(gold, base="large")
    assert (loaded.trainer, loaded.optimizer.learning_rate) == ("sft", pytest.approx(1e-5))
    assert config.load(rl, ["trainer=sft"], base="scale").trainer == "sft"
    assert config.load(on_scale).trainer == config.load(on_scale, base="scale").trainer == "sft"


def test_noise_is_measured_in_reinforcement_only(write, scales):
    noisy = write("noisy", base="small", train={"measure_noise": True})
    assert config.load(noisy).train.measure_noise
    line = refused(noisy, trainer="sft")
    assert "train.measure_noise true" in line and "supervised" in line
    quiet = {"train": {"measure_noise": False}}
    both = write("both", base="noisy", supervised=quiet)
    assert config.load(both).train.measure_noise
    assert not config.load(both, trainer="sft").train.measure_noise
    write("gold", base="small", trainer="sft")
    assert "warm_start: train.measure_noise true" in refused(
        write("warm", base="noisy", warm_start="gold")
    )
