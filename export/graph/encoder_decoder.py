"""Encoder and decoder of a model that has both (T5), on ONNX Runtime's CPU operators.

Keys and values of the prompt are outputs of the encoder: they are computed once for each prompt,
and every step of the decoder reads them. The decoder's own keys and values lie in buffers that the
caller owns, as in :mod:`mobilevlm.export.graph.decoder`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import nn

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph.decoder import Norm, SkipNorm
from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.head_padding import cut_heads, pad_heads
from mobilevlm.export.graph.layers import Linear
from mobilevlm.export.graph.mlp import build_mlp
from mobilevlm.export.graph.weight_file import WeightFile


class EncoderStage(nn.Module):  # type: ignore[misc]
    """``inputs_embeds (1, length, hidden_size)`` to states of the same shape, and for each layer of
    the decoder keys and values ``(1, num_attention_heads, length, head_dim)``."""

    def __init__(self, weights: WeightFile, spec: DecoderSpec) -> None:
        super().__init__("encoder")
        self.relative_bias = RelativeBias(weights, "decoder.encoder", spec, both_ways=True)
        self.input_norm = Norm(weights, "decoder.encoder.layers.0.input_norm", spec)
        self.layers = nn.ModuleList(
            [EncoderLayer(weights, index, spec) for index in range(spec.encoder_layers)]
        )
        self.cross = nn.ModuleList(
            [CrossKeyValue(weights, index, spec) for index in range(spec.num_hidden_layers)]
        )

    def forward(self, op: Any, embeds: Any) -> tuple[Any, list[tuple[Any, Any]]]:
        length = op.Shape(embeds, start=1, end=2)
        bias = self.relative_bias(op, _zero(op), length)
        residual, normed = embeds, self.input_norm(op, embeds)
        for layer in self.layers:
            residual, normed = layer(op, residual, normed, bias)
        return normed, [pair(op, normed) for pair in self.cross]


class EncoderLayer(nn.Module):  # type: ignore[misc]
    """Takes the residual stream and its norm, and gives both for what is next."""

    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__()
        name = f"decoder.encoder.layers.{index}"
        last = index == spec.encoder_layers - 1
        following = "norm" if last else f"layers.{index + 1}.input_norm"
        self.spec = spec
        self.qkv, self.o_proj = _attention_products(weights, f"{name}.attn", spec)
        self.post_attention_norm = SkipNorm(weights, f"{name}.post_attention_norm", spec)
        self.mlp = build_mlp(weights, f"{name}.mlp", spec)
        self.next_norm = SkipNorm(weights, f"decoder.encoder.{following}", spec)

    def forward(self, op: Any, residual: Any, normed: Any, bias: Any) -> tuple[Any, Any]:
        query, key, value = op.Split(self.qkv(op, normed), axis=-1, num_outputs=3, _outputs=3)
        mixed = op.MultiHeadAttention(
            *(query, key, value, None, None, bias),
            num_heads=self.spec.num_attention_heads,
            scale=self.spec.score_scale,
            _domain=CONTRIB,
        )
        residual, normed = self.post_attention_norm(op, self.o_proj(op, mixed), residual)
        total, normed = self.next_norm(op, self.mlp(op, normed), residual)
        return total, normed


class CrossKeyValue(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__()
        name, self.spec = f"decoder.encoder.cross.{index}", spec
        width = spec.num_attention_heads * spec.head_dim
        parts = [f"{name}.{part}_proj" for part in ("key", "value")]
        self.key_value = Linear(weights, parts, spec.hidden_size, [width] * 2, bias=spec.qkv_bias)

    def forward(self, op: Any, states: Any) -> tuple[Any, Any]:
        split = [1, -1, self.spec.num_attention_heads, self.spec.head_dim]
        parts = op.Split(self.key_value(op, states), axis=-1, num_outputs=2, _outputs=2)
        key, value = (op.Transpose(op.Reshape(part, split), perm=[0, 2, 1, 3]) for part in parts)
        return key, value


class EncodedDecoderStage(nn.Module):  # type: ignore[misc]
    """As :class:`mobilevlm.export.graph.decoder.DecoderStage`, with keys and values of the prompt
    for each layer."""

    def __init__(self, weights: WeightFile, spec: DecoderSpec) -> None:
        super().__init__("decoder")
        self.relative_bias = RelativeBias(weights, "decoder", spec, both_ways=False)
        self.input_norm = Norm(weights, "decoder.layers.0.input_norm", spec)
        self.layers = nn.ModuleList(
            [CrossLayer(weights, index, spec) for index in range(spec.num_hidden_layers)]
        )
        sizes = (spec.hidden_size, spec.vocab_size)
        self.lm_head = Linear(weights, "decoder.lm_head", *sizes, bias=spec.lm_head_bias)

    def forward(
        self,
        op: Any,
        embeds: Any,
        total_length: Any,
        logits_positions: Any,
        past: list[tuple[Any, Any]],
        cross: list[tuple[Any, Any]],
    ) -> tuple[Any, list[tuple[Any, Any]], dict[int, Any]]:
        seqlens = op.Sub(total_length, 1)
        end = op.Cast(total_length, to=ir.DataType.INT64)
        start = op.Sub(end, op.Shape(embeds, start=1, end=2))
        bias = self.relative_bias(op, start, end)
        residual, normed = embeds, self.input_norm(op, embeds)
        presents = []
        for layer, own, prompt in zip(self.layers, past, cross, strict=True):
            lengths = (seqlens, total_length)
            residual, normed, present = layer(op, residual, normed, lengths, bias, own, prompt)
            presents.append(present)
        chosen = op.Gather(normed, logits_positions, axis=1)
        return self.lm_head(op, chosen), presents, {}


class CrossLayer(nn.Module):  # type: ignore[misc]
    """Self-attention, cross-attention, MLP."""

    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__()
        name = f"decoder.layers.{index}"
        last = index == spec.num_hidden_layers - 1
        following = "decoder.norm" if last else f"decoder.layers.{index + 1}.input_norm"
        width, self.spec = spec.num_attention_heads * spec.head_dim, spec
        self.qkv, self.o_proj = _attention_products(weights, f"{name}.attn", spec)
        self.cross_norm = SkipNorm(weights, f"{name}.cross_norm", spec)
        self.query_proj = Linear(
            weights, f"{name}.cross.query_proj", spec.hidden_size, width, bias=spec.qkv_bias
        )
        self.cross_o_proj = Linear(
            weights, f"{name}.cross.o_proj", width, spec.hidden_size, bias=spec.o_bias
        )
        self.post_attention_norm = SkipNorm(weights, f"{name}.post_attention_norm", spec)
        self.mlp = build_mlp(weights, f"{name}.mlp", spec)
        self.next_norm = SkipNorm(weights, following, spec)

    def forward(
        self,
        op: Any,
        residual: Any,
        normed: Any,
        lengths: tuple[Any, Any],
        bias: Any,
        own: tuple[Any, Any],
        prompt: tuple[Any, Any],
    ) -> tuple[Any, Any, tuple[Any, Any]]:
        heads, scale = self.spec.num_attention_heads, self.spec.score_scale
        mixed, key, value = op.GroupQueryAttention(
            *(pad_heads(op, self.qkv(op, normed), 3 * heads, self.spec), None, None),
            *(*own, *lengths),
            *(None, None, None, bias),  # cosines, sines, positions
            num_heads=heads,
            kv_num_heads=heads,
            scale=scale,
            do_rotary=0,
            _domain=CONTRIB,
            _outputs=3,
        )
        residual, normed = self.cross_norm(
            op, self.o_proj(op, cut_heads(op, mixed, heads, self.spec)), residual
        )
        query = self.query_proj(op, normed)
        mixed = op.MultiHeadAttention(query, *prompt, num_heads=heads, scale=scale, _domain=CONTRIB)
        residual, normed = self.post_attention_norm(op, self.cross_o_proj(op, mixed), residual)
        residual, normed = self.next_norm(op, self.mlp(op, normed), residual)
        return residual, normed, (key, value)


class RelativeBias(nn.Module):  # type: ignore[misc]
    """``(1, heads, queries, keys)``: queries from ``start`` to ``end``, keys from 0 to ``end``."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec, both_ways: bool) -> None:
        super().__init__()
        positions = spec.relative_positions
        assert positions is not None
        sizes = (positions.num_buckets, spec.num_attention_heads)
        table = weights.read(f"{name}.relative_bias.weight", *sizes)
        self.furthest = spec.context_length - 1
        distances = np.arange(-self.furthest, self.furthest + 1 if both_ways else 1)
        buckets = relative_buckets(
            distances, positions.num_buckets, positions.max_distance, both_ways
        )
        self.table = weights.parameter(table[buckets])

    def forward(self, op: Any, start: Any, end: Any) -> Any:
        first, last, one = op.Squeeze(start, [0]), op.Squeeze(end, [0]), np.int64(1)
        queries = op.Unsqueeze(op.Range(first, last, op.Constant(value_int=int(one))), [1])
        keys = op.Range(op.Constant(value_int=0), last, op.Constant(value_int=int(one)))
        distance = op.Add(op.Sub(keys, queries), self.furthest)
        distance = op.Clip(distance, None, int(self.table.shape[0]) - 1)  # later keys are masked
        return op.Unsqueeze(op.Transpose(op.Gather(self.table, distance), perm=[2, 0, 1]), [0])


def relative_buckets(
    distances: NDArray[np.int64], num_buckets: int, max_distance: int, both_ways: bool
) -> NDArray[np.int64]:
    """The bucket of each distance from query to key, negative ones before: half of the buckets, or
    half of a half for each side, for one distance each, the others logarithmically (Raffel et al.
    2020, section 2.1; in float32 as the official code computes it)."""
    buckets = num_buckets // 2 if both_ways else num_buckets
    steps: NDArray[np.int64] = np.abs(distances) if both_ways else np.maximum(-distances, 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    growth = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + growth.astype(np.int64), buckets - 1)
    found: NDArray[np.int64] = np.where(steps < exact, steps, far)
    return found + buckets * (distances > 0) if both_ways else found


def _attention_products(
    weights: WeightFile, name: str, spec: DecoderSpec
) -> tuple[nn.Module, nn.Module]:
    """Return the products of self-attention: query, key and value at once, and the output's."""
    width, hidden = spec.num_attention_heads * spec.head_dim, spec.hidden_size
    parts = [f"{name}.{part}_proj" for part in "qkv"]
    qkv = Linear(weights, parts, hidden, [width] * 3, bias=spec.qkv_bias)
    return qkv, Linear(weights, f"{name}.o_proj", width, hidden, bias=spec.o_bias)


def _zero(op: Any) -> Any:
    return op.Constant(value_ints=[0])
