"""Where factors for a layer's inputs can go without another operator in the graph: into the norm or
the linear layer before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilevlm.checkpoint import Rescaling, Weights
from mobilevlm.export.linear_groups import linear_groups
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.spec import ModelSpec

_PRODUCERS = {
    "vision": {"attn.q_proj": "norm1", "attn.out_proj": "attn.v_proj", "mlp.fc1": "norm2"},
    "decoder": {
        "attn.q_proj": "input_norm",
        "attn.o_proj": "attn.v_proj",
        "mlp.gate_proj": "post_attention_norm",
        "mlp.down_proj": "mlp.up_proj",
    },
}
"""What makes the inputs of a layer, both by their names inside a transformer layer."""


@dataclass(frozen=True)
class Fold:
    """Linear layers that share an input, and what makes that input channel by channel."""

    consumers: tuple[str, ...]
    """Without ``.weight``, with their output sizes in ``out_sizes``."""
    producer: str
    """A norm or a linear layer, without ``.weight``."""
    in_size: int
    out_sizes: tuple[int, ...]
    heads: tuple[int, int] = (1, 1)
    """Where keys and values are shared: how many heads of them, and how many query heads read each.
    All of these must get the same factors."""

    def tie(self, values: Float32, choose: Callable[..., Any]) -> Float32:
        """Values ``(in_size,)``, made equal where they must be; ``choose``: np.max or np.mean."""
        kv_heads, readers = self.heads
        if readers == 1:
            return values
        grouped = values.reshape(kv_heads, readers, -1)
        chosen = choose(grouped, axis=1, keepdims=True)
        return np.broadcast_to(chosen, grouped.shape).reshape(-1).astype(np.float32)

    def at_producer(self, factors: Float32) -> Float32:
        """Tied factors ``(in_size,)``, one for each channel that the producer has."""
        kv_heads, readers = self.heads
        return factors.reshape(kv_heads, readers, -1)[:, 0].reshape(-1)


def find_folds(spec: ModelSpec) -> Iterator[Fold]:
    """All folds of a model, in the order of use. Not here: what reads an activation function or the
    tower's features, which nothing linear makes."""
    heads, kv_heads = spec.decoder.num_attention_heads, spec.decoder.num_key_value_heads
    for group in linear_groups(spec):
        stage, _, place = group.name.partition(".layers.")
        index, _, reader = place.partition(".")
        if group.name == "decoder.lm_head":
            yield Fold(group.names, "decoder.norm", group.in_size, group.out_sizes)
        elif reader in _PRODUCERS.get(stage, {}):
            producer = f"{stage}.layers.{index}.{_PRODUCERS[stage][reader]}"
            shared = (kv_heads, heads // kv_heads) if reader == "attn.o_proj" else (1, 1)
            yield Fold(group.names, producer, group.in_size, group.out_sizes, shared)


def fold(weights: Weights, folds: Mapping[Fold, Float32]) -> Weights:
    """Weights with inputs multiplied by factors ``(in_size,)``, and what makes them divided: the
    same function in floats."""
    rows: dict[str, Float32] = {}
    columns: dict[str, Float32] = {}
    for place, factors in folds.items():
        for name in place.consumers:
            columns[f"{name}.weight"] = factors
        for name in (f"{place.producer}.weight", f"{place.producer}.bias"):
            if name in weights:
                rows[name] = np.float32(1) / place.at_producer(factors)
    return weights.rescaled(
        {name: Rescaling(rows.get(name), columns.get(name)) for name in {**rows, **columns}}
    )
