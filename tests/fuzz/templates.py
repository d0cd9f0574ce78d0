"""Chat templates: hostile expressions from a grammar, and real templates with wrong places."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from fuzz.harness import Fuzzer
from mobilevlm.conversation import CONVERSATIONS, render, turns_template, two_separator_template
from mobilevlm.spec import ConversationSpec

CHATML = """\
{%- if messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' + messages[0].content | trim + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(count=0, last=none) -%}
{%- macro shown(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part['type'] in ['image', 'image_url'] -%}
        {%- set ns.count = ns.count + 1 -%}{{- '<image>' -}}
      {%- elif 'text' in part -%}{{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages if message.role != 'system' -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate: ' ~ message['role']) -}}
  {%- endif -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {%- generation -%}{{- shown(message.content) | replace('\\t', ' ') -}}{%- endgeneration -%}
  {{- '<|im_end|>' if not loop.last else '' -}}
  {%- if loop.index > 50 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{- {'date': strftime_now('%d %b %Y'), 'n': ns.count} | tojson(indent=2) -}}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
REAL = (
    CHATML,
    two_separator_template(CONVERSATIONS["v1"]),
    two_separator_template(CONVERSATIONS["phi"], "<im_start><image><im_end>", False),
    turns_template("Question: ", " Answer:"),
)
MESSAGES: tuple[Any, ...] = (
    [{"role": "user", "content": "What is in the image? " * 20}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who? <image>"}]},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": "日本語 🙂"},
    ],
)
TEXTS = ("'a'", "''", "'日'", "'ab '*9999", "messages|string", "messages[0]['content']", "s",
         "ns.t", "'%s'", "'%999999999d'", "'%*d'", "'%(a)s%(a)s'",
         "'{0}{0}'", "'{:999999999}'", "'{:{}}'",
         "'<b>'|safe", "m(1)", "strftime_now('%Y')", "strftime_now('%999999999Y')",
         "('%s' * 9999)", "(' ' * 9999)", "caller()", "('\\n' * 9999)")  # fmt: skip
NUMBERS = ("0", "1", "-1", "7", "1000", "99999", "10**9", "9**9**9", "2**63", "-10**18", "1e308",
           "9" * 4000, "loop.index", "n", "ns.n", "messages|length", "true", "1.5")  # fmt: skip
LISTS = ("[]", "[1, 2]", "messages", "range(100000)", "range(10**9)", "x", "ns.l", "['a']*99999",
         "s|list", "messages|map('length')", "range(99999)|map('string')", "{'a': [1]}",
         "dict(a=1)", "ns", "loop", "x|batch(10**9, 'x')", "x|slice(10**9)", "s.split('a')",
         "x|groupby(0)", "[x, x]", "(x, x, x)", "{'a': x, 'b': x}", "cycler(x, x)", "x|sort",
         "x|unique|list", "messages[0].items()|list", "namespace(l=ns)", "x[::-1]")  # fmt: skip
OPERATORS = ("*", "**", "%", "+", "~", "//", "-", "==", "<", "in", "and", "/")
FILTERS = ("center(N)", "indent(N)", "indent(T)", "join(T)", "tojson", "tojson(indent=N)", "list",
           "string", "replace('', T)", "replace('a', T)", "format(E, E)", "length", "sort", "sum",
           "sum(start=[])", "map('center', N)", "map('replace', '', T)", "batch(N, E)", "slice(N)",
           "reverse", "round(N)", "round(N, 'ceil')", "int", "abs", "upper", "title", "trim(T)",
           "wordwrap(N)", "wordcount", "truncate(N)", "urlize", "xmlattr", "pprint", "escape",
           "striptags", "filesizeformat", "random", "first", "last", "dictsort", "groupby(0)",
           "unique|list", "select('eq', E)|list", "selectattr('role')|list", "items|list", "max",
           "attr('__class__')", "attr('format')('x')", "default(E)", "map('string')|join(T)",
           "float", "safe", "forceescape", "reject('in', E)|list")  # fmt: skip
METHODS = ("center(N)", "ljust(N)", "zfill(N)", "expandtabs(N)", "replace('', T)", "join(L)",
           "format(E, E)", "format_map({'a': E})", "split('')", "split()", "splitlines()",
           "encode('idna')", "encode('utf-32')", "translate({97: T})", "count(T)", "upper()",
           "rjust(N, T)", "partition('a')", "startswith(T)", "find(T)", "append(E)", "copy()",
           "items()", "to_bytes(N)", "bit_length()", "__class__.__mro__", "index(E)",
           "get('a', E)", "update(a=1)", "title()", "casefold()", "removeprefix(T)")  # fmt: skip
STATEMENTS = (
    "{% for i in L %}B{% endfor %}",
    "{% for i in L %}{% for j in L %}{% for k in L %}B{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in L if E %}B{% endfor %}",
    "{% for i in L recursive %}{{ loop(L) }}{% endfor %}",
    "{% for i in L %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "{% for i in L %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l == ns.l }}{{ ns.l }}",
    "{% for i in L %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{% for i in L %}{% set ns.n = ns.n * ns.n + 3 %}{% endfor %}",
    "{% for i in L %}{{ loop.changed(E) }}{{ loop.cycle(E, E) }}{% endfor %}",
    "{% for i in L %}{% if E %}{% continue %}{% endif %}B{% break %}{% endfor %}",
    "{% macro m(y) %}{{ m(y) }}{{ m(y) }}{% endmacro %}{{ m(E) }}",
    "{% macro m(y) %}B{{ y }}{% endmacro %}{% for i in L %}{{ m(E) }}{% endfor %}",
    "{% macro w() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% call w() %}{% call w() %}{% call w() %}B{% endcall %}{% endcall %}{% endcall %}",
    "{% set s = E %}",
    "{% set x = L %}",
    "{% set s %}BB{% endset %}",
    "{% set ns.t = E %}",
    "{% set ns.l = ns %}",
    "{% set n = N %}",
    "{% if E %}B{% else %}B{% endif %}",
    "{% filter center(N) %}B{% endfilter %}",
    "{% with s = E %}B{% endwith %}",
    "{% autoescape true %}{{ E }}{% endautoescape %}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{% include E %}",
    "{% import E as q %}",
    "{% generation %}B{% endgeneration %}",
    "{{ E }}",
    "{{ E }}{{ E }}",
    "{{ raise_exception(E) }}",
    "{{ tojson(E) }}{{ lipsum(N) }}",
)
RARE = (
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{% if E %}" * 120 + "{% endif %}" * 120,
    "{{ 'a' }}" * 3600,
    "{% macro m(y) %}a{% endmacro %}" * 1000,
    "a" * 300_000,
)
START = (
    "{% set s = 'abc ' %}{% set x = [1, 2, 3] %}{% set n = 3 %}"
    "{% set ns = namespace(t='ab', n=3, l=[1, 2]) %}"
)


def prepare(folder: Path) -> None:
    """Write nothing: templates are made whole."""


def mutate(base: Path, random: random.Random, scratch: Path) -> tuple[str, int]:
    """Return a template and the number of the messages for it."""
    if random.random() < 0.6:
        body = "".join(_statement(random, 3) for _ in range(random.randrange(1, 5)))
        return START + body, random.randrange(len(MESSAGES))
    return _changed(random, random.choice(REAL)), random.randrange(len(MESSAGES))


def attempt(case: tuple[str, int]) -> None:
    """Render the template, twice as a chat does."""
    template, messages = case
    conversation = ConversationSpec(template, (2,), ())
    for _ in range(2):
        assert isinstance(render(conversation, MESSAGES[messages]), str)


def _statement(random: random.Random, depth: int) -> str:
    return _filled(random, random.choice(RARE if random.random() < 0.02 else STATEMENTS), depth)


def _filled(random: random.Random, text: str, depth: int) -> str:
    """Put expressions where E, T, N and L stand, and statements for B."""
    made = []
    inside = False  # of a quoted text or a word
    for place, letter in enumerate(text):
        around = text[max(0, place - 1)] + text[place + 1 : place + 2]
        inside = any(other.isalnum() or other in "'_" for other in around if other != letter)
        if letter == "B" and around[:1] in "}B":
            made.append(_statement(random, depth - 1) if depth > 0 else "b")
        elif letter in "ETNL" and not inside:
            made.append(_expression(random, depth, letter))
        else:
            made.append(letter)
    return "".join(made)


def _expression(random: random.Random, depth: int, kind: str) -> str:
    if kind == "E":
        kind = random.choice("TNL")
    plain = {"T": TEXTS, "N": NUMBERS, "L": LISTS}[kind]
    if depth <= 0 or random.random() < 0.4:
        return random.choice(plain)
    one, way = _expression(random, depth - 1, kind), random.randrange(5)
    if way == 0:
        other = _expression(random, depth - 1, random.choice("ETNL"))
        return f"({one} {random.choice(OPERATORS)} {other})"
    if way == 1:
        return f"({one}|{_filled(random, random.choice(FILTERS), depth - 1)})"
    if way == 2:
        return f"({one}).{_filled(random, random.choice(METHODS), depth - 1)}"
    if way == 3:
        return f"({one} if {random.choice(plain)} else {random.choice(plain)})"
    return random.choice(
        (f"[{one}, {one}]", f"({one}, {one})", f"{{'a': {one}}}", f"({one})[::-1]", f"({one})[0]")
    )


def _changed(random: random.Random, template: str) -> str:
    """Change a few places of a real template."""
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(template))
        kind = random.randrange(5)
        if kind == 0:
            template = template[:at] + template[at + random.randrange(1, 12) :]
        elif kind == 1:
            end = template.find("%}", at)
            if end >= 0:
                template = template[: end + 2] + _statement(random, 2) + template[end + 2 :]
        elif kind == 2:
            words = ("message['role']", "message['content']", "messages", "ns.count", "part.text")
            word = random.choice([word for word in words if word in template] or ["'"])
            template = template.replace(word, _expression(random, 2, "E"), 1)
        elif kind == 3:
            end = template.find("-}}", at)
            if end >= 0:
                wrong = _filled(random, random.choice(FILTERS), 2)
                template = f"{template[:end]} | {wrong} {template[end:]}"
        else:
            template = template[:at] + random.choice("{}%'|()[]-~\0é") + template[at:]
    return template


FUZZER = Fuzzer(prepare, mutate, attempt)
