"""Buffers that a decoder keeps of a sequence: their names and shapes, for graphs and whatever runs
or measures them.

Going back follows from the kind. Rows of ``kv`` buffers are overwritten in place, so any slot can
be gone back to. A ``sliding`` buffer has the rows of the window and some more, and a
``convolution`` buffer the last inputs only. ``recurrent`` buffers hold all of the past in one
state, which each run replaces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mobilevlm.decoder_spec import DecoderSpec

LAYER_ROWS = "per_layer_inputs"
"""A graph's input for rows of the table of layers' own inputs, as the hub's ONNX community names it
"""
KEPT_ROWS = 96
"""Last slots that a sequence can go back to where its layers forget what they do not need: more
than a draft has."""
MOVED_ROWS = 256
"""Slots by which the rows of a sliding layer move to the front of its buffer."""
LONGEST_RUN = 512
"""Rows of a run that sliding layers have room for."""
KEPT_STATES = 6
"""Ends of a prompt's pieces that a sequence with recurrent states can go back to."""
Kind: TypeAlias = Literal["kv", "sliding", "convolution", "recurrent"]


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
        if self.kind == "recurrent":
            return f"past_recurrent.{self.name}"
        return f"past_key_values.{self.name}"

    @property
    def present(self) -> str:
        """Name of a graph's output."""
        if self.kind == "convolution":
            return f"present_conv.{self.layer}"
        return f"present{'_recurrent' * (self.kind == 'recurrent')}.{self.name}"

    def sized(self, slots: int) -> tuple[int, ...]:
        """Return the shape with so many slots."""
        return tuple(slots if size is None else size for size in self.shape)


def state_buffers(spec: DecoderSpec, exact: bool = False) -> list[StateBuffer]:
    """Return the buffers of a decoder in the order of its layers, keys before values; layers that
    read those of others have none. ``exact``: each head has ``head_dim`` channels, else
    ``cache_head_dim``."""
    found = []
    for layer in range(spec.num_hidden_layers):
        if layer in spec.conv_layers:
            rows = (1, spec.conv_kernel - 1, spec.hidden_size)
            found.append(StateBuffer(layer, "conv", "convolution", rows))
            continue
        if spec.mixer(layer) == "delta" and (delta := spec.delta) is not None:
            inputs = (1, delta.kernel - 1, delta.mixed_size)
            states = (1, delta.value_heads, delta.key_dim, delta.value_dim)
            found.append(StateBuffer(layer, "conv", "recurrent", inputs))
            found.append(StateBuffer(layer, "state", "recurrent", states))
            continue
        if spec.kv_layer(layer) != layer:
            continue
        own = spec.at(layer)
        width = own.head_dim if exact else own.cache_head_dim
        shape = (1, spec.num_key_value_heads, None, width)
        kind: Kind = "sliding" if spec.window(layer) else "kv"
        found += [StateBuffer(layer, part, kind, shape) for part in ("key", "value")]
    return found


def slot_buffers(
    spec: DecoderSpec, exact: bool = False, layer: int | None = None
) -> list[StateBuffer]:
    """Return the buffers of keys and values, of all slots or of a window; of one ``layer``, or of
    all."""
    found = [buffer for buffer in state_buffers(spec, exact) if None in buffer.shape]
    return [buffer for buffer in found if layer in (None, buffer.layer)]


def window_rows(spec: DecoderSpec) -> int:
    """Return how many slots the buffer of a sliding layer has: no more than the context has."""
    return min(spec.context_length, spec.sliding_window - 1 + KEPT_ROWS + MOVED_ROWS + LONGEST_RUN)


def first_slot(rows: int, slots: int) -> int:
    """Return the first slot that a sliding layer's buffer of so many rows has of a sequence."""
    return max(0, -(-(slots - rows) // MOVED_ROWS)) * MOVED_ROWS


def fixed_shape(spec: DecoderSpec) -> tuple[int, ...]:
    """Return the shape of a saved state whose size does not depend on the context: that of the
    convolutions, or all recurrent ones one behind the other."""
    fixed = fixed_buffers(spec)
    if not fixed or fixed[0].kind == "recurrent":
        return (sum(math.prod(buffer.sized(0)) for buffer in fixed),)
    return (len(fixed), *fixed[0].sized(0))


def fixed_buffers(spec: DecoderSpec) -> list[StateBuffer]:
    """Return the buffers whose size does not depend on the context."""
    return [buffer for buffer in state_buffers(spec) if None not in buffer.shape]
