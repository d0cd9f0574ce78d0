"""The result as pictures (matplotlib) and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comparison.candidates import LLAMA, OURS
from comparison.figures import MEASURES
from comparison.report import as_markdown
from comparison.results import Comparison, Entry

BARS = ("encode", "prefill", "first", "second", "decode", "warm_load", "cold_load", "peak")
COLORS = {
    OURS: "#1b6ca8",
    LLAMA: "#d95f02",
    "onnxruntime-genai": "#7a5ba8",
    "transformers": "#b8960c",
    "openvino": "#3a8f5f",
    "mnn": "#8a8a8a",
}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px;margin:1em 0}td,th{border:1px solid #ccc;
padding:.25em .6em;text-align:right}td:first-child{text-align:left}img{max-width:100%}"""


def write_plots(result: Comparison, folder: Path) -> list[Path]:
    """``stages.png``, ``prompt_length.png``, ``context_length.png`` and ``index.html``."""
    pictures = [
        _save(folder / "stages.png", lambda figure: _bars(figure, result), (13, 9)),
        _save(
            folder / "prompt_length.png",
            lambda figure: _curves(
                figure, result, "prefill", "prompt, tokens", "time to first token, s"
            ),
            (8, 5),
        ),
        _save(
            folder / "context_length.png",
            lambda figure: _curves(figure, result, "decode", "context, tokens", "tokens/s"),
            (8, 5),
        ),
    ]
    page = folder / "index.html"
    page.write_text(as_html(result, pictures), encoding="utf-8")
    return [*pictures, page]


def as_html(result: Comparison, pictures: Sequence[Path]) -> str:
    """Pictures and tables in one page."""
    images = [
        f'<p><img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode("ascii")}"></p>'
        for path in pictures
    ]
    title = html.escape(f"{result.model}: side by side")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>{''.join(images)}"
        f"{markdown_to_html(as_markdown(result))}</html>\n"
    )


def markdown_to_html(text: str) -> str:
    """The Markdown that report.py writes: headings, tables, lists and paragraphs."""
    parts, table = [], False
    for line in text.splitlines():
        if table != line.startswith("|"):
            table = not table
            parts.append("<table>" if table else "</table>")
        safe = html.escape(line)
        if table:
            cells = [cell.strip() for cell in safe.strip("|").split(" | ")]
            if not all(cell == "---" for cell in cells):
                parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            parts.append(f"<h{level}>{safe[level:].strip()}</h{level}>")
        elif line:
            parts.append(f"<p>{safe}</p>")
    return "\n".join([*parts, "</table>" if table else ""])


def _save(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=110)
    return path


def _bars(figure: Any, result: Comparison) -> None:
    """One panel per measure; a thin line from least to most."""
    measures = [measure for key in BARS for measure in MEASURES if measure.key == key]
    panels = figure.subplots(2, 4)
    for panel, measure in zip(panels.flat, measures, strict=True):
        shown = [(e, f) for e in result.entries if (f := e.figure(measure.key))]
        for place, (entry, found) in enumerate(shown):
            panel.barh(place, found.median * measure.scale, color=_color(entry))
            panel.plot(
                [found.low * measure.scale, found.high * measure.scale], [place, place], "k", lw=1
            )
        panel.set_yticks(range(len(shown)), [entry.name for entry, _ in shown], fontsize=7)
        panel.invert_yaxis()
        note = " (more is better)" if measure.better == "more" else ""
        panel.set_title(f"{measure.title}\n{measure.unit}{note}", fontsize=9)
    figure.suptitle(f"{result.model}, {result.threads} threads, median of {result.rounds} rounds")


def _curves(figure: Any, result: Comparison, curve: str, x: str, y: str) -> None:
    panel = figure.subplots()
    styles = ("-", "--", ":", "-.")
    used: dict[str, int] = {}
    for entry in result.entries:
        points = sorted((int(n), statistics.median(v)) for n, v in getattr(entry, curve).items())
        if points:
            used[entry.group] = used.get(entry.group, -1) + 1
            style = styles[used[entry.group] % len(styles)]
            panel.plot(
                *zip(*points, strict=True), style, marker="o", color=_color(entry), label=entry.name
            )
    panel.set(xlabel=x, ylabel=y, title=result.model)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def _color(entry: Entry) -> str:
    return COLORS[entry.group]
