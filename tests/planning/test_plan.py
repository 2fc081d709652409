"""A plan from end to end on the devices of this machine, and what its command says of bad input."""

import importlib.util
import json

import jax
import pytest
import yaml

from rest_jax import cli, config
from rest_jax.errors import UserError
from rest_jax.planning import compiler, plan, report, topology
from tests.conftest import REPOSITORY

on_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is missing")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache folder of its own; nothing that is compiled here runs, so it need not be fast."""
    jax.devices()  # jax reads XLA_FLAGS, which say how many there are, when it is first asked
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        yield folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two layers, 16 prompts x 4 completions, one update a step."""
    folder = tmp_path_factory.mktemp("plan")
    raw = json.loads((REPOSITORY / "configs/quickstart_policy/config.json").read_text()) | SIZES
    (folder / "config.json").write_text(json.dumps(raw))
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "small",
                "model": {"source": str(folder), "remat": "none"},
                "data": {"max_prompt_tokens": 64, "eval": None},
                "rollout": {
                    "prompts_per_step": 16,
                    "group_size": 4,
                    "max_response_tokens": 32,
                    "decode_slots": 8,
                },
                "mesh": {"fsdp": 2, "tensor": 2, "data": 2},
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def made(cache, recipe):
    return plan.make_plan(config.load([recipe]), plan.Options("cpu:8"))


def test_a_plan_names_the_memory_of_every_program(made):
    programs = made["memory"]["programs"]
    assert {"cast", "prefill", "decode", "update", "apply"} <= programs.keys()
    parts = programs["update"]
    # float32 parameters over fsdp 2 x tensor 2; AdamW keeps two of each
    assert 1.9 < parts["optimiser"] / parts["parameters"] < 2.1
    assert parts["gradient"] == parts["parameters"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert made["fits"] and made["devices"] == 8 and made["mesh"]["tensor"] == 2


def test_a_plan_counts_what_a_step_calls(made):
    calls = {name: c["calls"] for name, c in made["calls"].items()}
    # 4 data shards of 4 prompts, which fit into a row; 16 completions in 8 slots are 2 rounds, in one page of tokens
    assert (calls["prefill"], calls["decode"], calls["update"], calls["apply"]) == (1, 1, 1, 1)
    assert made["calls"]["decode"]["tokens"] == 2 * 32


def test_a_plan_counts_the_work_of_the_layers(made):
    """Useful FLOPs of the update: 3 forward passes of 4 groups (data 2 x fsdp 2 shards), tensor 2 halves them; recomputation
    and the scores behind the causal mask come on top.
    """
    width, tokens = 32, 4 * (64 + 4 * 32)
    layer = 2 * width * (4 * 8 * 2 + 4 * 8 * 2 + 3 * 64)
    useful = 3 * (2 * layer * tokens + 2 * width * 768 * 4 * 4 * 32) / 2
    assert 1.0 < made["programs"]["update"]["call"]["flops"] / useful < 2.0


def test_a_plan_shows_the_gather_of_the_weights_inside_the_layer_loop(made):
    places = {(c["kind"], c["place"]) for c in made["programs"]["update"]["collectives"]}
    assert ("all-gather", "layer loop") in places, places


@pytest.mark.parametrize(("data", "size"), [("null", 2), ("1", 1)])
def test_unset_the_data_axis_has_one_part_a_gpu_node(recipe, data, size):
    """As in a run, whose devices say on which node they are; 8 devices of this machine stand for the GPUs."""
    words = [f"mesh.data={data}", "mesh.fsdp=-1"]
    raw = config.load([recipe], words).model_dump(mode="json")
    request = {"config": raw, "supervised": False}
    made, _ = compiler.make_setup(request, topology.parse("h100:2x4"), jax.devices())
    assert made.policy.mesh.shape["data"] == size


def test_a_plan_is_a_table_and_a_picture(made, tmp_path):
    text = report.table(made)
    assert "small on cpu:8" in text and "it fits" in text and "layer loop" in text
    report.draw(made, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_plan_is_found_and_compiles_nothing(cache, made, recipe, monkeypatch):
    monkeypatch.setattr(plan, "_run_compiler", None)
    assert plan.make_plan(config.load([recipe]), plan.Options("cpu:8")) == made


def test_a_cache_that_cannot_be_used_is_one_warning(recipe, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    asked = []
    monkeypatch.setattr(plan, "_run_compiler", lambda request, _: asked.append(1) or {"made": 1})
    for steps in (1, 2):
        loaded = config.load([recipe], [f"train.steps={steps}"])
        assert plan.compile_plan(loaded, topology.parse("cpu:8"), {}) == {"made": 1}
    said = capsys.readouterr().err
    assert asked == [1, 1] and said.count("what is compiled is not kept") == 1
    assert f"{tmp_path}/file/rest_jax/plans: Not a directory" in said


@pytest.mark.slow
def test_a_supervised_plan_has_the_update_and_the_evaluations(cache, recipe, capsys, tmp_path):
    """As many useful FLOPs as three passes over the gold responses take, and no rollout but that of the evaluations."""
    words = [str(recipe), "sft.batch_size=16", "sft.max_tokens=96", "data.eval=synthetic:eval"]
    file = tmp_path / "plan.json"
    assert cli.main(["plan", *words, "--sft", "--topology", "cpu:8", "--json", str(file)]) == 0
    made = json.loads(file.read_text())
    assert "rest-jax sft" in capsys.readouterr().out and made["command"] == "sft"
    assert made["lengths"] == {"prompt": 48, "response": 48}
    assert made["programs"].keys() == {"prepare", "update", "apply"}
    assert made["calls"]["update"]["calls"] == 1
    programs = made["memory"]["programs"]
    assert {"evaluation", "evaluation prefill", "fullest update"} <= programs.keys()
    width, tokens = 32, 4 * 96
    layer = 2 * width * (4 * 8 * 2 + 4 * 8 * 2 + 3 * 64)
    useful = 3 * (2 * layer * tokens + 2 * width * 768 * 4 * 48) / 2
    assert 1.0 < made["programs"]["update"]["call"]["flops"] / useful < 2.0
    # the same config by the other command
    assert cli.main(["plan", *words, "--train", "--topology", "cpu:8", "--json", str(file)]) == 0
    assert "decode" in json.loads(file.read_text())["programs"]


@pytest.mark.slow
def test_shorter_lengths_take_less_time_to_compute(made, cache, recipe):
    options = plan.Options("cpu:8", prompt_tokens=32, response_tokens=32)
    short = plan.make_plan(config.load([recipe]), options)
    assert short["memory"] == made["memory"]
    work, before = (p["programs"]["update"]["call"]["flops"] for p in (short, made))
    assert work < before


def test_lengths_above_the_configs_are_refused(recipe, capsys):
    words = ["plan", str(recipe), "--topology", "cpu:8"]
    assert cli.main([*words, "--prompt-tokens", "65"]) == 2
    assert "--prompt-tokens 65 is above data.max_prompt_tokens 64" in capsys.readouterr().err
    for lengths, said in (
        ("--prompt-tokens 96", "--prompt-tokens 96 is above sft.max_tokens - 1 = 95"),
        ("--response-tokens 97", "--response-tokens 97 is above sft.max_tokens - 1 = 95"),
        (
            "--prompt-tokens 50 --response-tokens 48",
            "--prompt-tokens + --response-tokens 98 is above sft.max_tokens 96",
        ),
    ):
        assert cli.main([*words, *lengths.split(), "sft.max_tokens=96"]) == 2
        assert f"error: {said}; lower it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "lengths"), [((95, None), (95, 1)), ((None, 95), (1, 95)), ((None, 40), (56, 40))]
)
def test_of_one_length_the_other_is_the_longest_beside_it(recipe, asked, lengths):
    options = plan.Options("cpu:8", True, *asked)
    assert plan._lengths(config.load([recipe], ["sft.max_tokens=96"]), options) == lengths


@pytest.mark.parametrize(
    ("supervised", "word"), [(False, "rollout.prompts_per_step=6"), (True, "sft.batch_size=6")]
)
def test_what_a_run_refuses_a_plan_refuses(recipe, supervised, word):
    raw = config.load([recipe], [word]).model_dump(mode="json")
    request, key = {"config": raw, "supervised": supervised}, word.partition("=")[0]
    with pytest.raises(UserError, match=f"{key} 6 does not divide over 4 data shards"):
        compiler.make_setup(request, topology.parse("cpu:8"), jax.devices())


@pytest.mark.parametrize("where", ["cpu:1", "h100:2x4"])  # with several nodes `mesh.data` is set
@pytest.mark.parametrize(
    ("files", "supervised", "said"),
    [
        (["scale/tiny_sft", "method/sft"], False, "sft.batch_size, .* read by `rest-jax sft`"),
        (["scale/tiny", "method/rest"], True, "rollout.group_size, .* read by `rest-jax train`"),
    ],
)
def test_a_config_of_the_other_command_is_refused(
    cache, monkeypatch, where, files, supervised, said
):
    def compile_here(request, where):
        return compiler.make_setup(json.loads(json.dumps(request)), where, jax.devices())

    monkeypatch.setattr(plan, "_run_compiler", compile_here)
    with pytest.raises(UserError, match=said):
        plan.compile_plan(config.load(files), topology.parse(where), {"supervised": supervised})


@pytest.mark.parametrize("command", ["train", "sft"])
def test_the_config_of_a_run_is_planned_as_what_trained_it(tmp_path, monkeypatch, capsys, command):
    """It gives every key, those of the other command too."""
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(config.load(["scale/tiny", "method/rest"])))
    asked = []
    monkeypatch.setattr(plan, "plan", lambda _, options: asked.append(options.supervised) or 0)
    words = ["plan", str(file), "--topology", "cpu:1"]
    assert cli.main(words) == 2
    assert "say which is meant: --train or --sft" in capsys.readouterr().err
    lines = ({"step": 0, "launch": {"command": command}}, {"step": 1, "params": "a1"})
    (tmp_path / "digests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(words) == 0 and cli.main([*words, "--sft"]) == 0
    assert asked == [command == "sft", True]


@pytest.mark.slow
def test_what_does_not_fit_ends_with_the_smallest_change(monkeypatch, cache, recipe, capsys):
    """A machine with less memory than 8 decode slots need."""
    full = plan.make_plan(config.load([recipe]), plan.Options("cpu:8"))["memory"]["programs"]
    most = max(parts["total"] for parts in full.values())
    chip = topology.Chip("cpu", int(most / plan.FULL) - 1)
    small = topology.Topology("cpu:8", "cpu", (8,), chip)
    monkeypatch.setattr(topology, "parse", lambda name: small)
    assert cli.main(["plan", str(recipe), "--topology", "cpu:8"]) == 1
    said = capsys.readouterr().out
    assert "it does not fit" in said and "it fits with " in said


def test_a_compiler_that_is_killed_is_no_verdict(monkeypatch, recipe):
    """The system kills it in every try, for its own memory: more devices need not help."""
    where = topology.parse("cpu:8")
    needs = {"decode": {"cache": 2**50, "total": 2**50}}

    def compile_first(config, where, request):
        if request["memory_only"]:
            raise plan.CompilerEnded("plan: the compiler of cpu:8 ended with exit code -9: nothing")
        return {"memory": {"limit": where.chip.memory, "programs": needs}}

    monkeypatch.setattr(plan, "compile_plan", compile_first)
    made = plan.make_plan(config.load([recipe]), plan.Options(where.name))
    said = report.verdict(made)
    assert made["change"] is None and said.endswith("ended with exit code -9: nothing")
    assert "could not be compiled" in said and "more devices" not in said


@pytest.mark.aot
@on_tpu
def test_slices_reduce_the_gradient_over_the_network_between_them(cache, recipe, tmp_path):
    """`mesh.data` unset is one part a slice: weights are gathered inside slices, the gradient crosses, and no more than the
    batch itself, of which a micro-batch may have any rows. 4 x 128 wide, since TPUs pad to 128.
    """
    raw = json.loads((recipe.parent / "config.json").read_text()) | {"hidden_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    free = [f"model.source={tmp_path}", "mesh.data=null", "mesh.fsdp=-1", "mesh.tensor=1"]
    made = plan.make_plan(config.load([recipe], free), plan.Options("2xv5e:2x2"))
    assert (made["devices"], made["mesh"]["data"], made["mesh"]["fsdp"]) == (8, 2, 4)
    found = made["programs"]["update"]["collectives"]
    crossing = [c for c in found if c["crosses"]]
    batch = [c["nbytes"] for c in crossing if c["kind"] == "all-gather"]
    # prompts; ids, weights, advantages and log-probs of the tokens of responses: 4 bytes each
    prompts, responses, values = 16 * 64, 16 * 4 * 32, 6
    assert sum(batch) <= 4 * (prompts + values * responses)
    reduced = [c for c in crossing if c["kind"] in ("all-reduce", "reduce-scatter")]
    assert reduced and len(reduced) + len(batch) == len(crossing)
    assert {c["group"] for c in crossing} == {2}
    assert all(c["group"] <= 4 for c in found)
    # Each of 4 devices of a slice reduces its quarter of the gradient with its counterpart; that of the tied embedding twice,
    # as head and as embedding.
    gradient, embedding = made["memory"]["programs"]["update"]["gradient"], 4 * 768 * 128
    assert sum(c["nbytes"] for c in reduced) == pytest.approx(gradient + embedding, rel=0.02)
    assert "across slices" in report.table(made)
    with pytest.raises(UserError, match=r"mesh.tensor 8: does not divide the 4 devices of a slice"):
        plan.make_plan(
            config.load([recipe], ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8"]),
            plan.Options("2xv5e:2x2"),
        )
