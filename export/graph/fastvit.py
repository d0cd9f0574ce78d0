"""FastViTHD's graph: uint8 pixels to features.

Convolutions over neighbours read maps with channels first, products with weights read rows with
channels last, so that they are matrix products that recipes quantize. Stages keep maps where
convolutions mix positions and rows where attention does; each MLP changes the order twice.

Exact rewrite: the pixels' scale and standard deviation are folded into the first convolution. The
mean is subtracted before it, so that the border of zeros stays what it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.export.graph.layers import FLOAT, LayerNorm, Linear, to_grid, to_tokens
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.image_encoder import ConvEncoder
from mobilevlm.input_spec import SquareImages


class FastVit(nn.Module):  # type: ignore[misc]
    """uint8 ``(1, size, size, 3)`` to features ``(1, num_features, hidden_size)``."""

    def __init__(self, weights: WeightFile, spec: ConvEncoder, image: SquareImages) -> None:
        super().__init__()
        self.stem = Stem(weights, spec, image)
        self.stages = nn.ModuleList(
            [Stage(weights, spec, stage) for stage in range(len(spec.widths))]
        )
        self.expansion = Expansion(weights, spec)

    def forward(self, op: Any, pixels: Any) -> Any:
        hidden = self.stem(op, pixels)
        for stage in self.stages:
            hidden = stage(op, hidden)
        return self.expansion(op, hidden)


class Depthwise(nn.Module):  # type: ignore[misc]
    """A convolution in which each channel that comes in has its own that go out."""

    def __init__(
        self, weights: WeightFile, name: str, in_width: int, width: int, size: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.groups, self.pads, self.strides = in_width, [size // 2] * 4, [stride, stride]
        self.weight = weights.parameter(weights.read(f"{name}.weight", width, 1, size, size))
        self.bias = weights.parameter(weights.read(f"{name}.bias", width))

    def forward(self, op: Any, hidden: Any) -> Any:
        return op.Conv(
            hidden,
            self.weight,
            self.bias,
            group=self.groups,
            pads=self.pads,
            strides=self.strides,
        )


class Pointwise(Linear):
    """A product at each position of a map, with GELU before and after it."""

    def __init__(self, weights: WeightFile, name: str, width: int, grid: int) -> None:
        super().__init__(weights, name, width, width)
        self.grid = grid

    def forward(self, op: Any, x: Any) -> Any:
        rows = to_tokens(op, self.dialect.gelu(op, x), self.in_size, self.grid**2)
        rows = self.dialect.gelu(op, super().forward(op, rows))
        return to_grid(op, rows, self.out_size, self.grid)


class Stem(nn.Module):  # type: ignore[misc]
    """Pixels to the first map. They are not centred for fixed point, which gains nothing here (of
    the fixture's features a16w8 loses 0.021 either way)."""

    def __init__(self, weights: WeightFile, spec: ConvEncoder, image: SquareImages) -> None:
        super().__init__()
        width, self.dialect = spec.widths[0], weights.dialect
        stored = weights.read("vision.stem.conv.weight", width, 3, 3, 3).astype(np.float64)
        scale = 1 / (255 * np.asarray(image.std))
        self.kernel = weights.parameter((stored * scale[:, None, None]).astype(np.float32))
        self.shift = weights.parameter(weights.read("vision.stem.conv.bias", width))
        self.mean = None
        if any(image.mean):
            self.mean = weights.parameter(np.asarray(image.mean, np.float32) * np.float32(255))
        self.depthwise = Depthwise(weights, "vision.stem.depthwise", width, width, 3, stride=2)
        self.pointwise = Pointwise(weights, "vision.stem.pointwise", width, spec.stage_grid(0))

    def forward(self, op: Any, pixels: Any) -> Any:
        pixels = op.Cast(pixels, to=FLOAT)
        if self.mean is not None:
            pixels = op.Sub(pixels, self.mean)
        pixels = op.Transpose(pixels, perm=[0, 3, 1, 2])
        hidden = op.Conv(pixels, self.kernel, self.shift, pads=[1] * 4, strides=[2, 2])
        return self.pointwise(op, self.depthwise(op, self.dialect.gelu(op, hidden)))


class Stage(nn.Module):  # type: ignore[misc]
    """A map of the stage before to its own."""

    def __init__(self, weights: WeightFile, spec: ConvEncoder, stage: int) -> None:
        super().__init__()
        name, width, grid = f"vision.stages.{stage}", spec.widths[stage], spec.stage_grid(stage)
        self.width, self.grid, self.attends = width, grid, stage in spec.attention_stages
        self.downsample = Downsample(weights, spec, stage) if stage else None
        self.position = None
        if self.attends:
            self.position = Depthwise(weights, f"{name}.position", width, width, 7)
        block = AttentionBlock if self.attends else MixerBlock
        self.blocks = nn.ModuleList(
            [
                block(weights, spec, stage, f"{name}.blocks.{index}")
                for index in range(spec.depths[stage])
            ]
        )

    def forward(self, op: Any, hidden: Any) -> Any:
        if self.downsample is not None:
            hidden = self.downsample(op, hidden)
        if self.position is not None:
            hidden = to_tokens(op, self.position(op, hidden), self.width, self.grid**2)
        for block in self.blocks:
            hidden = block(op, hidden)
        return to_grid(op, hidden, self.width, self.grid) if self.attends else hidden


class Downsample(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, spec: ConvEncoder, stage: int) -> None:
        super().__init__()
        name = f"vision.stages.{stage}.downsample"
        in_width, width = spec.widths[stage - 1 : stage + 1]
        self.conv = Depthwise(weights, f"{name}.conv", in_width, width, 7, stride=2)
        self.pointwise = Pointwise(weights, f"{name}.pointwise", width, spec.stage_grid(stage))

    def forward(self, op: Any, hidden: Any) -> Any:
        return self.pointwise(op, self.conv(op, hidden))


class Block(nn.Module):  # type: ignore[misc]
    """The part that both kinds of blocks share: the MLP with its convolution."""

    def __init__(self, weights: WeightFile, spec: ConvEncoder, stage: int, name: str) -> None:
        super().__init__()
        self.width, self.grid = spec.widths[stage], spec.stage_grid(stage)
        self.dialect, wide = weights.dialect, spec.mlp_size(stage)
        self.conv = Depthwise(weights, f"{name}.mlp.conv", self.width, self.width, 7)
        self.fc1 = Linear(weights, f"{name}.mlp.fc1", self.width, wide)
        self.fc2 = Linear(weights, f"{name}.mlp.fc2", wide, self.width)

    def to_tokens(self, op: Any, hidden: Any) -> Any:
        return to_tokens(op, hidden, self.width, self.grid**2)

    def to_grid(self, op: Any, rows: Any) -> Any:
        return to_grid(op, rows, self.width, self.grid)

    def mlp(self, op: Any, hidden: Any) -> Any:
        """Return the rows that a map becomes."""
        rows = self.to_tokens(op, self.conv(op, hidden))
        return self.fc2(op, self.dialect.gelu(op, self.fc1(op, rows)))


class MixerBlock(Block):
    """A map to a map, by a convolution and the MLP."""

    def __init__(self, weights: WeightFile, spec: ConvEncoder, stage: int, name: str) -> None:
        super().__init__(weights, spec, stage, name)
        self.mixer = Depthwise(weights, f"{name}.mixer", self.width, self.width, 3)

    def forward(self, op: Any, hidden: Any) -> Any:
        hidden = self.mixer(op, hidden)
        return op.Add(hidden, self.to_grid(op, self.mlp(op, hidden)))


class AttentionBlock(Block):
    """Rows to rows, by attention and the MLP."""

    def __init__(self, weights: WeightFile, spec: ConvEncoder, stage: int, name: str) -> None:
        super().__init__(weights, spec, stage, name)
        width, self.head_dim = self.width, spec.head_dim
        self.norm = LayerNorm(weights, f"{name}.norm", width, spec.layer_norm_eps)
        parts = [f"{name}.attn.{part}_proj" for part in "qkv"]
        if self.dialect.joined_queries:
            self.qkv = Linear(weights, parts, width, [width] * 3, bias=False)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                Linear(weights, part, width, width, bias=False) for part in parts
            )
        self.out_proj = Linear(weights, f"{name}.attn.out_proj", width, width)

    def forward(self, op: Any, rows: Any) -> Any:
        normed = self.norm(op, rows)
        if self.dialect.joined_queries:
            query, key, value = op.Split(self.qkv(op, normed), axis=-1, num_outputs=3, _outputs=3)
        else:
            query, key, value = (
                linear(op, normed) for linear in (self.q_proj, self.k_proj, self.v_proj)
            )
        heads = self.width // self.head_dim
        mixed = self.dialect.attention(op, query, key, value, heads, self.head_dim)
        rows = op.Add(rows, self.out_proj(op, mixed))
        return op.Add(rows, self.mlp(op, self.to_grid(op, rows)))


class Expansion(nn.Module):  # type: ignore[misc]
    """The last map to features: more channels, each weighed by what all positions have in common
    (squeeze-and-excitation)."""

    def __init__(self, weights: WeightFile, spec: ConvEncoder) -> None:
        super().__init__()
        self.size, self.count, self.dialect = spec.hidden_size, spec.num_features, weights.dialect
        wide, squeezed, name = spec.hidden_size, spec.squeeze_size, "vision.expansion"
        self.conv = Depthwise(weights, f"{name}.conv", spec.widths[-1], wide, 3)
        self.squeeze = Linear(weights, f"{name}.squeeze", wide, squeezed)
        self.excite = Linear(weights, f"{name}.excite", squeezed, wide)

    def forward(self, op: Any, hidden: Any) -> Any:
        rows = to_tokens(op, self.conv(op, hidden), self.size, self.count)
        mean = op.ReduceMean(rows, [1], keepdims=1)
        weight = op.Sigmoid(self.excite(op, op.Relu(self.squeeze(op, mean))))
        return self.dialect.gelu(op, op.Mul(rows, weight))
