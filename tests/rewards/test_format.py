"""S_format for each template and kind of gold answer, strict and not."""

import pytest

from rest_jax.rewards.score import format_score
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target

CALL = Call("f", {"a": 1})
KINDS = {
    "calls": Target(calls=(CALL,)),
    "response": Target(response="hi"),
    "both": Target(calls=(CALL,), response="hi"),
    "think": Target(),
}
T = "<think> t </think>\n"
C = '<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>\n'
R = "<response> hi </response>"
BARE = '{"name": "f", "parameters": {"a": 1}}\n'


def scores(template: str, text: str, strict: bool) -> str:
    """The kinds of gold answer for which the text is well formed."""
    answer = TEMPLATES[template].parse(text.encode())
    return " ".join(
        k for k, target in KINDS.items() if format_score(answer, target, template, strict) == 1.0
    )


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (T + C, "calls", "calls think"),
        (T + R, "response", "response"),
        (T + C + R, "both", "response both"),
        (T, "think", "think"),
        (T + R + C, "", "response"),
        (C, "", ""),
        (C + R, "", ""),
        ("", "", ""),
        ("Sure! " + T + C, "", "calls think"),
        (T + C + "Bye!", "", "calls think"),
        (T + "text" + R, "", "response"),
        (T + C + C, "", "calls think"),
        (T + C + R + R, "", "response both"),
        (T + C + "<tool_call>", "", "calls think"),
        (T + C.removesuffix("</tool_call>\n"), "", "think"),
        ("<think> a </think> b </think>" + C, "", "calls think"),
        ("<think> a <think> b <tool_call> c </think>" + C, "calls", "calls think"),
        (T + "<tool_call>nothing</tool_call>", "", "think"),
        (T + "<tool_call>\n</tool_call>", "", "think"),
        (T + "<response> \n </response>", "", "response"),
        (T + C + "<response></response>", "", "response both"),
        ("<think> </think>", "", "think"),
        ("<think> </think>\n" + C + R, "both", "response both"),
    ],
)
def test_toolrl(text, strict, lenient):
    assert scores("toolrl", text, True) == strict
    assert scores("toolrl", text, False) == lenient


@pytest.mark.parametrize("template", ["hermes", "llama3"])
def test_prose_templates(template):
    call = BARE if template == "llama3" else C
    for thought in ("", T):
        assert scores(template, thought + call, True) == "calls"
        assert scores(template, thought + call + call, True) == "calls"
        assert scores(template, thought + "hi", True) == "response"
        assert scores(template, thought + "hi\n" + call, True) == "both"
        assert scores(template, thought + "hi\n" + call + "\nbye", True) == ""
        assert "calls" in scores(template, thought + "hi\n" + call + "\nbye", False)
    assert scores(template, T, True) == "think"
    assert scores(template, "", True) == ""
    assert scores(template, "<think> never closed", True) == ""
