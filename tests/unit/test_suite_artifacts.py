"""Artifacts side by side: the table and the page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from measured_artifacts import ARTIFACTS, artifact

from mobilevlm.runtime.bench.bench import summary
from mobilevlm.runtime.suites.artifact_page import write_artifact_page
from mobilevlm.runtime.suites.artifacts import as_markdown

pytestmark = pytest.mark.pure


def test_energy_of_an_answer_is_its_time_by_the_mean_power() -> None:
    first = ARTIFACTS[0]
    assert first.joules == pytest.approx(6.0 * (0.9 + 63 * 0.1))
    assert artifact("x", 1, 1, 1, None).joules is None
    assert first.bench.telemetry is not None
    battery = replace(first.bench.telemetry, battery_watts=3.0)
    on_battery = replace(first, bench=replace(first.bench, telemetry=battery))
    assert on_battery.joules == pytest.approx(3.0 * 7.2), "the whole device's, where it shows it"


def test_a_summary_counts_one_thread_in_the_singular() -> None:
    bench = ARTIFACTS[0].bench
    assert "3 runs, 4 threads; load" in summary(bench)
    assert "3 runs, 1 thread; load" in summary(replace(bench, threads=1))


def test_the_table_has_a_line_for_each_artifact() -> None:
    lines = as_markdown(ARTIFACTS).splitlines()
    assert lines[0].startswith(
        "| artifact | accuracy | 95% interval | size, MB | first token, ms |"
    )
    assert lines[2] == "| float32 | 86.0% | 80.5–90.1% | 500 | 900 | 10.0 | 300 | 43.20 |"
    assert len({line.count("|") for line in lines[:5]}) == 1
    unknown = as_markdown([artifact("a|b", 100, 900, 10.0, None)])
    assert "| – |" in unknown and "energy is unknown" in unknown and "a\\|b" in unknown


def test_the_page_has_plots_of_each_measure_and_loads_nothing(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_artifact_page(page, ARTIFACTS)
    html = page.read_text()
    for fact in ("date", "machine", "bundle", "checkpoint", "recipe", "engine"):
        assert f"<dt>{fact}</dt>" in html
    assert "Raspberry Pi 5" in html
    for title in ("accuracy and speed", "first token, ms", "peak memory, MB", "energy, J/answer"):
        assert title in html
    assert html.count("<svg") == 3 * (6 + 2), "of six measures and two kinds"
    assert not re.search(r"<script|https?:|@import|url\(", html)
    bars = r'<rect width="([\d.]+)" height="14" fill="#[2d8]'
    widths = [float(width) for width in re.findall(bars, html)]
    assert len(widths) == 24 and max(widths) == 100 and min(widths) > 0
    places = [float(place) for place in re.findall(r'<i style="left: ([\d.]+)%', html)]
    assert len(places) == 3 and places[0] == pytest.approx(100 * 10 / (1.1 * 34), abs=0.01)
    write_artifact_page(page, [artifact("<b>alone</b>", 0, 900, 10.0, None)])
    html = page.read_text()
    assert "and speed" not in html and "energy, J/answer</h3>" not in html
    assert "&lt;b&gt;alone" in html and "<b>alone" not in html
