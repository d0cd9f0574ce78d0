"""Buffers that a decoder keeps of a sequence: their names and shapes, for graphs and whatever runs
or measures them.

Going back follows from the kind. Rows of ``kv`` and ``sliding`` buffers are overwritten in place,
so any slot can be gone back to; a sliding layer's buffer is as long as the context, its window is a
matter of attention. A ``convolution`` buffer has the last inputs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from mobilevlm.decoder_spec import DecoderSpec

Kind: TypeAlias = Literal["kv", "sliding", "convolution"]


@dataclass(frozen=True)
class StateBuffer:
    """One tensor of a decoder's state."""

    layer: int
    part: str
    kind: Kind
    shape: tuple[int | None, ...]
    """Sizes; None is the number of slots"""

    @property
    def name(self) -> str:
        """Name within a state: ``3.key``."""
        return f"{self.layer}.{self.part}"

    @property
    def past(self) -> str:
        """Name of a graph's input."""
        if self.kind == "convolution":
            return f"past_conv.{self.layer}"
        return f"past_key_values.{self.name}"

    @property
    def present(self) -> str:
        """Name of a graph's output."""
        return (
            f"present_conv.{self.layer}" if self.kind == "convolution" else f"present.{self.name}"
        )

    def sized(self, slots: int) -> tuple[int, ...]:
        """Return the shape with so many slots."""
        return tuple(slots if size is None else size for size in self.shape)


def state_buffers(spec: DecoderSpec, channels: int | None = None) -> list[StateBuffer]:
    """Return the buffers of a decoder in the order of its layers, keys before values. ``channels``:
    of each head, ``cache_head_dim`` when not given."""
    shape = (1, spec.num_key_value_heads, None, channels or spec.cache_head_dim)
    found = []
    for layer in range(spec.num_hidden_layers):
        if layer in spec.conv_layers:
            rows = (1, spec.conv_kernel - 1, spec.hidden_size)
            found.append(StateBuffer(layer, "conv", "convolution", rows))
            continue
        kind: Kind = "sliding" if spec.window(layer) else "kv"
        found += [StateBuffer(layer, part, kind, shape) for part in ("key", "value")]
    return found


def slot_buffers(spec: DecoderSpec, channels: int | None = None) -> list[StateBuffer]:
    """Return the buffers with a row for each slot."""
    return [buffer for buffer in state_buffers(spec, channels) if None in buffer.shape]


def fixed_buffers(spec: DecoderSpec) -> list[StateBuffer]:
    """Return the buffers whose size does not depend on the context."""
    return [buffer for buffer in state_buffers(spec) if None not in buffer.shape]
