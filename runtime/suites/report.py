"""The report of an evaluation: one HTML file with its tables and the images of wrong answers.

Of two bundles it shows the questions whose scores differ.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mobilevlm.errors import ImageError
from mobilevlm.image import open_image
from mobilevlm.page import page_facts, write_page
from mobilevlm.runtime.machine import describe_machine, machine_line
from mobilevlm.runtime.suites.evaluate import Evaluation, compare
from mobilevlm.runtime.suites.question import OpenImage, Question
from mobilevlm.runtime.suites.tables import difference_line

LONGEST_EDGE = 224
"""Pixels of an image in the report."""
SHOWN = 60
"""Questions that are shown at most, spread over the data."""
TEMPLATE = """\
{% extends "page" %}
{% from "facts" import key_facts %}
{% block title %}{{ first.suite.name }}: {{ first.bundle }}{% endblock %}
{% block style %}
  .samples { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 12px; }
  .sample { display: flex; gap: 14px; border: 1px solid #e4e7ec; border-radius: 8px;
            padding: 12px; font-size: 14px; }
  .sample img { width: 130px; align-self: flex-start; border-radius: 4px; display: block;
                margin-bottom: 6px; }
  dl { margin: 0; min-width: 0; } dt { font-size: 12px; }
  dd { margin: 0 0 6px; white-space: pre-line; overflow-wrap: anywhere; }
  @media (max-width: 700px) { .samples { grid-template-columns: 1fr; } }
{% endblock %}
{% block body %}
<h1>{{ first.suite.name }}</h1>
{{ key_facts(facts) }}
<nav><a href="#scores">Scores</a>{% if figures %}<a href="#figures">Figures</a>{% endif %}
<a href="#answers">{{ 'Answers that differ' if difference else 'Wrong answers' }}</a></nav>
{% if difference %}<p>{{ difference }}</p>{% endif %}
<h2 id="scores">Scores</h2>
<p class="soft">{{ first.suite.measure }}</p>
<table{% if bundles | length > 1 %} class="cards"{% endif %}>
  <tr><th>kind</th><th>asked</th>
  {% for which in numbers %}<th>{{ which }}score</th><th>{{ which }}95% interval</th>{% endfor %}
  </tr>
  {% for kind, scores in rows %}
  <tr{% if loop.last %} class="total"{% endif %}><td>{{ kind }}</td>
    <td data-title="asked">{{ scores[0].asked }}</td>
  {% for score in scores %}
    {% set which = numbers[loop.index0] %}
    <td data-title="{{ which }}score">{{ '%.1f%%' % (100 * score.accuracy) }}</td>
    <td data-title="{{ which }}95% interval">
      {{- '%.1f–%.1f%%' % (100 * score.low, 100 * score.high) }}</td>
  {% endfor %}</tr>
  {% endfor %}
</table>
{% if figures %}
<h2 id="figures">Figures</h2>
<table>
  {% for name, values in figures %}
  <tr><td>{{ name }}</td>{% for value in values %}<td>{{ '%.4g' % value }}</td>{% endfor %}</tr>
  {% endfor %}
</table>
{% endif %}
<h2 id="answers">{{ 'Answers that differ in score' if difference else 'Wrong answers' }}</h2>
<p class="soft">{{ failures | length }} of {{ total }} questions.</p>
<div class="samples">
{% for item in failures %}
<div class="sample">
  {% if item.images %}
  <div>{% for image in item.images %}<img src="{{ image }}" alt="">{% endfor %}</div>
  {% endif %}
  <dl>
    <dt>{{ item.question.id }}{{ ', ' + item.question.kind if item.question.kind }}</dt>
    <dd>{{ item.question.prompt }}</dd>
    <dt>right</dt><dd>{{ item.question.answers | unique | join(', ') }}</dd>
    {% for answer in item.answers %}
    <dt>{{ 'answer' if item.answers | length == 1 else ('first', 'second')[loop.index0] }}</dt>
    <dd>{{ answer }}</dd>
    {% endfor %}
  </dl>
</div>
{% endfor %}
</div>
{% endblock %}
"""


@dataclass(frozen=True)
class Failure:
    """A question as the report shows it."""

    question: Question
    answers: tuple[str, ...]
    """With their scores, or why it could not be asked"""
    images: tuple[str, ...]
    """As data URIs"""


def write_report(path: Path, bundles: Sequence[Evaluation]) -> None:
    """Write the HTML file of one bundle's evaluation, or of two on the same questions."""
    first = bundles[0]
    kinds = [(kind, [found.kinds[kind] for found in bundles]) for kind in first.kinds]
    rows = [*kinds, ("all", [found.overall for found in bundles])]
    figures = [dict(found.suite.figures(found.judged)) for found in bundles]
    failures, total = _failures(bundles)
    write_page(
        path,
        TEMPLATE,
        bundles=bundles,
        facts=[
            *page_facts(
                path,
                machine_line(describe_machine()),
                [(found.bundle, found.checkpoint, found.recipe, found.engine) for found in bundles],
            )
        ],
        numbers=["first: ", "second: "] if len(bundles) == 2 else [""],
        first=first,
        difference=difference_line(compare(*bundles)) if len(bundles) == 2 else "",
        rows=rows,
        figures=[(name, [found[name] for found in figures]) for name in figures[0]],
        failures=failures,
        total=total,
    )


def _failures(bundles: Sequence[Evaluation]) -> tuple[list[Failure], int]:
    """Return the questions to show, spread over the data, and how many there are."""
    found = []
    for items in zip(*(evaluation.judged for evaluation in bundles), strict=True):
        scores = [item.score for item in items]
        wrong = len(set(scores)) > 1 if len(scores) > 1 else scores[0] < 1
        if wrong:
            answers = tuple(item.error or f"{item.answer} ({item.score:.2g})" for item in items)
            found.append((items[0].question, answers))
    count = min(SHOWN, len(found))
    shown = [found[index * len(found) // count] for index in range(count)]
    return [
        Failure(question, answers, tuple(_data_uri(read) for read in question.images))
        for question, answers in shown
    ], len(found)


def _data_uri(read: OpenImage) -> str:
    """Return an image for the page; an empty one where it cannot be read, as its answer says."""
    try:
        image = open_image(read())
    except ImageError:
        return "data:,"
    image.thumbnail((LONGEST_EDGE, LONGEST_EDGE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
