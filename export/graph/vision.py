"""The vision stage: uint8 pixels to visual tokens, tower and projector in one graph.

Exact rewrites: mean and standard deviation are folded into the patch embedding, which becomes a
matrix product; q, k and v are one product; layers after the selected one are absent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.export.graph.dialects import CPU, Dialect
from mobilevlm.export.graph.layers import FLOAT, LayerNorm, Linear
from mobilevlm.export.graph.projectors import build_projector
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.spec import ImageSpec, ModelSpec, VisionSpec


class VisionStage(nn.Module):  # type: ignore[misc]
    """uint8 ``(1, size, size, 3)`` to visual tokens ``(1, num_tokens, hidden_size)`` and tower
    features ``(1, num_patches, vision hidden_size)``."""

    def __init__(self, weights: WeightFile, spec: ModelSpec, dialect: Dialect = CPU) -> None:
        super().__init__("vision")
        self.tower = ClipTower(weights, spec.vision, spec.image, dialect)
        self.projector = build_projector(weights, spec.projector)

    def forward(self, op: Any, pixels: Any) -> tuple[Any, Any]:
        features = self.tower(op, pixels)
        return self.projector(op, features), features


class ClipTower(nn.Module):  # type: ignore[misc]
    def __init__(
        self, weights: WeightFile, spec: VisionSpec, image: ImageSpec, dialect: Dialect
    ) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(weights, spec, image, dialect)
        self.pre_norm = LayerNorm(weights, "vision.pre_norm", spec.hidden_size, spec.layer_norm_eps)
        self.layers = nn.ModuleList(
            [
                ClipLayer(weights, f"vision.layers.{index}", spec, dialect)
                for index in range(spec.num_hidden_layers)
            ]
        )

    def forward(self, op: Any, pixels: Any) -> Any:
        hidden = self.pre_norm(op, self.embedding(op, pixels))
        for layer in self.layers:
            hidden = layer(op, hidden)
        return op.Slice(hidden, [1], [2**31], [1])  # the class token is dropped


class PatchEmbedding(nn.Module):  # type: ignore[misc]
    """Patches times the convolution's weights, with class token and positions."""

    def __init__(
        self, weights: WeightFile, spec: VisionSpec, image: ImageSpec, dialect: Dialect
    ) -> None:
        super().__init__()
        self.pixel_offset = dialect.pixel_offset
        self.grid, self.patch = spec.grid, spec.patch_size
        hidden, patch = spec.hidden_size, spec.patch_size
        stored = weights.read("vision.patch_embedding.weight", hidden, 3, patch, patch)
        kernel = stored.astype(np.float64).transpose(2, 3, 1, 0)  # (patch, patch, 3, hidden)
        mean, std = np.asarray(image.mean) - self.pixel_offset / 255, np.asarray(image.std)
        bias = -(kernel / std[:, None] * mean[:, None]).sum(axis=(0, 1, 2))
        kernel = (kernel / (255.0 * std)[:, None]).reshape(-1, hidden)
        positions = weights.read(
            "vision.position_embedding.weight", spec.num_patches + 1, hidden
        ).astype(np.float64)
        token = weights.read("vision.class_embedding", hidden).astype(np.float64)
        self.weight = weights.parameter(kernel.astype(np.float32))
        self.positions = weights.parameter((positions[1:] + bias).astype(np.float32)[None])
        self.class_token = weights.parameter((positions[0] + token).astype(np.float32)[None, None])

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
        hidden = op.MatMul(patches, self.weight)
        return op.Concat(self.class_token, op.Add(hidden, self.positions), axis=1)


class ClipLayer(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: VisionSpec, dialect: Dialect) -> None:
        super().__init__()
        size, wide = spec.hidden_size, spec.intermediate_size
        self.spec, self.dialect = spec, dialect
        self.norm1 = LayerNorm(weights, f"{name}.norm1", size, spec.layer_norm_eps)
        parts = [f"{name}.attn.{part}_proj" for part in "qkv"]
        self.qkv = Linear(weights, parts, size, [size] * 3)
        self.out_proj = Linear(weights, f"{name}.attn.out_proj", size, size)
        self.norm2 = LayerNorm(weights, f"{name}.norm2", size, spec.layer_norm_eps)
        self.fc1 = Linear(weights, f"{name}.mlp.fc1", size, wide)
        self.fc2 = Linear(weights, f"{name}.mlp.fc2", wide, size)

    def forward(self, op: Any, hidden: Any) -> Any:
        qkv = self.qkv(op, self.norm1(op, hidden))
        query, key, value = op.Split(qkv, axis=-1, num_outputs=3, _outputs=3)
        mixed = self.dialect.attention(op, query, key, value, self.spec)
        hidden = op.Add(hidden, self.out_proj(op, mixed))
        wide = self.fc1(op, self.norm2(op, hidden))
        quick = self.spec.hidden_act == "quick_gelu"
        wide = self.dialect.quick_gelu(op, wide) if quick else op.Gelu(wide)
        return op.Add(hidden, self.fc2(op, wide))
