"""The result as plots (matplotlib) and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comparison.candidates import LLAMA, OURS
from comparison.figures import MEASURES, Measure
from comparison.report import as_markdown
from comparison.results import Comparison

BARS = (
    "encode", "prefill", "first", "second", "decode", "warm_load", "cold_load", "peak",
    "peak_over_size",
)  # fmt: skip
COLUMNS = 3
"""Panels side by side."""
COLORS = {
    OURS: "#1b6ca8",
    LLAMA: "#d95f02",
    "onnxruntime-genai": "#7a5ba8",
    "transformers": "#b8960c",
    "openvino": "#3a8f5f",
    "mnn": "#8a8a8a",
}
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:90em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px;margin:1em 0;display:block;overflow-x:auto}
td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right}th{background:#f4f4f4}
td:first-child,th:first-child{text-align:left;white-space:nowrap}img{max-width:100%}
code{font-size:13px;background:#f4f4f4;overflow-wrap:anywhere}"""


def write_plots(result: Comparison, folder: Path) -> list[Path]:
    """``stages.png``, ``prompt_length.png``, ``context_length.png`` and ``index.html``."""
    rows = -(-len(BARS) // COLUMNS)
    height = rows * (0.9 + 0.21 * len(result.entries)) + 0.6
    plots = [
        _save(folder / "stages.png", lambda figure: _bars(figure, result, rows), (14, height)),
        _save(
            folder / "prompt_length.png",
            lambda figure: _curves(
                figure, result, "prefill", "prompt, tokens", "time to first token, s", "less"
            ),
            (10, 5.5),
        ),
        _save(
            folder / "context_length.png",
            lambda figure: _curves(
                figure, result, "decode", "context, tokens", "decode, tokens/s", "more"
            ),
            (10, 5.5),
        ),
    ]
    page = folder / "index.html"
    page.write_text(as_html(result, plots), encoding="utf-8")
    return [*plots, page]


def as_html(result: Comparison, plots: Sequence[Path]) -> str:
    """Plots and tables in one page."""
    images = [
        f'<p><img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode("ascii")}"></p>'
        for path in plots
    ]
    title = html.escape(f"{result.model}: side by side")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1>{''.join(images)}"
        f"{markdown_to_html(as_markdown(result))}</html>\n"
    )


def markdown_to_html(text: str) -> str:
    """The Markdown that report.py writes: headings, tables, lists, paragraphs, bold, code."""
    parts, block = [], ""
    for line in text.splitlines():
        kind = {"|": "table", "-": "ul"}.get(line[:1], "")
        head = "th" if kind == "table" and kind != block else "td"
        if kind != block:
            parts += [f"</{block}>"] * bool(block) + [f"<{kind}>"] * bool(kind)
            block = kind
        safe = html.escape(line, quote=False)
        safe = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", re.sub("`(.+?)`", r"<code>\1</code>", safe))
        if kind == "table":
            cells = [cell.strip() for cell in safe.strip("|").split(" | ")]
            if not all(cell == "---" for cell in cells):
                row = "".join(f"<{head}>{cell}</{head}>" for cell in cells)
                parts.append(f"<tr>{row}</tr>")
        elif kind == "ul":
            parts.append(f"<li>{safe[1:].strip()}</li>")
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            parts.append(f"<h{level}>{safe[level:].strip()}</h{level}>")
        elif line:
            parts.append(f"<p>{safe}</p>")
    return "\n".join([*parts, f"</{block}>" if block else ""])


def _save(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=110)
    return path


def _bars(figure: Any, result: Comparison, rows: int) -> None:
    """One panel per measure, the same candidates in the same order in each; a thin line from least
    to most. The best median is bold, as in the table."""
    measures = [measure for key in BARS for measure in MEASURES if measure.key == key]
    panels = figure.subplots(rows, COLUMNS, sharey=True)
    for panel, measure in zip(panels.flat, measures, strict=True):
        _panel(panel, result, measure)
    names = [entry.name for entry in result.entries]
    panels.flat[0].set_yticks(range(len(names)), names)
    panels.flat[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(
        f"{result.model}, {result.threads} threads, median of {result.rounds} rounds, "
        f"line: least to most, bold: the best{'' if result.finished else ' (interrupted)'}"
    )


def _panel(panel: Any, result: Comparison, measure: Measure) -> None:
    best = result.best(measure)
    most = 0.0
    for place, entry in enumerate(result.entries):
        found = entry.figure(measure.key)
        if found is None:
            panel.text(0, place, " –", va="center", fontsize=8, color="gray")
            continue
        median, low, high = (
            value * measure.scale for value in (found.median, found.low, found.high)
        )
        most = max(most, high)
        panel.barh(place, median, color=COLORS[entry.group])
        panel.plot([low, high], [place, place], "k", lw=1)
        weight = "bold" if entry is best else "normal"
        text = f" {median:.{measure.digits}f}"
        panel.text(max(median, high), place, text, va="center", fontsize=8, weight=weight)
    panel.set_xlim(0, most * 1.2 or 1)  # room for the figure at the end of the longest bar
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    better = "more is better" if measure.better == "more" else "less is better"
    panel.set_title(f"{measure.title}, {measure.unit} ({better})", fontsize=9)


def _curves(figure: Any, result: Comparison, curve: str, x: str, y: str, better: str) -> None:
    """A line per candidate over doubling lengths, both axes logarithmic: equal ratios are equal
    distances. The legend lists the best at the longest length first."""
    from matplotlib.ticker import LogLocator

    panel = figure.subplots()
    lines: list[tuple[float, Any]] = []
    lengths: set[int] = set()
    used: dict[str, int] = {}
    for entry in result.entries:
        points = sorted((int(n), statistics.median(v)) for n, v in getattr(entry, curve).items())
        if not points:
            continue
        lengths |= {length for length, _ in points}
        number = used[entry.group] = used.get(entry.group, -1) + 1
        (line,) = panel.plot(
            *zip(*points, strict=True),
            LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            color=COLORS[entry.group],
        )
        last = points[-1][1]
        line.set_label(f"{entry.name}: {last:{'.0f' if last >= 100 else '.3g'}}")
        lines.append((last, line))
    panel.set(xlabel=x, ylabel=y, title=f"{result.model}, {result.threads} threads")
    if not lines:
        panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes)
        return
    lines.sort(key=lambda item: item[0], reverse=better == "more")
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted(lengths), [str(length) for length in sorted(lengths)])
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")
    panel.grid(alpha=0.3)
    panel.legend(
        handles=[line for _, line in lines],
        title=f"{y.split(', ')[-1]} at {max(lengths)} tokens",
        fontsize=8,
        title_fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        handlelength=4,
    )
