"""Chat templates: what Transformers renders is rendered alike, what takes too much is refused."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import pytest

from mobilevlm.errors import PromptError
from mobilevlm.templates.chat_template import NODES, SOURCE_CHARACTERS, render_template

pytestmark = pytest.mark.pure

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Größe <b>?"}]},
    {"role": "assistant", "content": "Yes."},
]


def rendered(template: str) -> str:
    return render_template(template, messages=MESSAGES, add_generation_prompt=True)


def refused(template: str) -> str:
    with pytest.raises(PromptError) as caught:
        rendered(template)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 300
    assert "template" in message
    return message


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% generation %}{{ messages[2].content }}{% endgeneration %}", "Yes."),
        ("{%- generation -%} a {%- endgeneration -%}", "a"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }} "
         "{% endfor %}", "system user "),
        ("{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }} "
         "{% endfor %}", "system assistant "),
        ("{% for m in messages %}{% generation %}{% if loop.first %}{% continue %}{% endif %}"
         "{{ m.role }} {% endgeneration %}{% endfor %}", "user assistant "),
        ("{{ messages[1] | tojson }}", json.dumps(MESSAGES[1], ensure_ascii=False)),
        ("{{ messages[1] | tojson(indent=4) }}",
         json.dumps(MESSAGES[1], ensure_ascii=False, indent=4)),
        ("{{ {'b': 1, 'a': '<é>'} | tojson(ensure_ascii=true, sort_keys=true) }}",
         '{"a": "<\\u00e9>", "b": 1}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("    {% if true %}\n  a\n    {% endif %}\nb", "  a\nb"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages[0]['content'].split(' ')[-1].rstrip('.').upper() }}", "BRIEF"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "3"),
        ("{% for m in messages %}{{ loop.length - loop.index }}{{ ',' if not loop.last }}"
         "{% endfor %}", "2,1,0"),
        ("{% macro f(x, y='!') %}{{ x ~ y }}{% endmacro %}{{ f('a') ~ f('b', y=1.5) }}", "a!b1.5"),
        ("{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}x{% endcall %}", "<x>"),
        ("{{ '%s is %5.2f%%' % ('it', 2) }} {{ '{} {:.1f}'.format('a', 0.25) }}",
         "it is  2.00% a 0.2"),
        ("{{ 'a' * 3 + 'b' }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}", "aaab310243"),
        ("{{ messages[1:][::-1][0].role }}{{ 'x' in 'xyz' and 'role' in messages[0] }}",
         "assistantTrue"),
        ("{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
         "role=system;content=Be brief.;"),
        ("{{ undefined_name }}{{ undefined_name is defined }}{{ tools or 'none' }}", "Falsenone"),
        ("{% set text %}a{{ 1 }}{% endset %}{{ text | indent(2, true) }}", "  a1"),
        ("{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
         "123"),
        ("{{ range(3) | list }}{{ (1, 'a') }}{{ {'k': none} }}", "[0, 1, 2](1, 'a'){'k': None}"),
    ],
)  # fmt: skip
def test_templates_render_as_in_transformers(template: str, expected: str) -> None:
    assert rendered(template) == expected


def test_strftime_now_gives_the_date() -> None:
    before = f"{datetime.now():%d %b %Y}"
    found = rendered("{{ strftime_now('%d %b %Y') }}")
    assert found in (before, f"{datetime.now():%d %b %Y}")


def test_raise_exception_shows_its_text_in_one_line() -> None:
    message = refused("{{ raise_exception('roles must\n alternate \x1b[31m') }}")
    assert message == (
        "the bundle's chat template refuses these messages: roles must  alternate \ufffd[31m"
    )
    assert len(refused("{{ raise_exception('a' * 5000) }}")) < 300


DOUBLING = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}"
)
HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}x{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}" + "x" * 20000 + "{% endfor %}",
    "{{ range(10**9) | list }}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [messages] * 10**8 }}",
    "{{ 9**9**9 }}",
    "{{ 2.5 | round(10**9, 'ceil') }}",
    DOUBLING.replace("START", "'ab'").replace("NEXT", "ns.x ~ ns.x"),
    DOUBLING.replace("START", "'ab'").replace("NEXT", "ns.x + ns.x"),
    DOUBLING.replace("START", "'ab'").replace("NEXT", "ns.x | replace('a', ns.x)"),
    DOUBLING.replace("START", "'ab'").replace("NEXT", "'%s%s' % (ns.x, ns.x)"),
    DOUBLING.replace("START", "'ab'").replace("NEXT", "'{0}{0}'.format(ns.x)"),
    DOUBLING.replace("START", "'ab'").replace("NEXT", "[ns.x, ns.x] | join(ns.x)"),
    DOUBLING.replace("START", "'ab'").replace("NEXT", "ns.x.join([ns.x, ns.x, ns.x])"),
    DOUBLING.replace("START", "3").replace("NEXT", "ns.x * ns.x"),
    DOUBLING.replace("START", "[1]").replace("NEXT", "ns.x + ns.x"),
    DOUBLING.replace("START", "[1]").replace("NEXT", "[ns.x, ns.x]"),
    DOUBLING.replace("START", "[1]").replace("NEXT", "{'a': ns.x, 'b': ns.x}"),
    DOUBLING.replace("START", "[1]").replace("NEXT", "dict(a=ns.x, b=ns.x)"),
    "{% set x = range(9999) | list %}{% for i in x %}{{ x == x }}{% endfor %}",
    "{% set x = range(9999) | list %}{% for i in x %}{{ 'a' in x }}{% endfor %}",
    "{% set x = range(9999) | list %}{% for i in x %}{{ x | sort | length }}{% endfor %}",
    "{% set x = range(9999) | list %}{% for i in x %}{{ x | sum }}{% endfor %}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ ['a'] | map('center', 10**9) | list }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%(a(b))999999999d' % {'a(b)': 1} }}",
    "{{ '%.999999999f' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{:999999d}'.format(1) }}",
    "{{ '{:.999999f}'.format(1.5) }}",
    "{{ '{a:999999999}'['format'](a=1) }}",
    "{{ ('%s' * 9999) % ('a' * 9999) }}",
    "{{ ('{0}' * 9999).format('a' * 9999) }}",
    "{{ ('a' * 99999) | join('b' * 99999) }}",
    "{{ ('a' * 99999) | replace('', 'b' * 99999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('\n' * 99999) | indent(9999) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ [[[[[[1]]]]]] | tojson(indent='a' * 4000000) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ [[1]] * 9999 | sum(start=[]) }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns }}",
    "{% set ns = namespace() %}{{ dict(a=ns) }}",
    "{{ lipsum(10**6) }}",
    "{{ (1).to_bytes(10**9) }}",
    "{{ ('é' * 99999).encode('idna') }}",
    "{{ strftime_now('%999999999Y') }}",
    "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "{% include 'file' %}",
    "{% import 'file' as f %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "+".join("1" * 2000) + " }}",
    "{% if true %}" * 200 + "{% endif %}" * 200,
    "{{ 1 }}" * NODES,
    "a" * (SOURCE_CHARACTERS + 1),
    "{{ " + "9" * 5000 + " }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role=1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
]  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:70])
def test_what_takes_too_much_is_refused_at_once(template: str) -> None:
    start = time.perf_counter()
    refused(template)
    assert time.perf_counter() - start < 5


def test_a_long_chat_stays_far_below_the_limits() -> None:
    turns = [{"role": "user", "content": "word " * 200}] * 500
    template = (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('role') }}{% endif %}{{ '<|' ~ m.role ~ '|>\n' + m.content | trim }}"
        "{% endfor %}"
    )
    assert render_template(template, messages=turns).count("word") == 100_000


def test_one_rendering_does_not_use_up_the_budget_of_the_next() -> None:
    for _ in range(20):
        assert len(rendered("{% for i in range(60000) %}a{% endfor %}")) == 60_000
