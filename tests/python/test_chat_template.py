"""Chat templates: what they mean, what they may not do, and what they may not cost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "server"))

from deltazip.chat_template import ChatTemplate, ChatTemplateError, find_chat_template
from serving_support import tiny

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Ü < 3 & 'x'?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n", "system\nuser\nassistant\n"),
        ("  {% if true %}\n    a\n  {% endif %}\nb", "    a\nb"),
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "Ü < 3 & \'x\'?"}'),
        ("{{ {'a': 1}|tojson(indent=1) }}", '{\n "a": 1\n}'),
        ("{{ bos_token + messages[0]['content'] | trim + eos_token }}", "<s>Be brief.</s>"),
        ("{% generation %}{{ messages[2].content }}{% endgeneration %}!", "yes!"),
        ("{% for m in messages %}{% if loop.last %}{{ loop.index }}{% endif %}{% endfor %}", "3"),
        ("{% for m in messages %}{{ loop.length - loop.revindex }}{% endfor %}", "012"),
        ("{% for m in 'abc' %}{% if m == 'b' %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}", "3"),
        ("{{ 'a' ~ 1 ~ none ~ ['b'] }}", "a1None['b']"),
        ("{{ messages | map(attribute='role') | join(',') }}", "system,user,assistant"),
        ("{{ 'a b'.split(' ')[1].upper() }}{{ 'x-y' | replace('-', '+') }}", "Bx+y"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ f('z') }}", "[1][z]"),
        ("{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'ab' * 2 }}", "338abab"),
        ("{% if tools %}T{% endif %}{{ tools is none }}{{ other is defined }}", "TrueFalse"),
        ("{{ 'one\ntwo' | indent(2) }}", "one\n  two"),
        ("{{ add_generation_prompt }}", "True"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ messages[1:] | length }}{{ messages[-1].role[::-1] }}", "2tnatsissa"),
    ],
)  # fmt: skip
def test_templates_mean_what_they_should(source: str, expected: str) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(MESSAGES) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ self._TemplateReference__context.name }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nobody() }}",
        "{% for %}",
        "{{ 'x' | attr('__class__') | attr('__mro__') | attr('x') }}{{ ''['__class__']() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '%s' % 1 }}",
    ],
)
def test_escapes_and_refusals_are_clear_errors(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="chat template: "):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
        "{% endmacro %}{{ f(60) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ 'a\n' | indent(999999999) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ messages | tojson(indent=999999999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ (['a'] * 99999) | join('b' * 99999) }}",
        "{{ ('b' * 99999).join(['a'] * 99999) }}",
        "{% set n = namespace(x='a') %}{% for i in 'a' * 64 %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in 'a' * 64 %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in 'a' * 64 %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
        "{{ range(99999999) | list | length }}",
    ],
)
def test_bombs_are_defused_in_time(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, timeout_s=0.5).render(MESSAGES)
    assert time.monotonic() - started < 3


def test_arguments_are_only_those_the_template_reads() -> None:
    template = ChatTemplate("{% if enable_thinking %}think{% endif %}{{ bos_token }}")
    assert template.argument_names == {"enable_thinking"}
    assert template.render([], arguments={"enable_thinking": True}) == "think"
    for name in ("bos_token", "messages", "other", "self", "__class__"):
        with pytest.raises(ChatTemplateError, match="expected arguments of"):
            template.render([], arguments={name: "x"})


def test_rendering_does_not_change_the_messages() -> None:
    source = "{% set m = messages[0] %}{% set m = 'gone' %}{{ m }}"
    messages = [{"role": "user", "content": "x"}]
    ChatTemplate(source).render(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_places_of_templates(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert find_chat_template(tmp_path) == "plain"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert find_chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_chat_template(tmp_path) == "file"
    with pytest.raises(ChatTemplateError, match="at most"):
        ChatTemplate("x" * 300_000)


def test_the_same_as_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    sources = [
        tiny.CHAT_TEMPLATE,
        "{% for m in messages %}\n  {{- m | tojson }}\n{% endfor %}\n",
        "{%- for m in messages %}{% if m.role != 'system' %}\n{{ m['content'] | trim }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}\n>>{% endif %}",
        "{% set x = messages | selectattr('role', 'equalto', 'user') | list %}{{ x | length }}",
        "{% for m in messages %}{{ loop.first }} {{ m.content ~ '!' }}\n{% endfor %}",
    ]
    for source in sources:
        expected, _ = render_jinja_template(
            conversations=[MESSAGES], chat_template=source, add_generation_prompt=True
        )
        assert ChatTemplate(source).render(MESSAGES) == expected[0]
