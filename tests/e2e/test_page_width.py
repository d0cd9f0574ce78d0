"""Reports on a phone: nothing is wider than a window of 390 pixels."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from measured_artifacts import ARTIFACTS

from mobilevlm.runtime.suites.artifact_page import write_artifact_page
from mobilevlm.runtime.suites.report import write_report

CHROMIUM = shutil.which("chromium")
MEASURE = """<script>addEventListener("load", () => {
document.title = "width " + document.documentElement.scrollWidth; });</script>"""
LONG = "a-name-without-any-place-to-break-" * 3


def scroll_width(page: Path) -> int:
    """Return the width of a page in a frame of 390 pixels."""
    assert CHROMIUM is not None
    framed = page.with_name("framed.html")
    text = page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>")
    page.write_text(text, encoding="utf-8")
    framed.write_text(
        f'<title>none</title><iframe id="phone" src="{page.name}" width="390" height="900" '
        'style="border: 0"></iframe><script>addEventListener("load", () => { document.title = '
        'document.getElementById("phone").contentDocument.title; });</script>',
        encoding="utf-8",
    )
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", framed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<title>width (\d+)</title>", done.stdout)
    assert found is not None, done.stdout[:500] + done.stderr[-500:]
    return int(found[1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("kind", ["artifacts", "evaluation", "two evaluations"])
def test_a_report_does_not_scroll_sideways_on_a_phone(kind: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = [
        replace(item, name=LONG, evaluation=replace(item.evaluation, bundle=f"/{LONG}"))
        for item in ARTIFACTS
    ]
    if kind == "artifacts":
        write_artifact_page(page, found)
    else:
        write_report(page, [item.evaluation for item in found[: 1 + (kind == "two evaluations")]])
    assert scroll_width(page) <= 390
