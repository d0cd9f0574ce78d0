"""Pages of measurements: what each table says of itself, links, figures, sizes of images."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from results_figures import LARGEST, quality_points, speed_ratios

pytestmark = pytest.mark.pure

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGES = sorted((BENCHMARKS / "results").rglob("*.md"))
INDEX = BENCHMARKS / "RESULTS.md"
RUN = re.compile(r"^\*.+; 20\d\d-\d\d-\d\d[^;]*; .*(`.+`|not kept).*\*$", re.MULTILINE)
"""Machine; date; command, or that the script was not kept."""


def name(path: Path) -> str:
    return path.relative_to(BENCHMARKS).as_posix()


def slugs(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_section_says_machine_date_and_command_before_its_first_table(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    above = ""
    for section in re.split(r"^(?=#{1,2} )", text, flags=re.MULTILINE):
        for part in re.split(r"^(?=### )", section, flags=re.MULTILINE):
            run = RUN.search(part)
            table = re.search(r"^\|", part, re.MULTILINE)
            above = above if part.startswith("### ") or page.parent.name == "archive" else ""
            if table:
                title = part.partition("\n")[0]
                assert above or (run and run.start() < table.start()), f"{name(page)}: {title}"
            above = run[0] if run else above


@pytest.mark.parametrize("page", [INDEX, BENCHMARKS / "README.md", *PAGES], ids=name)
def test_links_and_images_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target), link


def test_figures_of_the_summary_are_those_of_the_pages() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    known = set(re.findall(r"\d[\d,]*(?:\.\d+)?", pages))
    known |= {figure.replace(",", "") for figure in known}
    rows = re.findall(r"^\|(.+)\|$", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    for row in rows:
        for figure in re.findall(r"(?<![\w.])\d[\d,]*\.?\d+(?![\w.])", row):
            assert figure in known or figure.replace(",", "") in known, (figure, row)


def test_images_are_small() -> None:
    images = sorted((BENCHMARKS / "results").rglob("*.png"))
    assert {"quality.png", "speed.png"} <= {image.name for image in images}
    for image in images:
        assert image.stat().st_size <= LARGEST, name(image)


def test_images_are_drawn_from_the_tables() -> None:
    assert ("int4, fast", 102.6, 0.096) in quality_points()
    ratios = speed_ratios()
    assert len(ratios) == 2
    assert ("image", 0.64) in ratios["MobileVLM V2 1.7B, 2026-12-01, AVX2"]
    for stages in ratios.values():
        assert all(0.1 < ratio < 10 for _, ratio in stages)
