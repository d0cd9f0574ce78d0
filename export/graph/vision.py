"""The vision stage: uint8 pixels to visual tokens, tower and projector in one graph.

Exact rewrites: mean and standard deviation are folded into the patch embedding, which becomes a
matrix product; q, k and v are one product; layers after the selected one are absent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.export.graph.fastvit import FastVit
from mobilevlm.export.graph.layers import FLOAT, LayerNorm, Linear
from mobilevlm.export.graph.projectors import build_projector
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.input_spec import ConvEncoder, InputSpec, SquareImages, TransformerEncoder
from mobilevlm.spec import ModelSpec


class VisionStage(nn.Module):  # type: ignore[misc]
    """uint8 ``(1, size, size, 3)`` to rows ``(1, num_rows, hidden_size)`` and tower
    features ``(1, num_features, vision hidden_size)``. ``further``: arrays that the connector reads
    beside the features."""

    def __init__(self, weights: WeightFile, spec: ModelSpec) -> None:
        super().__init__("vision")
        self.tower = build_tower(weights, spec.image)
        self.projector = build_projector(weights, spec.image.connector)

    def forward(self, op: Any, pixels: Any, *further: Any) -> tuple[Any, Any]:
        features = self.tower(op, pixels)
        return self.projector(op, features, *further), features


def build_tower(weights: WeightFile, spec: InputSpec) -> nn.Module:
    """The tower of the kind that the spec has."""
    if isinstance(spec.encoder, ConvEncoder):
        return FastVit(weights, spec.encoder, spec.square)
    return ClipTower(weights, spec.encoder, spec.square)


class ClipTower(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, spec: TransformerEncoder, image: SquareImages) -> None:
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

    def forward(self, op: Any, pixels: Any) -> Any:
        hidden = self.embedding(op, pixels)
        if self.pre_norm is not None:
            hidden = self.pre_norm(op, hidden)
        for layer in self.layers:
            hidden = layer(op, hidden)
        if self.dropped:
            hidden = op.Slice(hidden, [self.dropped], [2**31], [1])  # the class token
        return hidden if self.post_norm is None else self.post_norm(op, hidden)


class PatchEmbedding(nn.Module):  # type: ignore[misc]
    """Patches times the convolution's weights, with positions and a class token if there is one."""

    def __init__(self, weights: WeightFile, spec: TransformerEncoder, image: SquareImages) -> None:
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
        self.class_token = None
        if spec.class_token:
            token = positions[0] + weights.read("vision.class_embedding", hidden).astype(np.float64)
            self.class_token = weights.parameter(token.astype(np.float32)[None, None])

    def forward(self, op: Any, pixels: Any) -> Any:
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


class ClipLayer(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: TransformerEncoder) -> None:
        super().__init__()
        size, wide = spec.hidden_size, spec.intermediate_size
        self.spec, self.dialect = spec, weights.dialect
        self.norm1 = LayerNorm(weights, f"{name}.norm1", size, spec.layer_norm_eps)
        parts = [f"{name}.attn.{part}_proj" for part in "qkv"]
        if self.dialect.joined_queries:
            self.qkv = Linear(weights, parts, size, [size] * 3)
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
