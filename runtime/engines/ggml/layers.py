"""The layers of a decoder as ggml operations, from its spec. Nothing is computed here: results are
tensors to be. Hidden states are ``(length, hidden_size)``."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.gguf.architectures import gguf_architecture, has_neighbouring_pairs
from mobilevlm.runtime.engines.ggml.native import (
    TYPE_IDS,
    Context,
    Memory,
    TensorPointer,
    ggml,
    out_of_memory,
)

_NEIGHBOURS, _HALVES = 0, 2
"""GGML_ROPE_TYPE_NORMAL and GGML_ROPE_TYPE_NEOX."""
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_FLOAT = np.dtype(np.float32).itemsize


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
        try:
            pages = mmap.mmap(-1, count * step)
        except (OSError, OverflowError):
            raise out_of_memory(f"keys and values of {spec.context_length} positions") from None
        self._memory = Memory(pages)
        self._context = Context(count)
        tensors = [self._context.tensor(kind, spec.context_length, width) for _ in range(count)]
        for index, tensor in enumerate(tensors):
            self._memory.place(tensor, index * step)
        self.keys, self.values = tensors[::2], tensors[1::2]
        lines = self._memory.content.reshape(count, step)[:, : spec.context_length * self.row_size]
        self.rows: NDArray[np.uint8] = lines.reshape(count, spec.context_length, self.row_size)
        """The same as bytes: keys and values of one layer after the other."""


@dataclass(frozen=True)
class GraphShape:
    """Sizes that a graph is built for."""

    length: int
    """Positions that come in."""
    visible: int
    """Positions of the sequence that attention reads, with those."""
    outputs: int
    """Logits of so many of the last positions: 1, or all."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run of a graph."""

    embeds: TensorPointer
    """``(length, hidden_size)``"""
    positions: TensorPointer
    """``(length,)``, int32"""
    rows: TensorPointer
    """``(length,)``, int64: where keys and values go"""
    mask: TensorPointer
    """``(length, visible)``, float16: 0, or −∞ where a position is not seen"""
    window_mask: TensorPointer | None = None
    """The same of sliding layers."""


Observe: TypeAlias = Callable[[int, NDArray[np.int32]], None]
"""Is told of each sparse layer which experts were chosen ``(length, top_k)``, best first, before
they are used; the array is valid during the call."""


@dataclass(frozen=True)
class Layers:
    """Builder of the layers of one graph."""

    spec: DecoderSpec
    weights: Mapping[str, TensorPointer]
    """By their names in the file."""
    cache: KeyValues
    shape: GraphShape
    inputs: Inputs
    context: Context
    graph: int
    observe: Observe | None = None

    def logits(self) -> TensorPointer:
        """``(outputs, vocab_size)``, from the embeddings."""
        apply, hidden = self.context.apply, self.inputs.embeds
        for layer in range(self.spec.num_hidden_layers):
            prefix = f"blk.{layer}"
            normed = self._norm(f"{prefix}.attn_norm", hidden)
            attended = self._attention(layer, normed)
            if layer == self.spec.num_hidden_layers - 1:  # the others have left their keys
                attended, hidden, normed = map(self._wanted, (attended, hidden, normed))
            hidden = apply(
                "add", hidden, self._post_norm(f"{prefix}.post_attention_norm", attended)
            )
            if not self.spec.parallel_residual:
                normed = self._norm(f"{prefix}.ffn_norm", hidden)
            made = self._mlp_or_experts(layer, normed)
            hidden = apply("add", hidden, self._post_norm(f"{prefix}.post_ffw_norm", made))
        head = "token_embd" if self.spec.tie_word_embeddings else "output"
        logits = self._linear(head, self._norm("output_norm", hidden))
        if (cap := self.spec.logit_softcap) is None:
            return logits
        return apply("scale", apply("tanh", apply("scale", logits, 1 / cap)), cap)

    def _attention(self, layer: int, states: TensorPointer) -> TensorPointer:
        apply, spec, cache = self.context.apply, self.spec, self.cache
        length, visible, prefix = self.shape.length, self.shape.visible, f"blk.{layer}"
        heads, shared, size = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        query, key, value = (
            self._linear(f"{prefix}.attn_{part}", states) for part in ("q", "k", "v")
        )
        query, key = (
            self._rotate(layer, self._head_norm(f"{prefix}.attn_{part}_norm", states))
            for part, states in (
                ("q", apply("reshape_3d", query, size, heads, length)),
                ("k", apply("reshape_3d", key, size, shared, length)),
            )
        )
        key = apply("reshape_2d", key, size * shared, length)
        stores = cache.keys[layer], cache.values[layer]
        for store, new in zip(stores, (key, value), strict=True):
            written = apply("set_rows", store, new, self.inputs.rows)
            ggml().build_forward_expand(self.graph, written)  # before attention reads it
        # (heads, length, head_dim) against (shared, visible, head_dim)
        query = apply("permute", query, 0, 2, 1, 3)
        strides = cache.row_size, cache.head_size, 0
        keys, values = (
            apply("view_3d", store, size, visible, shared, *strides) for store in stores
        )
        mask = self.inputs.window_mask if spec.window(layer) else self.inputs.mask
        scale, no_bias, cap = spec.score_scale, 0.0, spec.attention_softcap or 0.0
        mixed = apply("flash_attn_ext", query, keys, values, mask, scale, no_bias, cap)
        mixed = apply("reshape_2d", mixed, heads * size, length)
        return self._linear(f"{prefix}.attn_output", mixed)

    def _head_norm(self, name: str, heads: TensorPointer) -> TensorPointer:
        """Normalise the channels of each head ``(length, heads, head_dim)``, where a decoder
        does."""
        if not self.spec.qk_norm:
            return heads
        normed = self.context.apply("rms_norm", heads, self.spec.norm_eps)
        result: TensorPointer = self.context.apply("mul", normed, self.weights[f"{name}.weight"])
        return result

    @cached_property
    def _pairs(self) -> int:
        """Channels that are rotated together."""
        architecture = gguf_architecture(self.spec)
        return _NEIGHBOURS if has_neighbouring_pairs(architecture) else _HALVES

    def _rotate(self, layer: int, heads: TensorPointer) -> TensorPointer:
        """``(length, heads, head_dim)``"""
        spec, positions, no_factors, any_length = self.spec, self.inputs.positions, None, 0
        frequencies = spec.rope_theta, 1 / spec.rope_scaling
        if spec.window(layer) and spec.sliding_rope_theta is not None:
            frequencies = spec.sliding_rope_theta, 1.0
        no_extension = (0.0, 1.0, 0.0, 0.0)
        return self.context.apply(
            "rope_ext", heads, positions, no_factors, spec.rotary_channels, self._pairs,
            any_length, *frequencies, *no_extension,
        )  # fmt: skip

    def _mlp_or_experts(self, layer: int, states: TensorPointer) -> TensorPointer:
        experts = self.spec.experts
        if experts is None or not self.spec.num_experts(layer):
            return self._mlp(layer, states)
        made = self._experts(layer, states)
        return self._with_residual(layer, states, made) if experts.use_residual else made

    def _mlp(self, layer: int, states: TensorPointer, ending: str = "") -> TensorPointer:
        prefix = f"blk.{layer}.ffn"
        readers = [self._linear(f"{prefix}_{part}{ending}", states) for part in self._readers]
        return self._linear(f"{prefix}_down{ending}", self._activated(readers))

    def _with_residual(
        self, layer: int, states: TensorPointer, made: TensorPointer
    ) -> TensorPointer:
        """Add the experts' output ``made`` and a dense MLP's beside them, weighted by a softmax of
        two."""
        apply = self.context.apply
        length = self._length_of(layer)
        shares = apply("soft_max", self._linear(f"blk.{layer}.ffn_gate_inp_shexp", states))
        sparse, dense = (
            apply("view_2d", shares, 1, length, 2 * _FLOAT, part * _FLOAT) for part in (0, 1)
        )
        beside = self._mlp(layer, states, "_shexp")
        return apply("add", apply("mul", made, sparse), apply("mul", beside, dense))

    def _length_of(self, layer: int) -> int:
        """Positions that pass a layer's MLP."""
        last = layer == self.spec.num_hidden_layers - 1
        return self.shape.outputs if last else self.shape.length

    @property
    def _readers(self) -> tuple[str, ...]:
        """The linear layers that read an MLP's input."""
        return ("gate", "up") if self.spec.mlp == "gated" else ("up",)

    def _experts(self, layer: int, states: TensorPointer) -> TensorPointer:
        """Router logits → softmax → the best ``top_k`` → weights that sum to one."""
        apply, experts = self.context.apply, self.spec.experts
        assert experts is not None
        prefix, count, top_k = f"blk.{layer}.ffn", self.spec.num_experts(layer), experts.top_k
        length = self._length_of(layer)
        probabilities = apply("soft_max", self._linear(f"{prefix}_gate_inp", states))
        chosen = apply("argsort_top_k", probabilities, top_k)  # (length, top_k)
        if self.observe is not None:
            chosen = self._observed(layer, chosen, length)
        table = apply("reshape_3d", probabilities, 1, count, length)
        shares = apply("get_rows", table, chosen)  # (length, top_k, 1)
        if experts.renormalize:
            shares = apply("reshape_2d", shares, top_k, length)
            shares = apply("div", shares, apply("sum_rows", shares))
            shares = apply("reshape_3d", shares, 1, top_k, length)
        states = apply("reshape_3d", states, self.spec.hidden_size, 1, length)
        readers = [
            self._linear_of(f"{prefix}_{part}_exps", states, chosen) for part in self._readers
        ]
        made = self._linear_of(f"{prefix}_down_exps", self._activated(readers), chosen)
        made = apply("mul", made, shares)  # (length, top_k, hidden_size)
        row = self.spec.hidden_size * _FLOAT
        parts = [
            apply("view_2d", made, self.spec.hidden_size, length, top_k * row, rank * row)
            for rank in range(top_k)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = apply("add", total, part)
        return total

    def _observed(self, layer: int, chosen: TensorPointer, length: int) -> TensorPointer:
        """``chosen`` is the beginning of each row of a sorted ``(length, experts)``."""
        assert self.observe is not None and self.spec.experts is not None
        observe, count = self.observe, self.spec.num_experts(layer)
        top_k = self.spec.experts.top_k

        def show(address: int) -> None:
            rows = (ctypes.c_int32 * (length * count)).from_address(address)
            observe(layer, np.ctypeslib.as_array(rows).reshape(length, count)[:, :top_k])

        return self.context.shown(chosen, show)

    def _activated(self, read: list[TensorPointer]) -> TensorPointer:
        """The inner state of an MLP, of what its gate and up layers, or its one layer, made."""
        apply, (first, *up) = self.context.apply, read
        if self.spec.hidden_act == "silu":
            return apply("swiglu_split", first, *up) if up else apply("silu", first)
        is_relu = self.spec.hidden_act == "relu"
        inner = apply("relu", first) if is_relu else self._gelu_new(first)
        return apply("mul", inner, *up) if up else inner

    def _gelu_new(self, states: TensorPointer) -> TensorPointer:
        """GELU by its tanh approximation, x · sigmoid(2 √(2/π) (x + 0.044715 x³)), in float32:
        ``ggml_gelu`` is a table in float16. With u the sigmoid's argument it is silu(u) / (u / x).
        """
        apply = self.context.apply
        slope = 2 * _SQRT_2_OVER_PI
        ratio = apply("scale_bias", apply("sqr", states), 0.044715 * slope, slope)
        return apply("div", apply("silu", apply("mul", states, ratio)), ratio)

    def _post_norm(self, name: str, states: TensorPointer) -> TensorPointer:
        """Normalise what attention or MLP made, where a decoder does."""
        return self._norm(name, states) if self.spec.post_norms else states

    def _norm(self, name: str, states: TensorPointer) -> TensorPointer:
        kind = "rms_norm" if self.spec.norm == "rms" else "norm"
        normed = self.context.apply(kind, states, self.spec.norm_eps)
        normed = self.context.apply("mul", normed, self.weights[f"{name}.weight"])
        return self._with_bias(name, normed)

    def _linear(self, name: str, states: TensorPointer) -> TensorPointer:
        product = self.context.apply("mul_mat", self.weights[f"{name}.weight"], states)
        return self._with_bias(name, product)

    def _with_bias(self, name: str, states: TensorPointer) -> TensorPointer:
        bias = self.weights.get(f"{name}.bias")
        return states if bias is None else self.context.apply("add", states, bias)

    def _linear_of(self, name: str, states: TensorPointer, chosen: TensorPointer) -> TensorPointer:
        """``(length, 1 or top_k, in_size)`` through each token's own experts: ``(length, top_k,
        out_size)``."""
        apply, bias = self.context.apply, self.weights.get(f"{name}.bias")
        product = apply("mul_mat_id", self.weights[f"{name}.weight"], states, chosen)
        return product if bias is None else apply("add_id", product, bias, chosen)

    def _wanted(self, states: TensorPointer) -> TensorPointer:
        """The rows of the positions whose logits are wanted."""
        width, count = self.spec.hidden_size, self.shape.outputs
        row = width * _FLOAT
        first = (self.shape.length - count) * row
        return self.context.apply("view_2d", states, width, count, row, first)
