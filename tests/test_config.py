"""Config files and overrides: what wins, where files are found, what a run is called, and every fault in one line."""

import contextlib
import functools
import pathlib

import pytest
import yaml

from rest_jax import config
from rest_jax.config import ConfigError

BUILTIN = pathlib.Path(config.__file__).parent.parent / "configs"
SCALES = sorted(path.stem for path in (BUILTIN / "scale").glob("*.yaml"))
METHODS = sorted(path.stem for path in (BUILTIN / "method").glob("*.yaml"))
SUPERVISED = ("sft", "tsft", "rsft")


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> pathlib.Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return path

    return write_file


def refused(*files: str | pathlib.Path, words: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        config.load(files, words or [])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_later_files_win_key_by_key_and_overrides_win_over_all(write):
    one = write(
        "one",
        "seed: 1\nmodel: {source: a, remat: none}\nweights: {zero: [think]}\ntrain: {steps: 7}",
    )
    two = write("two", "model: {source: b}\nweights: {zero: [tag, name]}\ntrain: {epochs: 2}")
    loaded = config.load([one, two])
    assert (loaded.seed, loaded.model.source, loaded.model.remat) == (1, "b", "none")
    assert (loaded.train.steps, loaded.train.epochs) == (7, 2)
    assert loaded.weights.zero == ("tag", "name")  # a list is replaced, not extended
    assert config.load([two, one]).model.source == "a"
    loaded = config.load([one, two], ["model.source=c", "train={epochs: 3}", "model.source=d"])
    assert (loaded.model.source, loaded.train.steps, loaded.train.epochs) == ("d", 7, 3)
    assert config.load([one], ["weights.zero=[]", "train.steps=null"]).train.steps is None


def test_a_run_is_named_after_its_files_unless_it_has_a_name(write):
    a, b = write("tiny", "model: {source: x}"), write("rest", "seed: 3")
    assert config.load([a]).name == "tiny"
    assert config.load([a, b]).name == "tiny-rest"
    assert config.load(["scale/tiny", "configs/method/rest.yaml"]).name == "tiny-rest"
    named = write("named", "name: mine")
    assert config.load([a, named, b]).name == "mine"
    assert config.load([a, named], ["name=other"]).name == "other"
    assert "name: 'a b'" in refused(a, words=["name=a b"])


def test_the_resolved_config_loads_and_is_equal(tmp_path):
    words = ["name='1e6'", "output='on'", "optimizer.learning_rate=1e-7", "weights.zero=[think]"]
    loaded = config.load(["scale/tiny", "method/rest"], words)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(loaded))
    assert config.load([path]) == loaded
    raw = yaml.safe_load(config.dump(config.load(["scale/tiny"])))
    assert config.from_overrides(raw) == config.load(["scale/tiny"])
    assert raw["optimizer"]["learning_rate"] == 2e-4 and raw["weights"]["zero"] == []


def test_values_of_yaml(write):
    path = write("a", "model: {source: x}\noptimizer: {learning_rate: 1e-6}\ntrain: {steps: ~}")
    assert config.load([path]).optimizer.learning_rate == 1e-6
    loaded = config.load([path], ["optimizer.learning_rate=3e-5", "data.shuffle=off"])
    assert (loaded.optimizer.learning_rate, loaded.data.shuffle) == (3e-5, False)
    assert config.load([path], ["name=2026-01-31"]).name == "2026-01-31"
    assert config.load([path], ["model.source=a=b"]).model.source == "a=b"
    assert "name: 7: Input should be a valid string" in refused(path, words=["name=7"])
    quoted = write("quoted", "model: {source: x}\ndata: {shuffle: 'off'}\nname: '7'")
    assert (config.load([quoted]).data.shuffle, config.load([quoted]).name) == (False, "7")


def test_references_to_other_keys_and_to_the_environment(write, monkeypatch):
    monkeypatch.setenv("RECORDS", "/records")
    path = write(
        "a", "name: run-${seed}\nmodel: {source: x}\ndata: {train: '${oc.env:RECORDS}/a.jsonl'}"
    )
    loaded = config.load([path], ["seed=5", "data.eval=${data.train}"])
    assert loaded.name == "run-5"
    assert loaded.data.train == loaded.data.eval == "/records/a.jsonl"
    assert "${" not in config.dump(loaded)
    assert refused(path, words=["name=${sed}"]) == "name: Interpolation key 'sed' not found"
    assert "name=${" in refused(path, words=["name=${"])


def test_home_is_expanded_in_every_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("model.source", "model.tokenizer", "data.train", "data.eval", "output")
    loaded = config.load([write("a", "")], [f"{key}=~/x" for key in keys])
    for key in keys:
        section, _, leaf = key.rpartition(".")
        assert getattr(getattr(loaded, section) if section else loaded, leaf) == "/home/me/x"
    assert config.load([write("b", "model: {source: ~/y}")]).model.source == "/home/me/y"
    assert config.locate("~/z") == "/home/me/z"


def test_every_fault_is_named_at_once_with_the_nearest_name(write):
    path = write("a", "model: {source: x}\noptimizer: {learning_rat: 1}\nseed: -1\nlos: {}")
    line = refused(path, words=["weights.rule=unifrm", "rollout.group_size=1"])
    assert line.startswith(f"{path}: ")
    assert "optimizer.learning_rat: unknown key (nearest: learning_rate)" in line
    assert "los: unknown key (nearest: loss)" in line
    assert "seed: -1: Input should be greater than or equal to 0" in line
    assert "weights.rule: 'unifrm'" in line and "rollout.group_size: 1" in line
    assert "model: missing, and there is no default" in refused(write("b", ""))
    assert "zz: unknown key (known: name, output," in refused(path, words=["zz=1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed"], "override 'seed': write it as section.key=value"),
        (["=3"], "write it as section.key=value"),
        (["train..steps=1"], "write it as section.key=value"),
        (["seed=[1"], "override 'seed=[1': the value cannot be read"),
        (["model=x"], "model: 'x'"),
        (["model.source.y=1"], "model.source: {'y': 1}"),
        (["weights.zero=think"], "weights.zero: 'think'"),
        (["weights.think=0"], "weights.zero"),
        (
            ["weights.zero=[tag,scaffold,name,param,think,response,other]"],
            "zero: no region of an answer in the format has a gradient",
        ),
        (["weights.zero=[tag,scaffold,name,param,think,response]"], "no region of an answer"),
        (
            ["weights.rule=constant", "weights.allow_zero_constants=true"]
            + [
                f"weights.{name}=0"
                for name in ("tag", "scaffold", "name", "param", "think", "response")
            ],
            "no region of an answer",
        ),
        (["train=[1]"], "train: Cannot merge"),
        (["data.synthetic_size=100000000000"], "data.synthetic_size"),
        (["rollout.group_size=1000000000000"], "rollout.group_size"),
        (["weights.w_min=50"], "w_min 50.0 is above w_max 20.0"),
        (["curriculum.alpha_format=1.5"], "alpha_format 1.5: of target share it is a part of"),
        (["curriculum.freed_to=[0,0]"], "freed_to: 0 for PARAM and for THINK"),
        (["curriculum.freed_to=[1]"], "curriculum.freed_to.1: "),
        (["weights.entropy_regions=[names]"], "weights.entropy_regions.0: 'names'"),
        (["weights.name_anchor=1.2"], "weights.name_anchor: unknown key"),
        (["curriculum.share_end_think=0.9"], "share_end_*: their sum 1.500 is above 1"),
        (["curriculum.adaptive_low=0.99"], "adaptive_low 0.99"),
        (["loss.kl_estimator=k1"], "loss.kl_estimator: 'k1'"),
        (["mesh.data=-1"], "mesh sizes (-1, -1, 1, 1)"),
        (["train.prompts_per_update=5"], "16 is not a multiple of train.prompts_per_update 5"),
        (["rollout.top_k=5"], "rollout.allow_truncated_support"),
        (["rollout.tis_cap=2"], "rollout.recompute_logprobs true"),
        (["rollout.staleness=1"], "rollout.tis_cap"),
        (["optimizer.learning_rate=.inf"], "optimizer.learning_rate: inf"),
        (["trainer=sft"], "trainer: unknown key (nearest: train)"),
        (["train.steps=true"], "train.steps: True: true and false are no values of it"),
        (["curriculum.freed_to=[true,false]"], "freed_to: [True, False]: true and false are no"),
        (["optimizer.learning_rate=true"], "optimizer.learning_rate: True: "),
        (["rollout.staleness=true"], "rollout.staleness: True: "),
        (["mesh.data=false"], "mesh.data: False: "),
        (["data.shuffle=2"], "data.shuffle: 2: "),
        (["data.shuffle=1"], "data.shuffle: 1: true or false is needed"),
        (["data.shuffle=0.0"], "data.shuffle: 0.0: true or false is needed"),
        (["data.shuffle='1'"], "data.shuffle: '1': true or false is needed"),
        (["train.steps=010"], "override 'train.steps=010': YAML takes 010 for 8"),
        (["train={steps: -0_17}"], "YAML takes -0_17 for -15"),
        (["train.steps=1:30"], "YAML takes 1:30 for 90"),
        (["optimizer.learning_rate=1:2.5"], "YAML takes 1:2.5 for 62.5"),
        (["seed=???"], "seed: ??? stands for a value that is missing"),
        (["seed=4294967296"], "seed: 4294967296: "),
        (["name=.."], "name: '..': "),
        (["name=.tokenised"], "name: '.tokenised': "),
        (["name=a/b"], "name: 'a/b': "),
        (["output=''"], "output: '': "),
        (["data.train=''"], "data.train: '': "),
        (
            ["output=/mnt/disk #2/runs"],
            "override 'output=/mnt/disk #2/runs': ` #` begins a comment",
        ),
        (["output=#2"], "` #` begins a comment; put the value in quotes of its own"),
        (["train={steps: 1} # or 2"], "` #` begins a comment"),
        (["train={steps: 1, steps: 2}"], "the value cannot be read"),
        (["seed=" + "[" * 100], "values within each other, more than 50 deep"),
        (["data.workers=2"], "data.workers: unknown key"),
    ],
    ids=str,
)
def test_words_that_cannot_be(words, said):
    assert said in refused("scale/tiny", words=words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nmodel: {source: x}\nseed: 2", "line 3: found duplicate key seed"),
        ("train:\n  steps: 1\n  epochs: 2\n  steps: 3", "line 4: found duplicate key steps"),
        ("name: [1\nmodel: {", "line 2: "),
        ("- 1", "a mapping is needed at the top"),
        ("3", "int"),
        ("seed: 3\ntrain: {steps: 1, epochs: 010}", "line 2: YAML takes 010 for 8"),
        ("a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
        ("\nseed: " + "[" * 50_000, "line 2: values within each other, more than 50 deep"),
        ("# " * 200_000, "400,000 bytes, a config has 262,144 at most"),
    ],
    ids=range(10),
)
def test_files_that_cannot_be_read(write, text, said):
    path = write("bad", text)
    line = refused("scale/tiny", path)
    assert line.startswith(f"{path}: ") and said in line
    with pytest.raises(ConfigError, match="bad"):
        config.read_mapping(path)


def test_a_value_with_a_hash_that_is_no_comment():
    for word in ("output=/mnt/disk#2", "output='/mnt/disk #2'", 'output="/mnt/disk #2"'):
        assert config.load(["scale/tiny"], [word]).output == word.partition("=")[2].strip("'\"")


def test_comments_alone_are_an_empty_mapping(write):
    assert config.read_mapping(write("a", "# nothing\n")) == {}
    assert config.read_mapping(write("b", "a: {b: [1, 1e-3]}")) == {"a": {"b": [1, 1e-3]}}


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "configs/{}", "configs/{}.yaml"])
def test_a_builtin_file_is_found_from_any_folder(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    assert config.builtin_file(form.format("scale/tiny")) == BUILTIN / "scale" / "tiny.yaml"
    space = next((BUILTIN / "sweeps").glob("*.yaml"))
    for name in (space.stem, f"sweeps/{space.stem}"):
        assert config.builtin_file(form.format(name), "sweeps") == space


def test_own_files_win_over_builtin_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/scale/tiny.yaml"
    pathlib.Path(name).parent.mkdir(parents=True)
    pathlib.Path(name).write_text("model: {source: mine}")
    assert config.load([name]).model.source == "mine"
    assert config.locate(name) == name


def test_an_unknown_file_is_refused_with_the_nearest_name_or_all():
    assert refused("rest").startswith("config rest: no such file")
    assert refused("rest").endswith(" (nearest: method/rest)")
    line = refused("zzz")
    assert all(f"scale/{name}" in line for name in SCALES)
    assert all(f"method/{name}" in line for name in METHODS)
    for name in ("/scale/tiny", "method/sft/x", "scale", "", "sweeps/curriculum"):
        assert "no such file" in refused(name)
    with pytest.raises(ConfigError, match="sweeps nothing: no such file"):
        config.builtin_file("nothing", "sweeps")


def test_model_paths_among_the_builtin_files_are_located(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = config.load(["scale/tiny"], ["model.tokenizer=org/model"]).model
    assert policy.source == str(BUILTIN / "quickstart_policy")
    assert policy.tokenizer == "org/model"
    for source in ("org/model", "configs/absent", "/configs/x", "models/x"):
        assert config.locate(source) == source


def test_origins_name_the_file_of_each_value(write):
    own = write("own", "optimizer: {learning_rate: 1}\nweights: {zero: [tag]}\nseed: 3")
    found = config.origins(
        ["scale/tiny", own], ["seed=4", "train={steps: 2}", "name=a-${seed}", "loss.clip_low=0.1"]
    )
    loaded = config.load(["scale/tiny", own])
    assert found.keys() == dict(config.leaves(loaded)).keys()
    expected = {
        "model.source": "scale/tiny",
        "train.eval_every": "scale/tiny",
        "optimizer.learning_rate": str(own),
        "weights.zero": str(own),
        "seed": "command line",
        "name": "command line",
        "train.steps": "command line",
        "loss.clip_low": "command line",
        "loss.clip_high": "default",
    }
    assert {path: found[path] for path in expected} == expected
    assert config.origins(["scale/tiny"])["name"] == "default"


def test_differences_name_every_leaf():
    old = config.load(["scale/tiny"])
    new = config.load(["scale/tiny"], ["train.steps=31", "weights.zero=[think]", "name=b"])
    assert config.differences(old, old) == []
    assert config.differences(old, new) == [
        ("name", "tiny", "b"),
        ("weights.zero", [], ["think"]),
        ("train.steps", 30, 31),
    ]
    assert config.differences({"a": {"b": 1}, "c": 2}, {"a": 3}) == [
        ("a.b", 1, None),
        ("c", 2, None),
        ("a", None, 3),
    ]


def test_from_overrides_leaves_its_mapping_alone():
    raw = {"name": "a", "model": {"source": "x"}}
    assert config.from_overrides(raw, ["model.remat=none", "seed=2"]).model.remat == "none"
    assert raw == {"name": "a", "model": {"source": "x"}}
    with pytest.raises(ConfigError, match=r"^config: model\.sourc: unknown key \(nearest: source"):
        config.from_overrides(raw, ["model.sourc=x"])


def test_other_records_are_validated_in_the_same_voice():
    class Inner(config.Section):
        low: float

    class Outer(config.Section):
        parts: dict[str, Inner]
        one: Inner | None = None

    raw = {"parts": {"a": {"lo": 1}}, "one": {"lwo": 1, "low": 2}}
    with pytest.raises(ConfigError) as error:
        config.validate_as(Outer, raw, "space x.yaml")
    assert str(error.value).startswith("space x.yaml: ")
    assert "parts.a.low: missing" in str(error.value)
    assert "parts.a.lo: unknown key (nearest: low)" in str(error.value)
    assert "one.lwo: unknown key (nearest: low)" in str(error.value)


BOTH = ["rollout.prompts_per_step=16", "sft.batch_size=8"]


@pytest.mark.parametrize(
    ("words", "train", "sft"),
    [
        (["scale/tiny", "method/rest"], True, False),
        (["scale/tiny_sft", "method/tsft"], False, True),
        (["scale/tiny"], True, False),
        (["scale/tiny_sft"], False, True),
        (["scale/tiny", "method/sft"], False, False),
        (["scale/tiny_sft", "method/rest_mass"], False, False),
        (["scale/tiny_sft", "loss.clip_low=0.1"], False, False),
        (["scale/tiny_sft", "method/rest_async"], False, False),
        (["scale/tiny_sft", "rollout.temperature=0.5"], False, False),
        (["scale/tiny_sft", "train.prompts_per_update=4"], False, False),
        (["scale/tiny_sft", "reward.progress_steps=9"], False, False),
        (["scale/tiny_sft", "method/ablation_static_reward"], False, True),
        (["scale/tiny_sft", "loss.vocab_chunk=8"], False, True),
        (["scale/tiny_sft", "method/rest", *BOTH], True, True),
        (["scale/tiny", "method/rsft", *BOTH], True, True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_config_is_for_the_command_whose_values_it_gives(tmp_path, words, train, sft):
    files = [word for word in words if "=" not in word]
    loaded = config.load(files, words[len(files) :])
    if train and sft:
        with pytest.raises(ConfigError, match=r"say which is meant: --train or --sft"):
            config.is_supervised(loaded)
    else:
        assert config.is_supervised(loaded) == any("sft" in word for word in words)
    for supervised, fits in ((False, train), (True, sft)):
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="read by"):
            config.check_command(loaded, supervised)
    path = tmp_path / "config.yaml"  # as it is in the folder of a run
    path.write_text(config.dump(loaded))
    config.check_command(config.load([path]), supervised=True)


def test_a_config_that_gives_neither_is_for_both_commands(write):
    loaded = config.load([write("mine", "model: {source: x}\ntrain: {steps: 1}")])
    config.check_command(loaded, supervised=False)
    config.check_command(loaded, supervised=True)


@pytest.mark.parametrize(
    ("word", "default"),
    [("extra_call_penalty=1.0", "0.5"), ("count_extra_calls=false", "True"), ("strict_match=true", "False")],
)  # fmt: skip
def test_a_part_of_a_score_that_has_none_is_refused(word, default, tmp_path):
    words = ["model.source=x", f"reward.{word}"]
    config.from_overrides({"name": "r"}, words)
    key = word.partition("=")[0]
    said = f"reward: coarse true: {key} .* has no effect, .*; leave {key} at {default}"
    with pytest.raises(ConfigError, match=said):
        config.from_overrides({"name": "r"}, [*words, "reward.coarse=true"])
    (tmp_path / "all.yaml").write_text(
        config.dump(config.from_overrides({"name": "r"}, [words[0], "reward.coarse=true"]))
    )
    assert config.load([tmp_path / "all.yaml"]).reward.coarse  # which names every key


def test_adapters_of_a_folder_need_their_rank():
    with pytest.raises(ConfigError, match=r"lora: adapter there: set lora\.rank to the r of"):
        config.load(["scale/tiny"], ["lora.adapter=there"])
    loaded = config.load(["scale/tiny"], ["lora.rank=2", "lora.targets=q", "lora.adapter=there"])
    assert loaded.lora.targets == ("q",)
    for bad in ("lora.targets=[]", "lora.targets=[w]", "lora.rank=0"):
        with pytest.raises(ConfigError, match="lora"):
            config.load(["scale/tiny"], ["lora.rank=2", bad])


@pytest.mark.parametrize("key", ["train.measure_noise", "train.measure_change"])
def test_a_supervised_run_does_not_measure_a_policy_gradient(key):
    loaded = config.load(["scale/tiny_sft"], [f"{key}=true"])
    with pytest.raises(ConfigError, match=f"{key} true"):
        config.check_command(loaded, supervised=True)


@functools.cache
def said_by(name: str) -> set[str]:
    """The keys of a builtin file."""
    return set(dict(config.leaves(config.read_mapping(BUILTIN / f"{name}.yaml"))))


loaded_once = functools.cache(lambda *files: config.load(files))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_loads_on_every_scale(scale, method):
    """The method decides nothing that the scale says, and the other way round."""
    loaded = config.load([f"scale/{scale}", f"method/{method}"])
    assert loaded.name == f"{scale}-{method}"
    found = config.differences(loaded_once(f"scale/{scale}"), loaded)
    said = said_by(f"method/{method}")
    assert {difference.path for difference in found} - {"name"} <= said
    assert not said & said_by(f"scale/{scale}")


@pytest.mark.parametrize(
    "name", [*(f"scale/{name}" for name in SCALES), *(f"method/{name}" for name in METHODS)]
)
def test_every_file_is_read_back_as_it_was_written(name):
    loaded = loaded_once(*dict.fromkeys(("scale/tiny", name)))
    assert config.from_overrides(yaml.safe_load(config.dump(loaded))) == loaded


@pytest.mark.parametrize("scale", [name for name in SCALES if f"{name}_sft" in SCALES])
def test_a_scale_for_supervised_runs_has_the_same_model_and_held_out_data(scale):
    one, two = config.load([f"scale/{scale}"]), config.load([f"scale/{scale}_sft"])
    assert one.model == two.model and one.mesh == two.mesh
    for key in ("eval", "template", "brief_prompt", "max_prompt_tokens", "synthetic_level"):
        assert getattr(one.data, key) == getattr(two.data, key)
    assert one.rollout.max_response_tokens == two.rollout.max_response_tokens
    config.check_command(two, supervised=True)
    config.check_command(one, supervised=False)


def test_the_paper_s_supervised_numbers():
    start = config.load(["scale/qwen3_1p7b_sft", "method/sft"])
    optimizer, train = start.optimizer, start.train
    assert (optimizer.learning_rate, optimizer.warmup_fraction) == (5e-6, 0.05)
    assert (train.epochs, train.steps, start.sft.max_tokens) == (3, None, 8192)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.steps", "config train.steps: a value is needed: train.steps=VALUE"),
        ("train.stepz", "config train.stepz: no such file"),
        ("name.yaml", "config name.yaml: no such file"),
        ("output.x", "config output.x: no such file"),
        ("seed", "config seed: no such file"),
    ],
)
def test_a_word_that_is_neither_file_nor_value(word, said):
    with pytest.raises(ConfigError, match=said):
        config.builtin_file(word)
