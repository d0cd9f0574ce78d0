"""Which experts a sparse model uses: share of tokens per layer, expert and modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mobilevlm.errors import require
from mobilevlm.nano.model import NanoModel
from mobilevlm.nano.packed_attention import packed_mask
from mobilevlm.nano.packing import Batch, normalized


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
    experts = model.config.num_experts
    # For each layer: choices per modality and expert.
    counts = torch.zeros(len(model.config.moe_layers), 2, experts)
    for group in batch.groups:
        mask = packed_mask(group.blocks, group.prefix)
        model.hidden_states(group.ids, group.slots, group.positions, mask, visual)
        used = (group.blocks >= 0).flatten()
        is_visual = (group.slots >= 0).flatten()
        for layer, sparse in enumerate(model.decoder.sparse_layers.values()):
            for kind, places in enumerate((is_visual & used, ~is_visual & used)):
                chosen = sparse.chosen[places].flatten()
                counts[layer, kind] += torch.bincount(chosen, minlength=experts).cpu()
    shares = (counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)).tolist()
    return tuple(
        LayerRouting(layer, tuple(seen), tuple(read))
        for layer, (seen, read) in zip(model.config.moe_layers, shares, strict=True)
    )


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
