"""The page of artifacts side by side: the table, and a plot of each measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilevlm.page import page_facts, write_page
from mobilevlm.runtime.machine import machine_line
from mobilevlm.runtime.suites.artifacts import MEASURES, Artifact, cells, described, titles

COLORS = ("#2f6fd6", "#d97a1a", "#2f8f5b", "#8b54c4", "#c23a63", "#5b6678")
TEMPLATE = """\
{% extends "page" %}
{% from "facts" import key_facts %}
{% block title %}
{{ suite.name }}: {{ artifacts | map(attribute="name") | join(", ") }}
{% endblock %}
{% block style %}
  .plots { display: grid; grid-template-columns: 1fr 1fr; gap: 24px 40px; margin-top: 12px; }
  .plots h3 { font-size: 15px; margin: 0 0 6px; }
  .bar { margin-bottom: 8px; font-size: 14px; }
  .bar div { display: flex; justify-content: space-between; gap: 12px; }
  .bar div span { overflow-wrap: anywhere; }
  .bar div span:last-child { font-variant-numeric: tabular-nums; white-space: nowrap; }
  .bar svg { display: block; width: 100%; height: 14px; }
  .field { position: relative; height: 260px; margin: 12px 0 28px 34px;
           border-left: 1px solid #98a2b3; border-bottom: 1px solid #98a2b3; }
  .field i { position: absolute; width: 12px; height: 12px; margin: -6px; border-radius: 50%; }
  .field span { position: absolute; font-size: 13px; white-space: nowrap; max-width: 36%;
                overflow: hidden; text-overflow: ellipsis; }
  .field .left { transform: translateX(calc(-100% - 11px)); }
  .field .right { transform: translateX(11px); }
  @media (max-width: 700px) { .plots { grid-template-columns: 1fr; } }
{% endblock %}
{% block body %}
{% macro plot(chart) %}
<div>
  <h3>{{ chart.title }}</h3>
  {% for bar in chart.bars %}
  <div class="bar">
    <div><span>{{ bar.name }}</span><span>{{ bar.text }}</span></div>
    <svg viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true">
      <rect width="100" height="14" fill="#f2f4f7"/>
      <rect width="{{ bar.width }}" height="14" fill="{{ bar.color }}"/>
      {% if bar.reach %}
      <rect x="{{ bar.reach[0] }}" y="6" width="{{ bar.reach[1] }}" height="2" fill="#1d2330"/>
      {% endif %}
      {% for place in bar.marks %}
      <rect x="{{ place }}" y="3" width=".4" height="8" fill="#1d2330" opacity=".55"/>
      {% endfor %}
    </svg>
  </div>
  {% endfor %}
</div>
{% endmacro %}
<h1>{{ suite.name }}</h1>
{{ key_facts(facts) }}
<nav><a href="#table">Table</a>
{% if points %}<a href="#speed">{{ suite.measure | capitalize }} and speed</a>{% endif %}
<a href="#measures">Each measure</a>{% if kinds %}<a href="#kinds">By kind</a>{% endif %}</nav>
<h2 id="table">{{ artifacts | length }} artifact{{ 's' if artifacts | length > 1 }}</h2>
{% for line in described %}<p class="soft">{{ line }}</p>{% endfor %}
<table class="cards">
  <tr>{% for title in titles %}<th>{{ title }}</th>{% endfor %}</tr>
  {% for row in rows %}
  <tr>{% for cell in row %}
    <td data-title="{{ titles[loop.index0] }}">{{ cell }}</td>
  {% endfor %}</tr>
  {% endfor %}
</table>
{% if points %}
<h2 id="speed">{{ suite.measure }} and speed</h2>
<p class="soft">Up is better, right is faster.</p>
<div class="field">
  <span style="left: -34px; top: -8px">{{ top }}</span>
  <span style="left: -34px; bottom: -8px">{{ bottom }}</span>
  <span style="right: 0; bottom: -24px">{{ fastest }} tokens/s</span>
  {% for point in points %}
  <i style="left: {{ point.x }}%; top: {{ point.y }}%; background: {{ point.color }}"></i>
  <span class="{{ 'left' if point.x > 60 else 'right' }}"
        style="left: {{ point.x }}%; top: calc({{ point.y }}% - {{ loop.cycle(24, -2) }}px)">
    {{- point.name }}</span>
  {% endfor %}
</div>
{% endif %}
<h2 id="measures">Each measure</h2>
<p class="soft">The line is the 95% interval; the marks are single runs.</p>
<div class="plots">{% for chart in charts %}{{ plot(chart) }}{% endfor %}</div>
{% if kinds %}
<h2 id="kinds">{{ suite.measure }} by kind</h2>
<div class="plots">{% for chart in kinds %}{{ plot(chart) }}{% endfor %}</div>
{% endif %}
{% endblock %}
"""


@dataclass(frozen=True)
class Bar:
    """A bar; places and widths are percent of the plot."""

    name: str
    text: str
    color: str
    width: float
    reach: tuple[float, float] | None = None
    """Begin and width of an interval"""
    marks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Bars of one measure."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Point:
    """An artifact in the field of score and speed, in percent from the left and from the top."""

    name: str
    color: str
    x: float
    y: float


def write_artifact_page(path: Path, artifacts: Sequence[Artifact]) -> None:
    """Write the HTML file of artifacts that answered the same questions."""
    first = artifacts[0].evaluation
    colors = [COLORS[number % len(COLORS)] for number in range(len(artifacts))]
    speeds = [found.row("decode/tokens/s").p50 for found in artifacts]
    scores = [found.evaluation.overall.accuracy for found in artifacts]
    bottom, top = max(0.0, min(scores) - 0.05), min(1.0, max(scores) + 0.05)
    fastest = 1.1 * max(speeds)
    points = [
        Point(found.name, color, round(100 * speed / fastest, 2),
              round(100 * (top - score) / (top - bottom), 2))
        for found, color, speed, score in zip(artifacts, colors, speeds, scores, strict=True)
    ]  # fmt: skip
    write_page(
        path,
        TEMPLATE,
        suite=first.suite,
        facts=[
            *page_facts(
                path,
                machine_line(artifacts[0].bench.machine),
                [
                    (
                        found.evaluation.bundle,
                        found.evaluation.checkpoint,
                        found.evaluation.recipe,
                        found.evaluation.engine,
                    )
                    for found in artifacts
                ],
            )
        ],
        artifacts=artifacts,
        described=described(artifacts),
        titles=titles(artifacts),
        rows=[cells(found) for found in artifacts],
        points=points if len(points) > 1 else [],
        top=f"{100 * top:.0f}%",
        bottom=f"{100 * bottom:.0f}%",
        fastest=f"{fastest:.0f}",
        charts=[_scores("", first.suite.measure, artifacts, colors), *_measures(artifacts, colors)],
        kinds=[_scores(kind, kind, artifacts, colors) for kind in first.kinds],
    )


def _scores(kind: str, title: str, artifacts: Sequence[Artifact], colors: Sequence[str]) -> Chart:
    bars = []
    for found, color in zip(artifacts, colors, strict=True):
        evaluation = found.evaluation
        score = evaluation.kinds[kind] if kind else evaluation.overall
        low, high = 100 * score.low, 100 * score.high
        text = f"{100 * score.accuracy:.1f}% of {score.asked}"
        bars.append(Bar(found.name, text, color, round(100 * score.accuracy, 2),
                        (round(low, 2), round(high - low, 2))))  # fmt: skip
    return Chart(title, tuple(bars))


def _measures(artifacts: Sequence[Artifact], colors: Sequence[str]) -> list[Chart]:
    """Return the charts of the measures that are known of an artifact."""
    charts = []
    for measure in MEASURES:
        known = [(found, color, value) for found, color in zip(artifacts, colors, strict=True)
                 if (value := measure.value(found)) is not None]  # fmt: skip
        most = max((max(value, *measure.samples(found), 0) for found, _, value in known), default=0)
        if most:
            bars = tuple(
                Bar(found.name, measure.cell(found), color, round(100 * value / most, 2),
                    marks=tuple(round(99.6 * sample / most, 2)
                                for sample in measure.samples(found)))
                for found, color, value in known
            )  # fmt: skip
            charts.append(Chart(measure.title, bars))
    return charts
