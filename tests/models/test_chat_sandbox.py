"""Limits on chat templates: what runs for ever or fills memory ends early, what templates really do is left alone."""

import time

import jinja2
import pytest
from transformers.utils import chat_template_utils

from rest_jax.models import chat_sandbox
from rest_jax.models.chat_sandbox import TemplateLimitError, rendering
from rest_jax.models.tokenizer import date_text

CHAT = [{"role": "user", "content": "hi", "sent": 1_700_000_000}] * 2
AGAIN = "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
MANY = "{% set r = range(99999) | list %}"


def render(template: str) -> str:
    chat_sandbox.install()
    chat_template_utils._compile_jinja_template.cache_clear()
    with rendering():
        texts, _ = chat_template_utils.render_jinja_template([CHAT], chat_template=template)
    return texts[0]


@pytest.mark.parametrize(
    "template",
    [
        MANY
        + "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        MANY + "{% for a in r %}{{ 'x' * 1000 }}{% endfor %}",
        AGAIN + "{% set n.x = n.x ~ n.x %}{% endfor %}",
        AGAIN + "{% set n.x = n.x + n.x %}{% endfor %}",
        # values that hold another twice
        f"{AGAIN}{{% set n.x = [n.x, n.x] %}}{{% endfor %}}{{{{ n.x }}}}",
        f"{AGAIN}{{% set n.x = [n.x] * 2 %}}{{% endfor %}}{{{{ n.x | tojson }}}}",
        f"{AGAIN}{{% set n.x = {{'a': n.x, 'b': n.x}} %}}{{% endfor %}}{{{{ n.x | string }}}}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% endif %}{{ varargs }}{% endmacro %}{{ f(60, 'ab') }}",
        "{{ 'x' * 10000000000 }}",
        "{{ [1] * 10000000000 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 9999999999) }}",
        "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
        "{{ [1] | slice(9999999999) | list }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
        "{{ (['x' * 1000000] * 1000) | join }}",
        "{{ (['x'] * 90000) | map('center', 1000000) | join }}",
        "{{ ''.join((['x'] * 90000) | map('center', 1000000)) }}",
        "{{ (['x' * 9] * 90000) | replace('x', 'y' * 1000000) }}",
        "{{ 'x' | replace(new='y' * 10000000, old='x') }}{{ ('x' * 9) | replace(new='y' * 10000000, old='x') }}",
        "{{ ('x\n' * 1000000) | indent(100000) }}",
        "{{ ('x\n' * 1000000) | indent('y' * 100000) }}",
        "{{ ([1] * 1000000) | tojson(indent=100000) }}",
        "{{ ('\t' * 1000000).expandtabs(100000) }}",
        "{{ ('x' * 1000000).translate({120: 'y' * 1000000}) }}",
        "{{ ('{0}' * 1000000).format('x' * 1000000) }}",
        "{{ ('%999999d' * 1000) % ((1,) * 1000) }}",
        "{{ ('%(a)s' * 1000000) % {'a': 'x' * 1000000} }}",
        "{{ 'x'.encode() * 10000000000 }}",
        "{{ ('x' * 1000000).encode().replace('x'.encode(), ('y' * 1000000).encode()) }}",
        "{{ (1).to_bytes(10000000000, 'big') }}",
        # one step that is slow: of the square of the letters, or of many entries
        "{{ ('x' * 5000000) | wordwrap(1) }}",
        "{{ ('<>' * 5000000) | striptags }}",
        "{{ (('http://' ~ '(' * 900000) ~ 'x' ~ (')' * 900000)) | urlize }}",
        "{{ ('x' * 5000000).strip('y' * 5000000 ~ 'x') }}",
        "{{ ('x' * 5000000).rfind('xy' ~ 'x' * 2500000) }}",
        "{{ ([1] * 9000000) | sort | length }}",
        MANY + "{{ r | select('in', r) | list }}",
        MANY + "{{ r | reject('in', r) | list }}",
        "{% set r = [1] * 9000000 %}{{ " + " or ".join(["2 in r"] * 100) + " }}",
        "{% set r = [1] * 9000000 %}{{ " + " and ".join(["r[1:]"] * 100) + " }}",
    ],
)
def test_what_does_not_end_or_is_too_large_is_refused(template, monkeypatch):
    monkeypatch.setattr(chat_sandbox, "SECONDS", 0.1)
    began = time.process_time()
    with pytest.raises(TemplateLimitError):
        render(template)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_every_failure_is_a_template_error(template):
    with pytest.raises(jinja2.TemplateError):
        render(template)


def test_what_templates_do_is_left_alone():
    """Also with large numbers that are values, and with jinja2's own output as the oracle."""
    template = (
        "{% set n = namespace(i=0, text='') %}"
        "{% for m in messages %}{% set n.i = n.i + 1 %}{% set n.text = n.text ~ m.role ~ n.i %}"
        "{{ '<|' + m['role'] + '|>' }}{{ m.content | trim }}{{ m.sent }}{{ m | tojson(indent=4) }}"
        "{{ '%d, %s' % (m.sent, m.role) }}{{ '{}: {}'.format(m.sent, 1) }}{{ m.sent | string }}"
        "{{ 7 % 4 }}{{ m.x | default(m.sent) }}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{% generation %}{{ n.text.split('r') | join(', ') }}{{ n.text.replace('user', 'me') | length * 3 }}{% endgeneration %}"
        "{% for name, text in messages[0].items() | list %}{% set pair = (name, [text]) %}{{ pair }}{% endfor %}"
        "{{ messages[::-1] | length }}{{ 'hi' in messages[0].content and messages[0].role in ['user', 'tool'] }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}{{ 'a\nb' | indent(2) }}"
        "{{ m is defined }}{{ messages[0].role is in ['user'] }}{{ 3 < 4 <= 4 }}{{ ' x ' | trim }}{{ 'x--'.rstrip('-') }}"
        "{{ messages | map(attribute='role') | join('-') }}{{ 'a' | center(5) }}{{ [1] * 3 }}{{ messages[:1] + messages[1:] }}"
    )
    limited = render(template)
    plain = chat_sandbox.ImmutableSandboxedEnvironment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", plain)
        chat_template_utils._compile_jinja_template.cache_clear()
        expected, _ = chat_template_utils.render_jinja_template([CHAT], chat_template=template)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert limited == expected[0] and "<|user|>hi1700000000" in limited


def test_long_texts_of_a_chat_are_within_the_limits():
    """Four million letters through what templates do with contents."""
    template = (
        "{% set c = 'x y\n' * 1000000 %}{{ c | trim | length }} {{ (c ~ '</t>').split('</t>')[0].rstrip('\n') | length }} "
        "{{ c | replace('x', '') | length }} {{ c | tojson | length }} {{ c | indent(2) | length }}"
    )
    assert render(template) == "3999999 3999999 3000000 5000002 5999998"


def test_the_date_is_written_in_a_format_of_bounded_length():
    """The C library pads to any width."""
    chat_sandbox.install()
    with rendering(date_text):
        texts, _ = chat_template_utils.render_jinja_template(
            [CHAT], chat_template="{{ strftime_now('%9999999999d') | length < 10000 }}"
        )
        assert texts == ["True"]
        with pytest.raises(TemplateLimitError, match="format of 4,000,000 characters"):
            chat_template_utils.render_jinja_template(
                [CHAT], chat_template="{{ strftime_now('%999d' * 800000) }}"
            )


def test_what_was_compiled_before_has_the_limits_as_well():
    chat_sandbox.install()
    template = "{{ strftime_now('%Y') }}"
    plain = chat_sandbox.ImmutableSandboxedEnvironment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", plain)
        chat_template_utils.render_jinja_template([CHAT], chat_template=template)
        chat_sandbox.install()
    with rendering(date_text):
        texts, _ = chat_template_utils.render_jinja_template([CHAT], chat_template=template)
    assert texts == ["2024"]
