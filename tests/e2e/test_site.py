"""The documentation as a site: it builds without a warning and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)"
)
"""Files that a page fetches when it is opened, in contrast to links that a reader follows."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_the_site_builds_without_a_warning(site: Path) -> None:
    for page in ("index", "reference/commands", "reference/python", "reference/manifest"):
        assert (site / f"{page}.html").is_file()
    assert (site / "reference" / "manifest.schema.json").is_file()


def test_pages_of_the_site_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    found = {
        page.name: loaded
        for page in pages
        if (loaded := LOADED.findall(page.read_text(encoding="utf-8")))
    }
    assert found == {}
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"url\([\"']?(?:https?:)?//", text) for text in styles)


def test_images_of_the_site_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("images/*.svg"):
        assert not re.search(r"url\([\"']?https?:|href=[\"']https?:", path.read_text("utf-8")), path
