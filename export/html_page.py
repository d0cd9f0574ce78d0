"""HTML pages from the templates of this package: one file each, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from mobilevlm._version import __version__
from mobilevlm.whole_file import written_whole


def write_page(template: str, path: Path, **values: Any) -> None:
    """Fills in a template and writes it. ``values``: what it asks for, besides the ``version``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mobilevlm.export", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**values, version=__version__)
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
