"""Graph of a Conformer encoder: joined log-mel frames to features.

Exact rewrites: the batch norm is folded into the convolution before it; products of queries with
the vectors of distances are made for each distance once, and shifted to the keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.audio_encoder import ConformerEncoder
from mobilevlm.export.graph.layers import LayerNorm, Linear
from mobilevlm.export.graph.weight_file import WeightFile

_LEAST = float(np.finfo(np.float32).min)


class ConformerTower(nn.Module):  # type: ignore[misc]
    """``(1, bins, frames)`` to ``(1, frames, hidden_size)``."""

    def __init__(self, weights: WeightFile, spec: ConformerEncoder) -> None:
        super().__init__()
        self.spec = spec
        self.input = Linear(weights, "audio.input", spec.bins, spec.hidden_size)
        self.layers = nn.ModuleList(
            [
                ConformerLayer(weights, f"audio.layers.{index}", spec)
                for index in range(spec.num_hidden_layers)
            ]
        )
        self.guess = Guess(weights, spec)

    def forward(self, op: Any, mel: Any) -> Any:
        hidden = self.input(op, op.Transpose(mel, perm=[0, 2, 1]))
        length = op.Shape(hidden, start=1, end=2)
        block = [self.spec.block]
        blocks = op.Div(op.Add(length, [self.spec.block - 1]), block)
        missing = op.Sub(op.Mul(blocks, block), length)
        ones = op.Expand(op.Constant(value_float=1.0), length)
        exists = op.Pad(ones, op.Concat([0], missing, axis=0))
        mask = op.Reshape(op.Mul(op.Sub(1.0, exists), _LEAST), [-1, 1, 1, self.spec.block])
        for index, layer in enumerate(self.layers):
            hidden = layer(op, hidden, length, missing, mask)
            if index == self.spec.guess_layer:
                hidden = self.guess(op, hidden)
        return hidden


class Guess(nn.Module):  # type: ignore[misc]
    """Probabilities of a CTC head, as a vector that is added."""

    def __init__(self, weights: WeightFile, spec: ConformerEncoder) -> None:
        super().__init__()
        self.head = Linear(weights, "audio.guess.head", spec.hidden_size, spec.guesses)
        self.back = Linear(weights, "audio.guess.back", spec.guesses, spec.hidden_size)

    def forward(self, op: Any, hidden: Any) -> Any:
        shares = op.Softmax(self.head(op, hidden), axis=-1)
        return op.Add(hidden, self.back(op, shares))


class ConformerLayer(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: ConformerEncoder) -> None:
        super().__init__()
        norm = (spec.hidden_size, spec.norm_eps)
        self.ff1 = HalfMLP(weights, f"{name}.ff1", spec)
        self.attn_norm = LayerNorm(weights, f"{name}.attn_norm", *norm)
        self.attn = BlockAttention(weights, f"{name}.attn", spec)
        self.conv = ConvolutionModule(weights, f"{name}.conv", spec)
        self.ff2 = HalfMLP(weights, f"{name}.ff2", spec)
        self.norm = LayerNorm(weights, f"{name}.norm", *norm)

    def forward(self, op: Any, hidden: Any, length: Any, missing: Any, mask: Any) -> Any:
        hidden = op.Add(hidden, self.ff1(op, hidden))
        mixed = self.attn(op, self.attn_norm(op, hidden), length, missing, mask)
        hidden = op.Add(hidden, mixed)
        hidden = op.Add(hidden, self.conv(op, hidden))
        return self.norm(op, op.Add(hidden, self.ff2(op, hidden)))


class HalfMLP(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: ConformerEncoder) -> None:
        super().__init__()
        size, wide = spec.hidden_size, spec.intermediate_size
        self.norm = LayerNorm(weights, f"{name}.norm", size, spec.norm_eps)
        self.fc1 = Linear(weights, f"{name}.fc1", size, wide)
        self.fc2 = Linear(weights, f"{name}.fc2", wide, size)

    def forward(self, op: Any, hidden: Any) -> Any:
        wide = self.fc1(op, self.norm(op, hidden))
        return op.Mul(self.fc2(op, op.Mul(wide, op.Sigmoid(wide))), 0.5)


class BlockAttention(nn.Module):  # type: ignore[misc]
    """Attention inside blocks, which are a batch."""

    def __init__(self, weights: WeightFile, name: str, spec: ConformerEncoder) -> None:
        super().__init__()
        self.spec, wide = spec, spec.num_attention_heads * spec.head_dim
        parts = [f"{name}.{part}_proj" for part in "qkv"]
        self.qkv = Linear(weights, parts, spec.hidden_size, [wide] * 3, bias=False)
        self.out_proj = Linear(weights, f"{name}.out_proj", wide, spec.hidden_size)
        table = weights.read(f"{name}.distances.weight", 2 * spec.distances + 1, spec.head_dim)
        apart = np.arange(spec.block - 1, -spec.block, -1)  # of query and key, last key first
        rows = np.clip(apart, -spec.distances, spec.distances) + spec.distances
        self.vectors = weights.parameter(table[rows].T)

    def forward(self, op: Any, hidden: Any, length: Any, missing: Any, mask: Any) -> Any:
        block, heads, dim = self.spec.block, self.spec.num_attention_heads, self.spec.head_dim
        padded = op.Pad(self.qkv(op, hidden), op.Concat([0, 0, 0, 0], missing, [0], axis=0))
        parts = op.Split(padded, axis=-1, num_outputs=3, _outputs=3)
        query, key, value = (op.Reshape(part, [-1, block, heads, dim]) for part in parts)
        query = op.Transpose(op.Mul(query, dim**-0.5), perm=[0, 2, 1, 3])
        scores = op.MatMul(query, op.Transpose(key, perm=[0, 2, 3, 1]))
        scores = op.Add(scores, self._by_distance(op, query))
        shares = op.Softmax(op.Add(scores, mask), axis=-1)
        mixed = op.MatMul(shares, op.Transpose(value, perm=[0, 2, 1, 3]))
        rows = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [1, -1, heads * dim])
        return self.out_proj(op, op.Slice(rows, [0], length, [1]))

    def _by_distance(self, op: Any, query: Any) -> Any:
        """Products of each query with the vector of its distance to each key: those with all
        distances, each row one further to the left than the row above it."""
        block, heads = self.spec.block, self.spec.num_attention_heads
        made = op.Pad(op.MatMul(query, self.vectors), [0, 0, 0, 0, 0, 0, 0, 1])
        flat = op.Reshape(made, [-1, heads, 2 * block * block])
        count = block * (2 * block - 1)
        shifted = op.Slice(flat, [block - 1], [block - 1 + count], [2])
        rows = op.Reshape(shifted, [-1, heads, block, 2 * block - 1])
        return op.Slice(rows, [0], [block], [3])


class ConvolutionModule(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: ConformerEncoder) -> None:
        super().__init__()
        size, kernel = spec.conv_size, spec.conv_kernel
        self.spec = spec
        self.norm = LayerNorm(weights, f"{name}.norm", spec.hidden_size, spec.norm_eps)
        self.up = Linear(weights, f"{name}.up", spec.hidden_size, 2 * size)
        self.down = Linear(weights, f"{name}.down", size, spec.hidden_size)
        taps = weights.read(f"{name}.depthwise.weight", size, 1, kernel).astype(np.float64)
        scale, bias, mean, variance = (
            weights.read(f"{name}.batch_norm.{part}", size).astype(np.float64)
            for part in ("weight", "bias", "mean", "variance")
        )
        scale = scale / np.sqrt(variance + spec.norm_eps)
        self.taps = weights.parameter((taps * scale[:, None, None]).astype(np.float32))
        self.bias = weights.parameter((bias - mean * scale).astype(np.float32))

    def forward(self, op: Any, hidden: Any) -> Any:
        wide = self.up(op, self.norm(op, hidden))
        values, gate = op.Split(wide, axis=-1, num_outputs=2, _outputs=2)
        gated = op.Transpose(op.Mul(values, op.Sigmoid(gate)), perm=[0, 2, 1])
        kernel, size = self.spec.conv_kernel, self.spec.conv_size
        before = kernel // 2
        made = op.Conv(
            gated,
            self.taps,
            self.bias,
            group=size,
            kernel_shape=[kernel],
            pads=[before, kernel - 1 - before],
        )
        made = op.Mul(made, op.Sigmoid(made))
        return self.down(op, op.Transpose(made, perm=[0, 2, 1]))
