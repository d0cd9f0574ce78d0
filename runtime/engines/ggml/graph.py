"""A decoder as a ggml graph of one shape, run as often as that shape comes again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.engines.ggml.layers import GraphShape, Inputs, KeyValues, Layers, Observe
from mobilevlm.runtime.engines.ggml.native import (
    Context,
    Processor,
    TensorPointer,
    Workspace,
    ggml,
)

_NODES_PER_LAYER = 96
"""More than any layer has, by half."""
_DTYPES = {
    "embeds": ("F32", np.float32),
    "positions": ("I32", np.int32),
    "rows": ("I64", np.int64),
    "mask": ("F16", np.float16),
    "window_mask": ("F16", np.float16),
}
"""Types of the inputs, for ggml and for numpy."""


class DecoderGraph:
    """The graph with memory for its intermediate results."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Mapping[str, TensorPointer],
        cache: KeyValues,
        shape: GraphShape,
        observe: Observe | None = None,
    ) -> None:
        native, nodes = ggml(), (spec.num_hidden_layers + 1) * _NODES_PER_LAYER
        self.shape, self._window = shape, spec.sliding_window
        self._context = Context(nodes, nodes)
        self._graph = native.new_graph_custom(self._context.pointer, nodes, False)
        sizes: dict[str, tuple[int, ...]] = {
            "embeds": (shape.length, spec.hidden_size),
            "positions": (shape.length,),
            "rows": (shape.length,),
            "mask": (shape.length, shape.visible),
        }
        if spec.sliding_layers:
            sizes["window_mask"] = sizes["mask"]
        inputs = {name: self._context.tensor(_DTYPES[name][0], *sizes[name]) for name in sizes}
        for tensor in inputs.values():
            native.set_input(tensor)
            # One that no layer reads (the mask, where all layers slide) needs memory too.
            native.build_forward_expand(self._graph, tensor)
        layers = Layers(
            spec, weights, cache, shape, Inputs(**inputs), self._context, self._graph, observe
        )
        logits = layers.logits()
        native.set_output(logits)
        native.build_forward_expand(self._graph, logits)
        workspace = Workspace(self._graph)
        self._arrays = {
            name: workspace.values(inputs[name], _DTYPES[name][1], *sizes[name]) for name in sizes
        }
        self._logits = workspace.values(logits, np.float32, shape.outputs, spec.vocab_size)

    def run(self, processor: Processor, rows: Rows, start: int) -> Float32:
        """Appends rows at position ``start``; logits ``(outputs, vocab_size)``, valid until the
        next call."""
        arrays = self._arrays
        positions = np.arange(start, start + self.shape.length)
        arrays["embeds"][:] = rows.embeds
        arrays["positions"][:] = arrays["rows"][:] = positions
        distance = positions[:, None] - np.arange(self.shape.visible)
        seen = distance >= 0
        for first, last in rows.blocks:
            seen[first:last, start + first : start + last] = True
        arrays["mask"][:] = _mask(seen)
        if "window_mask" in arrays:
            arrays["window_mask"][:] = _mask(seen & (distance < self._window))
        processor.compute(self._graph)
        return self._logits


def _mask(seen: NDArray[np.bool_]) -> NDArray[np.float16]:
    return np.where(seen, np.float16(0), np.float16(-np.inf))
