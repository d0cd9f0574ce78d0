"""Table of the experts that a sparse model uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mobilevlm.console.tables import Column, Styled, Table
from mobilevlm.export.experts.usage import LayerUsage, shares


@dataclass(frozen=True)
class UsageReport:
    """Usage of experts, and where it is from."""

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
    def parts(self) -> list[tuple[str, list[tuple[int, tuple[float, ...]]]]]:
        """For each modality that was seen, layers and their experts' shares."""
        found = []
        for name, counts in (
            ("visual tokens", [(layer.layer, layer.visual) for layer in self.layers]),
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


def usage_table(usage: UsageReport) -> Table:
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
