"""Heat maps of the experts that a sparse model uses: as a table, a picture, or a page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.console.tables import Column, Styled, Table
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.experts.usage import LayerUsage, shares
from mobilevlm.export.html_page import write_page

TEMPLATE = "experts/experts.html.jinja"
FULL = 0.5
"""Share that has the darkest colour, unless there is a larger one."""


@dataclass(frozen=True)
class UsageMap:
    """What is drawn."""

    title: str
    """The model, and what ran it."""
    subtitle: str
    """The data."""
    top_k: int
    layers: tuple[LayerUsage, ...]

    @property
    def num_experts(self) -> int:
        """The most of any layer."""
        return max(len(layer.text) for layer in self.layers)

    @property
    def full(self) -> float:
        """Share with the darkest colour."""
        found = (share for _, rows in self.parts for _, row in rows for share in row)
        return max(FULL, *found)

    @property
    def parts(self) -> list[tuple[str, list[tuple[int, tuple[float, ...]]]]]:
        """For each modality that was seen, layers and their experts' shares."""
        found = []
        for name, counts in (
            ("picture tokens", [(layer.layer, layer.visual) for layer in self.layers]),
            ("text tokens", [(layer.layer, layer.text) for layer in self.layers]),
        ):
            tokens = sum(counts[0][1]) // self.top_k
            if tokens:
                rows = [(layer, shares(row)) for layer, row in counts]
                found.append((f"{tokens:,} {name}", rows))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Counts of choices, as plain JSON types."""
        return {
            "top_k": self.top_k,
            "layers": {
                layer.layer: {"visual": layer.visual, "text": layer.text} for layer in self.layers
            },
        }


def usage_table(usage: UsageMap) -> Table:
    """Return the shares for a terminal; bold: twice an even share or more, dim: half or less."""
    experts = (Column(f"expert {index}", True, True) for index in range(usage.num_experts))
    columns = (Column("layer", True, True), Column("tokens", True), *experts)
    view = Table(columns, title=f"{usage.title}\n{usage.subtitle}")
    for name, rows in usage.parts:
        for layer, row in rows:
            cells = [Styled(f"{share:.1%}", _style(share * len(row))) for share in row]
            view.add(str(layer), name.split(" ", 1)[1].removesuffix(" tokens"), *cells)
        view.rule()
    return view


def _style(times_even: float) -> str:
    return "bold" if times_even >= 2 else "dim" if times_even <= 0.5 else ""


def check_targets(plot: Path | None, html: Path | None) -> None:
    """Refuses what could not be written, before anything is measured.

    Raises:
        MobileVLMError: no such folder, or the picture's name has no ending that is known.
        MissingExtraError: matplotlib is not installed.
    """
    for path in (plot, html):
        if path is not None and not path.parent.is_dir():
            raise MobileVLMError(f"{path}: no such folder {path.parent}: make it first")
    if plot is not None:
        if plot.suffix not in (".png", ".svg", ".pdf"):
            raise MobileVLMError(f"{plot}: a picture's name ends with .png, .svg or .pdf")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise require("matplotlib", "plots", "drawing the routing") from None


def draw_usage(usage: UsageMap, path: Path) -> None:
    """A heat map for each modality, layers by experts (needs matplotlib)."""
    from matplotlib.figure import Figure

    parts, experts = usage.parts, usage.num_experts
    rows = len(usage.layers)
    size = (1.3 + 0.75 * experts * len(parts), 1.5 + 0.34 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for panel, (name, layers) in zip(panels, parts, strict=True):
        padded = [[*row, *[float("nan")] * (experts - len(row))] for _, row in layers]
        panel.imshow(padded, cmap="Blues", vmin=0, vmax=usage.full, aspect="auto")
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_yticks(range(rows), [f"layer {layer}" for layer, _ in layers])
        panel.set_xticks(range(experts), [f"expert {index}" for index in range(experts)])
        panel.tick_params(length=0, labelsize=8)
        for edge in panel.spines.values():
            edge.set_visible(False)
        for place, (_, row) in enumerate(layers):
            for column, share in enumerate(row):
                color = "white" if _is_dark(share, usage) else "black"
                panel.text(column, place, f"{share:.0%}", ha="center", va="center", color=color,
                           fontsize=8)  # fmt: skip
    figure.suptitle(f"{usage.title}\n{usage.subtitle}", fontsize=9)
    figure.savefig(path)


def write_map_page(usage: UsageMap, path: Path) -> None:
    """One HTML file that needs no other, whole or not at all."""
    totals = _totals(usage.layers)
    write_page(TEMPLATE, path, usage=usage, is_dark=_is_dark, totals=totals)


def _is_dark(share: float, usage: UsageMap) -> bool:
    return share > 0.6 * usage.full


def _totals(layers: Sequence[LayerUsage]) -> list[tuple[int, tuple[float, ...]]]:
    return [(layer.layer, shares(layer.total)) for layer in layers]
