"""Results as a table, as JSON, and as a plot of the frontier."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from comparison.candidates import LLAMA, OURS

from mobilevlm.console.tables import Column, Table
from mobilevlm.errors import MobileVLMError


@dataclass(frozen=True)
class Row:
    """All that was measured of one graph."""

    name: str
    group: str
    """Runtime: ours, or llama.cpp."""
    figures: dict[str, float]
    """See :class:`real.quality.Quality`."""
    kl_by_window: tuple[float, ...]
    decoder_bytes: int | None = None
    token_bytes: int | None = None
    embedding_bytes: int | None = None
    export_seconds: float | None = None
    prefill_seconds: tuple[float, ...] = ()
    decode_seconds: tuple[float, ...] = ()
    """Seconds of one token, each measurement."""


@dataclass(frozen=True)
class Result:
    """A run."""

    command: str
    model: str
    machine: dict[str, Any]
    threads: int
    texts: tuple[str, ...]
    windows: int
    rows: tuple[Row, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    """Candidates that could not be measured, and why."""


def write(result: Result, path: Path) -> None:
    """Write a result as JSON."""
    path.write_text(json.dumps(asdict(result), indent=1) + "\n", "utf-8")


def read(path: Path) -> Result:
    """Read a result.

    Raises:
        MobileVLMError: it is none.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        rows = tuple(_row(row) for row in data.pop("rows"))
        return Result(**{**data, "texts": tuple(data["texts"])}, rows=rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MobileVLMError(f"{path}: not a result of real_model.py: {error}") from None


def _row(stored: dict[str, Any]) -> Row:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    return Row(**fields)


def table(result: Result) -> Table:
    """Return the result as a table of at most 80 columns."""
    title = (
        f"{result.model}, {result.windows} windows ({', '.join(result.texts)}), "
        f"{result.threads} threads"
    )
    titles = ("ppl ×", "KL", "same", "greedy", "MB", "MB/tok", "ms/tok", "prefill")
    columns = [Column("", whole=True), *(Column(text, whole=True, right=True) for text in titles)]
    shown = Table(columns, title)
    for row in sorted(result.rows, key=lambda row: row.figures["kl"]):
        shown.add(row.name, *_cells(row))
    return shown


LEGEND = """\
ppl ×: perplexity over float32's; KL: divergence from float32, nats; same: share
of positions with float32's likeliest token; greedy: share of float32's answers
to 12 questions before the first difference; MB: decoder and head (and prefill
graph) in the file, without a separate embedding table; MB/tok: weights that a
token reads; ms/tok: decode; prefill: ms of 200 tokens. Medians."""


def _cells(row: Row) -> tuple[str, ...]:
    figures = row.figures
    greedy = figures.get("greedy_match")
    return (
        f"{figures['perplexity_ratio']:.3f}",
        f"{figures['kl']:.4f}",
        f"{figures['top1_agreement']:.3f}",
        "–" if greedy is None else f"{greedy:.2f}",
        _number(row.decoder_bytes, 1e-6, 1),
        _number(row.token_bytes, 1e-6, 1),
        _number(statistics.median(row.decode_seconds) if row.decode_seconds else None, 1e3, 1),
        _number(statistics.median(row.prefill_seconds) if row.prefill_seconds else None, 1e3, 0),
    )


def _number(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other is better than, or as good, in both coordinates; in order of
    the first."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def draw(result: Result, path: Path) -> None:
    """Draw KL against the bytes that a token reads, and against the time of a token and of a
    prompt. Needs matplotlib."""
    from comparison.plots import COLORS
    from matplotlib.figure import Figure

    panels: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("weights that a token reads, MB", lambda row: (row.token_bytes or 0) / 1e6),
        ("decode, ms per token", lambda row: _median(row.decode_seconds) * 1e3),
        ("prefill of 200 tokens, ms", lambda row: _median(row.prefill_seconds) * 1e3),
    )
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    for panel, (title, value) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for group, marker in ((OURS, "o"), (LLAMA, "s")):
            rows = [row for row in result.rows if row.group == group and value(row)]
            points = [(value(row), row.figures["kl"]) for row in rows]
            if not points:
                continue
            panel.plot(*zip(*points, strict=True), marker, color=COLORS[group], label=group)
            panel.plot(*zip(*frontier(points), strict=True), "-", color=COLORS[group], lw=0.8)
            for row, point in zip(rows, points, strict=True):
                panel.annotate(row.name, point, (4, 4), textcoords="offset points", fontsize=8)
        panel.set(xlabel=title, yscale="log")
        panel.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("KL from float32, nats")
    figure.axes[0].legend()
    figure.suptitle(f"{result.model}: quality against size and time; the line is the frontier")
    figure.savefig(path, dpi=110)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
