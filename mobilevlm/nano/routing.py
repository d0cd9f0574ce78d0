"""Which experts a sparse model uses: share of tokens per layer, expert and modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
