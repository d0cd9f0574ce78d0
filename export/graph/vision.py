"""The vision stage: uint8 pixels to visual tokens, tower and projector in one graph.

Exact rewrites: mean and standard deviation are folded into the patch embedding, which becomes a
matrix product; q, k and v are one product; layers after the selected one are absent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.audio_encoder import WhisperEncoder
from mobilevlm.export.graph.fastvit import FastVit
from mobilevlm.export.graph.layers import FLOAT, LayerNorm, Linear
from mobilevlm.export.graph.native import MergerProjector, NativeTower, PoolProjector
from mobilevlm.export.graph.projectors import build_projector
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.image_encoder import ConvEncoder, NativeEncoder, TransformerEncoder
from mobilevlm.input_spec import InputSpec, PixelImages
from mobilevlm.spec import ModelSpec


class VisionStage(nn.Module):  # type: ignore[misc]
    """uint8 ``(1, height, width, 3)`` to rows ``(1, num_rows, hidden_size)``, tower features ``(1,
    num_features, vision hidden_size)``, and rows that are added after layers of the decoder.
    ``further``: arrays that the connector reads beside the features."""

    def __init__(self, weights: WeightFile, spec: ModelSpec) -> None:
        super().__init__("vision")
        image = spec.image
        self.is_native, self.patch = isinstance(image.encoder, NativeEncoder), None
        self.tower = build_tower(weights, image)
        if self.is_native:
            kind = PoolProjector if image.connector.kind == "pool" else MergerProjector
            self.projector = kind(weights, image.connector)
            return
        self.projector = build_projector(weights, image.connector)
        if image.edge is None:
            self.patch = image.transformer.patch_size

    def forward(self, op: Any, pixels: Any, *further: Any) -> tuple[Any, Any, list[Any]]:
        if self.is_native:
            features, deep = self.tower(op, pixels)
            tokens, added = self.projector(op, features, deep)
            return tokens, features, added
        if self.patch is None:
            features = self.tower(op, pixels)
            return self.projector(op, features, *further), features, []
        sizes = op.Div(op.Shape(pixels, start=1, end=3), [self.patch])
        grid = op.Split(sizes, axis=0, num_outputs=2, _outputs=2)
        features = self.tower(op, pixels, grid)
        return self.projector(op, features, grid), features, []


def build_tower(weights: WeightFile, spec: InputSpec) -> nn.Module:
    """The tower of the kind that the spec has."""
    if isinstance(spec.encoder, NativeEncoder):
        return NativeTower(weights, spec.encoder, spec)
    if isinstance(spec.encoder, ConvEncoder):
        return FastVit(weights, spec.encoder, spec.square)
    return ClipTower(weights, spec.transformer, spec.pixels)


class ClipTower(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, spec: TransformerEncoder, image: PixelImages) -> None:
        super().__init__()
        self.dropped = spec.num_positions - spec.num_features
        self.embedding = PatchEmbedding(weights, spec, image)
        self.pre_norm = self.post_norm = None
        sizes = (spec.hidden_size, spec.layer_norm_eps)
        if spec.pre_norm:
            self.pre_norm = LayerNorm(weights, "vision.pre_norm", *sizes)
        self.layers = nn.ModuleList(
            [
                ClipLayer(weights, f"vision.layers.{index}", spec)
                for index in range(spec.num_hidden_layers)
            ]
        )
        if spec.post_norm:
            self.post_norm = LayerNorm(weights, "vision.post_norm", *sizes)

    def forward(self, op: Any, pixels: Any, grid: tuple[Any, Any] | None = None) -> Any:
        """``grid``: rows and columns of patches, each ``(1,)``, where they vary."""
        hidden = self.embedding(op, pixels, grid)
        if self.pre_norm is not None:
            hidden = self.pre_norm(op, hidden)
        for layer in self.layers:
            hidden = layer(op, hidden)
        if self.dropped:
            hidden = op.Slice(hidden, [self.dropped], [2**31], [1])  # the class token
        return hidden if self.post_norm is None else self.post_norm(op, hidden)


class PatchEmbedding(nn.Module):  # type: ignore[misc]
    """Patches times the convolution's weights, with positions and a class token if there is one."""

    def __init__(self, weights: WeightFile, spec: TransformerEncoder, image: PixelImages) -> None:
        super().__init__()
        self.dialect, self.pixel_offset = weights.dialect, weights.dialect.pixel_offset
        self.grid, self.patch = spec.grid, spec.patch_size
        hidden, patch = spec.hidden_size, spec.patch_size
        stored = weights.read("vision.patch_embedding.weight", hidden, 3, patch, patch)
        kernel = stored.astype(np.float64).transpose(2, 3, 1, 0)  # (patch, patch, 3, hidden)
        mean, std = np.asarray(image.mean) - self.pixel_offset / 255, np.asarray(image.std)
        bias = -(kernel / std[:, None] * mean[:, None]).sum(axis=(0, 1, 2))
        kernel = (kernel / (255.0 * std)[:, None]).reshape(-1, hidden)
        if spec.patch_bias:
            bias = bias + weights.read("vision.patch_embedding.bias", hidden).astype(np.float64)
        positions = weights.read(
            "vision.position_embedding.weight", spec.num_positions, hidden
        ).astype(np.float64)
        self.weight = weights.parameter(kernel.astype(np.float32))
        patches = positions[spec.num_positions - spec.num_patches :] + bias
        self.positions = weights.parameter(patches.astype(np.float32)[None])
        self.resized = spec.resized_positions
        self.class_token = None
        if spec.class_token:
            token = positions[0] + weights.read("vision.class_embedding", hidden).astype(np.float64)
            self.class_token = weights.parameter(token.astype(np.float32)[None, None])

    def forward(self, op: Any, pixels: Any, sizes: tuple[Any, Any] | None = None) -> Any:
        if sizes is not None:
            return self._of_any_shape(op, pixels, sizes)
        grid, patch = self.grid, self.patch
        edge = grid * patch
        if self.pixel_offset:  # before the rest, which NPU compilers cannot do with integers
            pixels = op.Sub(op.Cast(pixels, to=FLOAT), float(self.pixel_offset))
        pixels = op.Slice(pixels, [0, 0], [edge, edge], [1, 2])  # a border narrower than a patch
        patches = op.Reshape(pixels, [grid, patch, grid, patch * 3])
        patches = op.Transpose(patches, perm=[0, 2, 1, 3])
        patches = op.Reshape(patches, [1, grid * grid, patch * patch * 3])
        if not self.pixel_offset:
            patches = op.Cast(patches, to=FLOAT)
        hidden = op.Add(self.dialect.product(op, patches, self.weight), self.positions)
        return hidden if self.class_token is None else op.Concat(self.class_token, hidden, axis=1)

    def _of_any_shape(self, op: Any, pixels: Any, grid: tuple[Any, Any]) -> Any:
        """The same of an image whose grid of patches only the run knows."""
        rows, columns = grid
        shape = op.Concat(rows, [self.patch], columns, [self.patch * 3], axis=0)
        patches = op.Transpose(op.Reshape(pixels, shape), perm=[0, 2, 1, 3])
        patches = op.Cast(op.Reshape(patches, [1, -1, self.patch**2 * 3]), to=FLOAT)
        hidden = self.dialect.product(op, patches, self.weight)
        return op.Add(hidden, resized_positions(op, self.positions, self.grid, grid))


def resized_positions(op: Any, table: Any, side: int, grid: tuple[Any, Any]) -> Any:
    """Positions of a grid of patches ``(1, rows · columns, hidden_size)``, resized from a table
    ``(1, side², hidden_size)``: bilinear with antialiasing, one direction after the other."""
    down, across = (_resizing(op, side, count) for count in grid)
    narrow = op.MatMul(down, op.Reshape(table, [side, -1]))
    made = op.MatMul(across, op.Reshape(narrow, op.Concat(grid[0], [side, -1], axis=0)))
    return op.Reshape(made, op.Concat([1, -1], op.Shape(made, start=2), axis=0))


def _resizing(op: Any, side: int, count: Any) -> Any:
    """Shares ``(count, side)`` of a table's lines in each of ``count (1,)`` resized ones: triangles
    as wide as two lines of the coarser side, cut at the edges."""
    scale = op.Div([float(side)], op.Cast(count, to=FLOAT))
    places = op.Range(0, op.Squeeze(count, [0]), 1)
    centers = op.Mul(op.Add(op.Cast(places, to=FLOAT), 0.5), scale)
    lines = op.Constant(value_floats=[line + 0.5 for line in range(side)])
    distances = op.Abs(op.Sub(op.Unsqueeze(centers, [1]), op.Unsqueeze(lines, [0])))
    shares = op.Relu(op.Sub(1.0, op.Div(distances, op.Max(scale, [1.0]))))
    return op.Div(shares, op.ReduceSum(shares, [1]))


class ClipLayer(nn.Module):  # type: ignore[misc]
    def __init__(
        self, weights: WeightFile, name: str, spec: TransformerEncoder | WhisperEncoder
    ) -> None:
        super().__init__()
        size, wide = spec.hidden_size, spec.intermediate_size
        self.spec, self.dialect = spec, weights.dialect
        self.norm1 = LayerNorm(weights, f"{name}.norm1", size, spec.layer_norm_eps)
        parts = [f"{name}.attn.{part}_proj" for part in "qkv"]
        if self.dialect.joined_queries:
            biases = [True, spec.key_bias, True]
            self.qkv = Linear(weights, parts, size, [size] * 3, bias=biases)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                Linear(weights, part, size, size) for part in parts
            )
        self.out_proj = Linear(weights, f"{name}.attn.out_proj", size, size)
        self.norm2 = LayerNorm(weights, f"{name}.norm2", size, spec.layer_norm_eps)
        self.fc1 = Linear(weights, f"{name}.mlp.fc1", size, wide)
        self.fc2 = Linear(weights, f"{name}.mlp.fc2", wide, size)

    def forward(self, op: Any, hidden: Any) -> Any:
        rows = self.norm1(op, hidden)
        if self.dialect.joined_queries:
            query, key, value = op.Split(self.qkv(op, rows), axis=-1, num_outputs=3, _outputs=3)
        else:
            query, key, value = (
                linear(op, rows) for linear in (self.q_proj, self.k_proj, self.v_proj)
            )
        heads, head_dim = self.spec.num_attention_heads, self.spec.head_dim
        mixed = self.dialect.attention(op, query, key, value, heads, head_dim)
        hidden = op.Add(hidden, self.out_proj(op, mixed))
        wide = self._activate(op, self.fc1(op, self.norm2(op, hidden)))
        return op.Add(hidden, self.fc2(op, wide))

    def _activate(self, op: Any, wide: Any) -> Any:
        if self.spec.hidden_act == "quick_gelu":
            return self.dialect.quick_gelu(op, wide)
        form = "tanh" if self.spec.hidden_act == "gelu_tanh" else "none"
        return self.dialect.gelu(op, wide, approximate=form)
