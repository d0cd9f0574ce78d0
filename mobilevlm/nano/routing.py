"""Which experts a sparse model uses: share of tokens per layer, expert and modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mobilevlm.errors import require
from mobilevlm.nano.model import NanoModel
from mobilevlm.nano.packing import Batch, attention_mask, normalized


@dataclass(frozen=True)
class LayerRouting:
    """Shares of the top-k choices in one sparse layer; each tuple sums to 1."""

    layer: int
    visual: tuple[float, ...]
    """Per expert, over visual tokens."""
    text: tuple[float, ...]
    """Per expert, over text tokens."""


@torch.no_grad()
def routing(model: NanoModel, batch: Batch) -> tuple[LayerRouting, ...]:
    """Routing of one batch, padding aside."""
    visual = model.encode_images(normalized(batch.pixels))
    model.hidden_states(
        batch.ids, batch.slots, batch.positions, attention_mask(batch.blocks), visual
    )
    used = (batch.blocks >= 0).flatten()
    is_visual = (batch.slots >= 0).flatten()
    found = []
    for layer, sparse in zip(model.config.moe_layers, model.sparse_layers(), strict=True):
        shares = []
        for kind in (is_visual & used, ~is_visual & used):
            counts = torch.bincount(
                sparse.chosen[kind].flatten(), minlength=model.config.num_experts
            ).float()
            shares.append(tuple((counts / counts.sum().clamp(min=1)).tolist()))
        found.append(LayerRouting(layer, shares[0], shares[1]))
    return tuple(found)


def mean_routing(routings: Sequence[tuple[LayerRouting, ...]]) -> tuple[LayerRouting, ...]:
    """The mean over batches of the same size."""

    def mean(shares: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))

    return tuple(
        LayerRouting(same[0].layer, mean([x.visual for x in same]), mean([x.text for x in same]))
        for same in zip(*routings, strict=True)
    )


def draw_routing(layers: Sequence[LayerRouting], path: Path, title: str) -> None:
    """A heat map per modality, expert by layer, as a picture file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise require("matplotlib", "plots", "drawing the routing") from None
    experts = len(layers[0].visual)
    figure = Figure(figsize=(2.2 + 1.1 * experts, 1.4 + 0.55 * len(layers) * 2), dpi=150)
    panels = figure.subplots(2, 1, sharex=True)
    for panel, (name, rows) in zip(
        panels,
        (
            ("visual tokens", [layer.visual for layer in layers]),
            ("text tokens", [layer.text for layer in layers]),
        ),
        strict=True,
    ):
        panel.imshow(rows, cmap="Blues", vmin=0, vmax=max(0.5, max(map(max, rows))), aspect="auto")
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_yticks(range(len(layers)), [f"layer {layer.layer}" for layer in layers])
        panel.set_xticks(range(experts), [f"expert {index}" for index in range(experts)])
        panel.tick_params(length=0, labelsize=8)
        for row, shares in enumerate(rows):
            for column, share in enumerate(shares):
                color = "white" if share > 0.35 else "black"
                panel.text(
                    column, row, f"{share:.0%}", ha="center", va="center", color=color, fontsize=8
                )
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
