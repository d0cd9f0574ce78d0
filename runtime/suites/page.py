"""HTML pages that hold all that they show: one look, no script, nothing loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from mobilevlm._version import __version__
from mobilevlm.errors import MobileVLMError
from mobilevlm.whole_file import written_whole

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{% endblock %}</title>
<style>
  body { margin: 0 auto; max-width: 1000px; padding: 32px 24px 64px; color: #1d2330;
         background: #fff; font: 15px/1.5 system-ui, Roboto, "DejaVu Sans", sans-serif; }
  h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 40px 0 8px; }
  .soft, footer, dt { color: #667085; } footer { margin-top: 48px; font-size: 13px; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e4e7ec; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  th { font-weight: 600; color: #667085; font-size: 13px; }
  tr.total td { font-weight: 600; }
  {% block style %}{% endblock %}
</style>
</head>
<body>
{% block body %}{% endblock %}
<footer>mobilevlm {{ version }}</footer>
</body>
</html>
"""


def check_page_target(path: Path) -> None:
    """Raise MobileVLMError if a page could not be written there."""
    if not path.parent.is_dir():
        raise MobileVLMError(f"{path}: no such folder {path.parent}: make it first")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page whose template extends ``page``."""
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": PAGE}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.from_string(template).render(version=__version__, **values)
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
