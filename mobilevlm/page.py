"""HTML pages that hold all that they show: one look, no script, nothing loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from mobilevlm._version import __version__
from mobilevlm.errors import MobileVLMError
from mobilevlm.whole_file import written_whole

FACTS = """\
{% macro key_facts(facts) %}
<dl class="facts">
  {% for fact in facts %}
  <div><dt>{{ fact.name }}</dt>
    <dd>{% if fact.link %}<a href="{{ fact.link }}">{% endif %}
      {{- fact.text }}{% if fact.link %}</a>{% endif %}</dd></div>
  {% endfor %}
</dl>
{% endmacro %}
"""
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{% endblock %}</title>
<style>
  body { margin: 0 auto; max-width: 1000px; padding: 32px 24px 64px; color: #1d2330;
         background: #fff; font: 15px/1.5 system-ui, Roboto, "DejaVu Sans", sans-serif;
         overflow-wrap: anywhere; }
  h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 40px 0 8px; }
  p { margin: 6px 0; } a { color: #2a5db0; }
  .soft, footer, dt { color: #667085; } footer { margin-top: 48px; font-size: 13px; }
  .facts { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 32px; margin: 16px 0;
           padding: 12px 16px; background: #f6f7f9; border-radius: 8px; font-size: 14px; }
  .facts div { display: flex; gap: 10px; } .facts dt { flex: 0 0 84px; font-size: 14px; }
  .facts dd { margin: 0; min-width: 0; white-space: normal; }
  nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e4e7ec; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  th { font-weight: 600; color: #667085; font-size: 13px; }
  tr.total td { font-weight: 600; }
  @media (max-width: 700px) {
    body { padding: 20px 16px 48px; }
    .facts { grid-template-columns: 1fr; }
    /* Each row of a table of the class cards becomes a card; its cells name their columns. */
    .cards tr:first-child { display: none; }
    .cards tr { display: block; padding: 8px 0; border-bottom: 1px solid #cfd4dc; }
    .cards td { display: flex; justify-content: space-between; gap: 16px; padding: 2px 0;
                border: 0; }
    .cards td:empty { display: none; }
    .cards td::before { content: attr(data-title); color: #667085; overflow-wrap: normal; }
    .cards td:first-child { font-weight: 600; } .cards td:first-child::before { content: none; }
    th, td { padding: 5px 4px; }
  }
  {% block style %}{% endblock %}
</style>
</head>
<body>
{% block body %}{% endblock %}
<footer>mobilevlm {{ version }}{% block footer %}{% endblock %}</footer>
</body>
</html>
"""


@dataclass(frozen=True)
class Fact:
    """A line of a page's head: what was measured, where and when."""

    name: str
    text: str
    link: str = ""


def page_facts(
    path: Path, machine: str, bundles: Sequence[tuple[str, str, str, str]]
) -> Iterator[Fact]:
    """Yield the date, the machine, and of each bundle folder, checkpoint, recipe and engine."""
    yield Fact("date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    yield Fact("machine", machine)
    for folder, checkpoint, recipe, engine in bundles:
        yield Fact("bundle", folder, file_link(path, Path(folder) / "manifest.json"))
        yield Fact("checkpoint", checkpoint or "unknown")
        yield Fact("recipe", recipe or "none")
        yield Fact("engine", engine)


def file_link(page: Path, target: Path) -> str:
    """Return the address of a file as seen from a page; empty if there is no such file."""
    if not target.is_file():
        return ""
    return quote(Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix())


def check_page_target(path: Path) -> None:
    """Raise MobileVLMError if a page could not be written there."""
    if not path.parent.is_dir():
        raise MobileVLMError(f"{path}: no such folder {path.parent}: make it first")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page whose template extends ``page``, whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": PAGE, "facts": FACTS}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.from_string(template).render(version=__version__, **values)
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
