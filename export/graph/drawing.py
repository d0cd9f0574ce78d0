"""Graphs of images out: the head that chooses codes, the embedding of codes, and the decoder of a
grid of codes to pixels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.export.graph.layers import FLOAT, Linear, to_grid
from mobilevlm.export.graph.projectors import run_mlp
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.output_spec import CodeDecoder, ImageOutput

_SHORTEST = 1e-12
"""Least number that a vector of the codebook is divided by."""


class CodeHead(nn.Module):  # type: ignore[misc]
    """States ``(sequences, 1, hidden_size)`` to logits ``(sequences, 1, num_codes)``."""

    def __init__(self, weights: WeightFile, spec: ImageOutput, hidden_size: int) -> None:
        super().__init__("image_head")
        self.dialect = weights.dialect
        sizes = [hidden_size, spec.head_size, spec.num_codes]
        self.mlp = _linears(weights, "image_head", sizes)

    def forward(self, op: Any, hidden: Any) -> Any:
        return run_mlp(op, self.mlp, hidden, self.dialect)


class CodeEmbedding(nn.Module):  # type: ignore[misc]
    """Codes ``(1, length)`` to rows ``(1, length, hidden_size)``."""

    def __init__(self, weights: WeightFile, spec: ImageOutput, hidden_size: int) -> None:
        super().__init__("codes")
        self.dialect = weights.dialect
        table = weights.read("codes.embed.weight", spec.num_codes, spec.code_size)
        self.embed = weights.parameter(table)
        sizes = [spec.code_size, *[hidden_size] * spec.embed_depth]
        self.mlp = _linears(weights, "codes", sizes)

    def forward(self, op: Any, codes: Any) -> Any:
        return run_mlp(op, self.mlp, op.Gather(self.embed, codes), self.dialect)


class ImageDecoder(nn.Module):  # type: ignore[misc]
    """Codes ``(1, grid²)`` to values of pixels ``(1, edge, edge, 3)``, about -1 to 1."""

    def __init__(self, weights: WeightFile, output: ImageOutput) -> None:
        super().__init__("image_decoder")
        spec, name = output.decoder, "image_decoder"
        self.output = output
        table = weights.read(f"{name}.codebook.weight", output.num_codes, output.code_size)
        lengths = np.linalg.norm(table, axis=1, keepdims=True)
        self.codebook = weights.parameter(table / np.maximum(lengths, np.float32(_SHORTEST)))
        self.post_quant = Conv(weights, f"{name}.post_quant", output.code_size, spec.latent_size, 1)
        self.conv_in = Conv(weights, f"{name}.conv_in", spec.latent_size, spec.widths[0], 3)
        self.mid = Middle(weights, f"{name}.mid", spec, output.grid)
        self.levels = nn.ModuleList(
            [
                Level(weights, f"{name}.levels.{level}", spec, level, output.grid << level)
                for level in range(len(spec.widths))
            ]
        )
        self.norm_out = GroupNorm(weights, f"{name}.norm_out", spec, spec.widths[-1])
        self.conv_out = Conv(weights, f"{name}.conv_out", spec.widths[-1], 3, 3)

    def forward(self, op: Any, codes: Any) -> Any:
        rows = op.Gather(self.codebook, codes)
        hidden = to_grid(op, rows, self.output.code_size, self.output.grid)
        hidden = self.mid(op, self.conv_in(op, self.post_quant(op, hidden)))
        for level in self.levels:
            hidden = level(op, hidden)
        values = self.conv_out(op, _silu(op, self.norm_out(op, hidden)))
        return op.Transpose(values, perm=[0, 2, 3, 1])


class Middle(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: CodeDecoder, grid: int) -> None:
        super().__init__()
        width = spec.widths[0]
        self.before = ResidualBlock(weights, f"{name}.before", spec, width, width)
        self.attn = GridAttention(weights, f"{name}.attn", spec, width, grid)
        self.after = ResidualBlock(weights, f"{name}.after", spec, width, width)

    def forward(self, op: Any, hidden: Any) -> Any:
        return self.after(op, self.attn(op, self.before(op, hidden)))


class Level(nn.Module):  # type: ignore[misc]
    """Blocks of one resolution. ``grid``: positions along each edge of its map."""

    def __init__(
        self, weights: WeightFile, name: str, spec: CodeDecoder, level: int, grid: int
    ) -> None:
        super().__init__()
        width = spec.widths[level]
        self.blocks = nn.ModuleList(
            [
                ResidualBlock(weights, f"{name}.blocks.{index}", spec, *pair)
                for index, pair in enumerate(spec.block_widths[level])
            ]
        )
        self.attends = level in spec.attention_levels
        count = spec.blocks if self.attends else 0
        self.attns = nn.ModuleList(
            [
                GridAttention(weights, f"{name}.attns.{index}", spec, width, grid)
                for index in range(count)
            ]
        )
        self.upsample = None
        if level < len(spec.widths) - 1:
            self.upsample = Conv(weights, f"{name}.upsample", width, width, 3)

    def forward(self, op: Any, hidden: Any) -> Any:
        for index, block in enumerate(self.blocks):
            hidden = block(op, hidden)
            if self.attends:
                hidden = self.attns[index](op, hidden)
        if self.upsample is None:
            return hidden
        scales = op.Constant(value_floats=[1.0, 1.0, 2.0, 2.0])
        settings = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
        larger = op.Resize(hidden, None, scales, nearest_mode="floor", **settings)
        return self.upsample(op, larger)


class ResidualBlock(nn.Module):  # type: ignore[misc]
    def __init__(
        self, weights: WeightFile, name: str, spec: CodeDecoder, before: int, after: int
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(weights, f"{name}.norm1", spec, before)
        self.conv1 = Conv(weights, f"{name}.conv1", before, after, 3)
        self.norm2 = GroupNorm(weights, f"{name}.norm2", spec, after)
        self.conv2 = Conv(weights, f"{name}.conv2", after, after, 3)
        self.shortcut = None
        if before != after:
            self.shortcut = Conv(weights, f"{name}.shortcut", before, after, 1)

    def forward(self, op: Any, hidden: Any) -> Any:
        made = self.conv1(op, _silu(op, self.norm1(op, hidden)))
        made = self.conv2(op, _silu(op, self.norm2(op, made)))
        return op.Add(made, hidden if self.shortcut is None else self.shortcut(op, hidden))


class GridAttention(nn.Module):  # type: ignore[misc]
    """Attention of one head among the positions of a map ``(1, width, grid, grid)``."""

    def __init__(
        self, weights: WeightFile, name: str, spec: CodeDecoder, width: int, grid: int
    ) -> None:
        super().__init__()
        self.width, self.grid, self.dialect = width, grid, weights.dialect
        self.norm = GroupNorm(weights, f"{name}.norm", spec, width)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Conv(weights, f"{name}.{part}_proj", width, width, 1) for part in ("q", "k", "v", "out")
        )

    def forward(self, op: Any, hidden: Any) -> Any:
        normed = self.norm(op, hidden)
        query, key, value = (
            op.Reshape(proj(op, normed), [1, self.width, self.grid**2])
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        turned = op.Transpose(op.Mul(query, self.width**-0.5), perm=[0, 2, 1])
        shares = op.Softmax(op.MatMul(turned, key), axis=-1)
        mixed = op.MatMul(value, op.Transpose(shares, perm=[0, 2, 1]))
        mixed = op.Reshape(mixed, [1, self.width, self.grid, self.grid])
        return op.Add(hidden, self.out_proj(op, mixed))


class Conv(nn.Module):  # type: ignore[misc]
    """A convolution that keeps the size of a map. Its weights are float: in float16 where the
    recipe stores embeddings so."""

    def __init__(
        self, weights: WeightFile, name: str, in_size: int, out_size: int, kernel: int
    ) -> None:
        super().__init__()
        self.pad, self.is_half = kernel // 2, weights.recipe.embeddings == "fp16"
        read = weights.read(f"{name}.weight", out_size, in_size, kernel, kernel)
        self.weight = weights.parameter(read.astype(np.float16) if self.is_half else read)
        self.bias = weights.parameter(weights.read(f"{name}.bias", out_size))

    def forward(self, op: Any, hidden: Any) -> Any:
        weight = op.Cast(self.weight, to=FLOAT) if self.is_half else self.weight
        return op.Conv(hidden, weight, self.bias, pads=[self.pad] * 4)


class GroupNorm(nn.Module):  # type: ignore[misc]
    """Normalisation of groups of channels of ``(1, channels, height, width)``."""

    def __init__(self, weights: WeightFile, name: str, spec: CodeDecoder, channels: int) -> None:
        super().__init__()
        self.groups, self.epsilon = spec.groups, spec.norm_eps
        self.ones = weights.parameter(np.ones(spec.groups, np.float32))
        self.zeros = weights.parameter(np.zeros(spec.groups, np.float32))
        self.weight, self.bias = (
            weights.parameter(weights.read(f"{name}.{part}", channels)[:, None, None])
            for part in ("weight", "bias")
        )

    def forward(self, op: Any, hidden: Any) -> Any:
        rows = op.Reshape(hidden, [1, self.groups, -1])
        normed = op.InstanceNormalization(rows, self.ones, self.zeros, epsilon=self.epsilon)
        normed = op.Reshape(normed, op.Shape(hidden))
        return op.Add(op.Mul(normed, self.weight), self.bias)


def _silu(op: Any, hidden: Any) -> Any:
    return op.Mul(hidden, op.Sigmoid(hidden))


def _linears(weights: WeightFile, name: str, sizes: list[int]) -> nn.ModuleList:
    return nn.ModuleList(
        [
            Linear(weights, f"{name}.mlp.{index}", *pair)
            for index, pair in enumerate(pairwise(sizes))
        ]
    )
