"""The picture of a tool call: every token with its text, its region's colour and its weight; well-formed SVG."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from rest_jax.analysis.plotting import REGION_COLOURS
from rest_jax.analysis.report import Series
from rest_jax.config import Config
from rest_jax.tool_calls import Region

TEXTS = ["<think>", " why <&>", "</think>", "\n", "<tool_call>", "\n", '{"name": "', "f", '"}', "<|im_end|>"]  # fmt: skip
REGION = np.array([1, 5, 1, 2, 1, 2, 2, 3, 2, 1], np.int8)
SVG = "{http://www.w3.org/2000/svg}"


def test_weights_are_those_in_force_normalised_over_the_completion(pictures):
    weights = {"normalizer": "all_tokens"}
    config = Config.model_validate({"name": "t", "model": {"source": "none"}, "weights": weights})
    series = {
        f"region/{name}/base": Series([1, 9], [0.5 + i, 1.0])
        for i, name in enumerate(REGION_COLOURS)
    }
    step, weight = pictures.weights_at(config, series, 0, REGION)
    assert step == 1 and weight.mean() == pytest.approx(1, abs=1e-5)
    assert weight[7] / weight[0] == pytest.approx(2.5 / 0.5)  # name over tag
    step, weight = pictures.weights_at(config, series, -1, REGION)
    assert step == 9
    np.testing.assert_allclose(weight, 1, atol=1e-5)


def test_lines_break_after_newlines_only_where_the_next_would_not_fit(pictures, monkeypatch):
    assert pictures.lines_of(TEXTS) == [list(range(10))]
    monkeypatch.setattr(pictures, "COLUMNS", 40)
    assert pictures.lines_of(TEXTS) == [list(range(6)), list(range(6, 10))]


def test_every_token_is_drawn(pictures):
    weights = [(1, np.linspace(0.2, 2, 10)), (30, np.ones(10))]
    root = ElementTree.fromstring(pictures.draw_tokens(TEXTS, REGION, weights))
    shown = [t.text for t in root.iter(f"{SVG}text") if t.get("textLength")]
    expected = [t.replace("\n", "⏎").replace(" ", "\u00a0") for t in TEXTS]
    assert shown == expected * 2
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("fill-opacity")]
    colours = [REGION_COLOURS[Region(r).name.lower()] for r in REGION]
    assert [box.get("fill") for box in boxes] == colours * 2
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert "Weights in step 1" in words and "Weights in step 30" in words
    for meaning in ("tags", "JSON syntax", "tool name", "reasoning"):
        assert meaning in words
    assert "arguments" not in words  # a region that does not occur has no legend


def test_a_folder_without_a_run_is_one_line(pictures, tmp_path, capsys):
    assert pictures.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("readme_pictures: error: ") and error.count("\n") == 1
