"""A decoder as a ggml graph, from its spec: one shape, run as often as that shape comes again."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import numpy as np

from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.engines.ggml_native import (
    TYPE_IDS,
    Context,
    Memory,
    Processor,
    TensorPointer,
    Workspace,
    ggml,
    values_of,
)
from mobilevlm.spec import DecoderSpec

_NODES_PER_LAYER = 64
_NEIGHBOURS = 0
"""GGML_ROPE_TYPE_NORMAL: rotary pairs stand side by side, as in files for llama.cpp."""


@dataclass(frozen=True)
class GraphShape:
    """What a graph is made for."""

    length: int
    """Positions that come in."""
    visible: int
    """Positions of the sequence that attention reads, with those."""
    outputs: int
    """Logits of so many of the last positions: 1, or all."""


class KeyValues:
    """Keys and values of a sequence: ``(context_length, num_key_value_heads * head_dim)`` for each
    layer. Pages become resident as positions are written."""

    def __init__(self, spec: DecoderSpec, kind: str) -> None:
        """``kind``: ``F16`` or ``F32``."""
        width = spec.num_key_value_heads * spec.head_dim
        self.row_size: int = ggml().row_size(TYPE_IDS[kind], width)
        self.head_size: int = ggml().row_size(TYPE_IDS[kind], spec.head_dim)
        step = -(-spec.context_length * self.row_size // mmap.PAGESIZE) * mmap.PAGESIZE
        count = 2 * spec.num_hidden_layers
        self._memory = Memory(mmap.mmap(-1, count * step))
        self._context = Context(count)
        tensors = [self._context.tensor(kind, spec.context_length, width) for _ in range(count)]
        for index, tensor in enumerate(tensors):
            self._memory.place(tensor, index * step)
        self.keys, self.values = tensors[::2], tensors[1::2]


class DecoderGraph:
    """The graph of one shape, with memory for its intermediate results."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: dict[str, TensorPointer],
        cache: KeyValues,
        shape: GraphShape,
    ) -> None:
        self._spec, self._weights, self._cache, self._shape = spec, weights, cache, shape
        nodes = (spec.num_hidden_layers + 1) * _NODES_PER_LAYER
        self._context = Context(nodes, nodes)
        self._apply = self._context.apply
        native = ggml()
        self._graph = native.new_graph_custom(self._context.pointer, nodes, False)
        length = shape.length
        inputs = {
            "embeds": ("F32", np.float32, (length, spec.hidden_size)),
            "positions": ("I32", np.int32, (length,)),
            "rows": ("I64", np.int64, (length,)),
            "mask": ("F16", np.float16, (length, shape.visible)),
        }
        self._inputs: dict[str, TensorPointer] = {}
        for name, (kind, _, size) in inputs.items():
            self._inputs[name] = self._context.tensor(kind, *size)
            native.set_input(self._inputs[name])
        logits = self._build()
        native.set_output(logits)
        native.build_forward_expand(self._graph, logits)
        self._workspace = Workspace(self._graph)
        self._arrays = {
            name: values_of(self._inputs[name], dtype, *size)
            for name, (_, dtype, size) in inputs.items()
        }
        self._logits = values_of(logits, np.float32, shape.outputs, spec.vocab_size)

    def run(self, processor: Processor, embeds: Float32, start: int) -> Float32:
        """Appends embeddings ``(length, hidden_size)`` at position ``start``; logits ``(outputs,
        vocab_size)``, valid until the next call."""
        arrays = self._arrays
        positions = np.arange(start, start + self._shape.length)
        arrays["embeds"][:] = embeds
        arrays["positions"][:] = arrays["rows"][:] = positions
        seen = np.arange(self._shape.visible) <= positions[:, None]
        arrays["mask"][:] = np.where(seen, np.float16(0), np.float16(-np.inf))
        processor.compute(self._graph)
        return self._logits

    # Shapes: (length, hidden_size) unless stated.

    def _build(self) -> TensorPointer:
        apply, hidden = self._apply, self._inputs["embeds"]
        for layer in range(self._spec.num_hidden_layers):
            prefix = f"blk.{layer}"
            attended = self._attention(layer, self._norm(f"{prefix}.attn_norm", hidden))
            if layer == self._spec.num_hidden_layers - 1:  # the others have left their keys
                attended, hidden = self._wanted(attended), self._wanted(hidden)
            hidden = apply("add", hidden, attended)
            changed = self._mlp(prefix, self._norm(f"{prefix}.ffn_norm", hidden))
            hidden = apply("add", hidden, changed)
        head = "token_embd" if self._spec.tie_word_embeddings else "output"
        return self._linear(head, self._norm("output_norm", hidden))

    def _attention(self, layer: int, states: TensorPointer) -> TensorPointer:
        apply, spec, cache = self._apply, self._spec, self._cache
        length, prefix = self._shape.length, f"blk.{layer}"
        heads, shared, size = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        query, key, value = (
            self._linear(f"{prefix}.attn_{part}", states) for part in ("q", "k", "v")
        )
        query = self._rotate(apply("reshape_3d", query, size, heads, length))
        key = self._rotate(apply("reshape_3d", key, size, shared, length))
        key = apply("reshape_2d", key, size * shared, length)
        for store, new in ((cache.keys[layer], key), (cache.values[layer], value)):
            written = apply("set_rows", store, new, self._inputs["rows"])
            ggml().build_forward_expand(self._graph, written)  # before attention reads it
        # (heads, length, head_dim) against (shared, visible, head_dim)
        keys, values = (
            apply(
                "view_3d",
                store,
                size,
                self._shape.visible,
                shared,
                cache.row_size,
                cache.head_size,
                0,
            )
            for store in (cache.keys[layer], cache.values[layer])
        )
        query = apply("permute", query, 0, 2, 1, 3)
        scale = 1 / math.sqrt(size)
        mixed = apply("flash_attn_ext", query, keys, values, self._inputs["mask"], scale, 0.0, 0.0)
        mixed = apply("reshape_2d", mixed, heads * size, length)
        return self._linear(f"{prefix}.attn_output", mixed)

    def _rotate(self, heads: TensorPointer) -> TensorPointer:
        """``(length, heads, head_dim)``"""
        spec = self._spec
        positions, no_factors = self._inputs["positions"], None
        no_extension = (0.0, 1.0, 0.0, 0.0)
        return self._apply(
            "rope_ext", heads, positions, no_factors, spec.head_dim, _NEIGHBOURS, 0,
            spec.rope_theta, 1 / spec.rope_scaling, *no_extension,
        )  # fmt: skip

    def _mlp(self, prefix: str, states: TensorPointer) -> TensorPointer:
        gate, up = (self._linear(f"{prefix}.ffn_{part}", states) for part in ("gate", "up"))
        inner = self._apply("swiglu_split", gate, up)
        return self._linear(f"{prefix}.ffn_down", inner)

    def _norm(self, name: str, states: TensorPointer) -> TensorPointer:
        normed = self._apply("rms_norm", states, self._spec.rms_norm_eps)
        return self._apply("mul", normed, self._weights[f"{name}.weight"])

    def _linear(self, name: str, states: TensorPointer) -> TensorPointer:
        return self._apply("mul_mat", self._weights[f"{name}.weight"], states)

    def _wanted(self, states: TensorPointer) -> TensorPointer:
        """The rows of the positions whose logits are wanted."""
        width, count = self._spec.hidden_size, self._shape.outputs
        row = width * np.dtype(np.float32).itemsize
        first = (self._shape.length - count) * row
        return self._apply("view_2d", states, width, count, row, first)
