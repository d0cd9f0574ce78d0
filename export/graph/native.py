"""Graphs of vision transformers on images of any size: uint8 pixels to features, visual tokens, and
rows that are added after the decoder's layers.

Sizes, rotary angles and windows follow from the shape of the pixels, inside the graph. Windows are
computed side by side, as a batch; those at the right and lower edge are filled up, and nobody sees
what fills them. Exact rewrite: mean and standard deviation are folded into the patch embedding,
which becomes a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.layers import FLOAT, LayerNorm, Linear
from mobilevlm.export.graph.projectors import mlp_linears, run_mlp
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.image_encoder import BOUNDS, NativeEncoder
from mobilevlm.input_spec import InputSpec


@dataclass(frozen=True)
class Grid:
    """Sizes of an image inside a graph, as tensors ``(1,)``."""

    rows: Any
    """Squares along the height"""
    columns: Any
    merge_size: int

    def in_squares(self, op: Any, values: Any, size: int) -> Any:
        """Return values of patches ``(rows · merge_size, columns · merge_size, size)`` in the order
        of patches ``(1, patches, size)``."""
        side = [self.merge_size]
        shape = op.Concat(self.rows, side, self.columns, [self.merge_size * size], axis=0)
        squares = op.Transpose(op.Reshape(values, shape), perm=[0, 2, 1, 3])
        return op.Reshape(squares, [1, -1, size])


@dataclass(frozen=True)
class Windows:
    """Windows of an image inside a graph."""

    grid: Grid
    edge: int
    """Squares along each edge of a window"""
    down: Any
    """Windows along the height, ``(1,)``"""
    across: Any
    mask: Any
    """1 for each patch of a window ``(windows, patches)``, 0 where it is filled up"""

    @classmethod
    def of(cls, op: Any, grid: Grid, edge: int) -> Windows:
        """Return the windows of an image."""
        down, across = (
            op.Div(op.Add(count, [edge - 1]), [edge]) for count in (grid.rows, grid.columns)
        )
        square = grid.merge_size**2
        ones = op.Expand(
            op.Constant(value_float=1.0),
            op.Concat([1], op.Mul(grid.rows, grid.columns), [square], axis=0),
        )
        part = cls(grid, edge, down, across, None)
        mask = op.Cast(part.split(op, ones, square), to=ir.DataType.INT32)
        shape = [-1, edge * edge * square]
        return cls(grid, edge, down, across, op.Reshape(mask, shape))

    def split(self, op: Any, x: Any, square: int) -> Any:
        """Return ``(1, patches, size)`` as ``(windows, edge², size · patches of a square)``.
        ``square``: the last of these sizes."""
        grid, edge = self.grid, [self.edge]
        shape = op.Concat(grid.rows, grid.columns, [square], axis=0)
        below = op.Sub(op.Mul(self.down, edge), grid.rows)
        right = op.Sub(op.Mul(self.across, edge), grid.columns)
        x = op.Pad(op.Reshape(x, shape), op.Concat([0, 0, 0], below, right, [0], axis=0))
        parts = op.Concat(self.down, edge, self.across, [self.edge * square], axis=0)
        x = op.Transpose(op.Reshape(x, parts), perm=[0, 2, 1, 3])
        return op.Reshape(x, [-1, self.edge**2, square])

    def join(self, op: Any, x: Any, square: int) -> Any:
        """Return what :meth:`split` has made in the order of patches."""
        grid, edge = self.grid, [self.edge]
        parts = op.Concat(self.down, self.across, edge, [self.edge * square], axis=0)
        x = op.Transpose(op.Reshape(x, parts), perm=[0, 2, 1, 3])
        whole = op.Concat(op.Mul(self.down, edge), op.Mul(self.across, edge), [square], axis=0)
        ends = op.Concat(grid.rows, grid.columns, axis=0)
        x = op.Slice(op.Reshape(x, whole), [0, 0], ends, [0, 1])
        return op.Reshape(x, [1, -1, square // grid.merge_size**2])


class NativeTower(nn.Module):  # type: ignore[misc]
    """uint8 ``(1, height, width, 3 · frames)`` to features ``(1, patches, hidden_size)`` and the
    outputs of the encoder's ``deep_layers``."""

    def __init__(self, weights: WeightFile, spec: NativeEncoder, image: InputSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = PatchEmbedding(weights, spec, image)
        half = spec.head_dim // 2
        exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
        self.frequencies = weights.parameter(
            np.float32(1) / np.float32(spec.rope_theta) ** exponent
        )
        self.layers = nn.ModuleList(
            [
                NativeLayer(weights, f"vision.layers.{index}", spec)
                for index in range(spec.num_hidden_layers)
            ]
        )

    def forward(self, op: Any, pixels: Any) -> tuple[Any, list[Any]]:
        hidden, grid = self.embedding(op, pixels)
        rotary, windows, deep = self._rotary(op, grid), None, []
        if any(map(self.spec.window_of, range(self.spec.num_hidden_layers))):
            windows = Windows.of(op, grid, self.spec.window)
        for index, layer in enumerate(self.layers):
            hidden = layer(op, hidden, rotary, windows if self.spec.window_of(index) else None)
            if index in self.spec.deep_layers:
                deep.append(hidden)
        return hidden, deep

    def _rotary(self, op: Any, grid: Grid) -> tuple[Any, Any]:
        """Cosine and sine ``(patches, head_dim / 2)``: the first half by rows, the other by
        columns."""
        side, quarter, angles = self.spec.merge_size, self.spec.head_dim // 4, []
        counts = [op.Mul(count, [side]) for count in (grid.rows, grid.columns)]
        whole = op.Concat(*counts, [quarter], axis=0)
        for count, shape in zip(counts, ([-1, 1, 1], [1, -1, 1]), strict=True):
            places = op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))
            places = op.Reshape(op.Cast(places, to=FLOAT), shape)
            angles.append(op.Expand(op.Mul(places, self.frequencies), whole))
        turned = grid.in_squares(op, op.Concat(*angles, axis=-1), 2 * quarter)
        turned = op.Squeeze(turned, [0])
        return op.Cos(turned), op.Sin(turned)


class PatchEmbedding(nn.Module):  # type: ignore[misc]
    """Patches times the convolution's weights, with learned positions if there are some."""

    def __init__(self, weights: WeightFile, spec: NativeEncoder, image: InputSpec) -> None:
        super().__init__()
        self.spec, self.dialect = spec, weights.dialect
        hidden, patch = spec.hidden_size, spec.patch_size
        shape = (hidden, 3, spec.frames, patch, patch)
        stored = weights.read("vision.patch_embedding.weight", *shape).astype(np.float64)
        kernel = stored.transpose(3, 4, 2, 1, 0)  # (patch, patch, frames, 3, hidden)
        mean, std = np.asarray(image.pixels.mean), np.asarray(image.pixels.std)
        bias = -(kernel * (mean / std)[:, None]).sum(axis=(0, 1, 2, 3))
        if spec.patch_bias:
            bias = bias + weights.read("vision.patch_embedding.bias", hidden).astype(np.float64)
        kernel = (kernel / (255.0 * std)[:, None]).reshape(-1, hidden)
        self.weight = weights.parameter(kernel.astype(np.float32))
        self.bias = weights.parameter(bias.astype(np.float32))
        self.positions = None
        if spec.axis_positions:
            sizes = (2, spec.axis_positions, hidden)
            columns, rows = weights.read("vision.position_embedding.weight", *sizes)
            self.by_row, self.by_column = weights.parameter(rows), weights.parameter(columns)
        if side := spec.position_grid:
            table = weights.read("vision.position_embedding.weight", side * side, hidden)
            planes = table.T.reshape(1, hidden, side, side)
            self.positions = weights.parameter(np.ascontiguousarray(planes))

    def forward(self, op: Any, pixels: Any) -> tuple[Any, Grid]:
        spec = self.spec
        edge, side = spec.patch_size * spec.merge_size, [spec.merge_size, spec.patch_size]
        rows, columns = (
            op.Div(op.Shape(pixels, start=axis, end=axis + 1), [edge]) for axis in (1, 2)
        )
        grid = Grid(rows, columns, spec.merge_size)
        patches = op.Reshape(pixels, op.Concat(rows, side, columns, side, [-1, 3], axis=0))
        patches = op.Expand(patches, [1, 1, 1, 1, 1, 1, spec.frames, 1])
        patches = op.Transpose(patches, perm=[0, 3, 1, 4, 2, 5, 6, 7])
        patches = op.Cast(op.Reshape(patches, [1, -1, spec.patch_values]), to=FLOAT)
        hidden = self.dialect.product(op, patches, self.weight, self.bias)
        counts = [op.Mul(count, [spec.merge_size]) for count in (rows, columns)]
        if spec.axis_positions:
            down, across = (
                op.Slice(table, [0], count, [0])
                for table, count in zip((self.by_row, self.by_column), counts, strict=True)
            )
            planes = op.Add(op.Unsqueeze(down, [1]), op.Unsqueeze(across, [0]))
            return op.Add(hidden, grid.in_squares(op, planes, spec.hidden_size)), grid
        if self.positions is None:
            return hidden, grid
        sizes = op.Concat([1, spec.hidden_size], *counts, axis=0)
        resized = op.Resize(
            self.positions,
            None,
            None,
            sizes,
            mode="linear",
            coordinate_transformation_mode="align_corners",
        )
        planes = op.Squeeze(op.Transpose(resized, perm=[0, 2, 3, 1]), [0])
        return op.Add(hidden, grid.in_squares(op, planes, spec.hidden_size)), grid


class ClippedLinear(Linear):
    """A linear layer whose inputs and outputs are clipped to bounds of the checkpoint."""

    def __init__(self, weights: WeightFile, name: str, in_size: int, out_size: int) -> None:
        super().__init__(weights, name, in_size, out_size, bias=False)
        self.bounds = [float(weights.read(f"{name}.{bound}", 1)[0]) for bound in BOUNDS]

    def forward(self, op: Any, x: Any) -> Any:
        least, greatest, lowest, highest = self.bounds
        return op.Clip(super().forward(op, op.Clip(x, least, greatest)), lowest, highest)


class Readers(nn.Module):  # type: ignore[misc]
    """Clipped layers that read the same input, each clipped by itself; outputs follow each
    other."""

    def __init__(self, weights: WeightFile, names: list[str], in_size: int, out_size: int) -> None:
        super().__init__()
        self.leaves = [name.rpartition(".")[2] for name in names]
        for leaf, name in zip(self.leaves, names, strict=True):
            setattr(self, leaf, ClippedLinear(weights, name, in_size, out_size))

    def forward(self, op: Any, x: Any) -> Any:
        return op.Concat(*(getattr(self, leaf)(op, x) for leaf in self.leaves), axis=-1)


def _layers(
    weights: WeightFile, names: list[str], sizes: tuple[int, int], spec: NativeEncoder
) -> nn.Module:
    """Layers that read the same input; ``sizes``: of it, and of what each gives."""
    if spec.clipped and len(names) > 1:
        return Readers(weights, names, *sizes)
    if spec.clipped:
        return ClippedLinear(weights, names[0], *sizes)
    return Linear(weights, names, sizes[0], [sizes[1]] * len(names), bias=spec.bias)


class NativeLayer(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: NativeEncoder) -> None:
        super().__init__()
        size, wide, norm = spec.hidden_size, spec.intermediate_size, (spec.norm, spec.norm_eps)
        self.spec, self.dialect = spec, weights.dialect
        self.norm1 = build_norm(weights, f"{name}.norm1", size, *norm)
        qkv = [f"{name}.attn.{part}_proj" for part in "qkv"]
        self.qkv = _layers(weights, qkv, (size, size), spec)
        self.out_proj = _layers(weights, [f"{name}.attn.out_proj"], (size, size), spec)
        self.q_norm = self.k_norm = self.v_norm = None
        if spec.head_norms:
            head = spec.head_dim, spec.norm_eps
            self.q_norm = RMSNorm(weights, f"{name}.attn.q_norm", *head)
            self.k_norm = RMSNorm(weights, f"{name}.attn.k_norm", *head)
            self.v_norm = RMSNorm(weights, "", *head)
        self.norm2 = build_norm(weights, f"{name}.norm2", size, *norm)
        readers, maker = spec.mlp_linears
        names = [f"{name}.mlp.{reader}" for reader in readers]
        # Their names in the graph are those that export/graph/reading.py looks for.
        self.readers, self.maker = "gate_up" if len(names) > 1 else "fc1", maker
        setattr(self, self.readers, _layers(weights, names, (size, wide), spec))
        setattr(self, maker, _layers(weights, [f"{name}.mlp.{maker}"], (wide, size), spec))
        self.attn_output_norm = self.mlp_output_norm = None
        if spec.post_norms:
            self.attn_output_norm = build_norm(weights, f"{name}.attn_output_norm", size, *norm)
            self.mlp_output_norm = build_norm(weights, f"{name}.mlp_output_norm", size, *norm)

    def forward(self, op: Any, hidden: Any, rotary: Any, windows: Windows | None) -> Any:
        mixed = self._mixed(op, self.norm1(op, hidden), rotary, windows)
        attended = self.out_proj(op, mixed)
        if self.attn_output_norm is not None:
            attended = self.attn_output_norm(op, attended)
        hidden = op.Add(hidden, attended)
        made = getattr(self, self.maker)(op, self._wide(op, self.norm2(op, hidden)))
        if self.mlp_output_norm is not None:
            made = self.mlp_output_norm(op, made)
        return op.Add(hidden, made)

    def _normed(self, op: Any, norm: RMSNorm | None, states: Any) -> Any:
        """``(1, patches, hidden_size)`` with each head normalised."""
        if norm is None:
            return states
        heads = self.spec.num_attention_heads
        split = op.Reshape(states, [1, -1, heads, self.spec.head_dim])
        return op.Reshape(norm(op, split), [1, -1, self.spec.hidden_size])

    def _mixed(self, op: Any, normed: Any, rotary: Any, windows: Windows | None) -> Any:
        """Values ``(1, patches, hidden_size)`` mixed by attention."""
        heads: dict[str, Any] = {"num_heads": self.spec.num_attention_heads, "_domain": CONTRIB}
        query, key, value = op.Split(self.qkv(op, normed), axis=-1, num_outputs=3, _outputs=3)
        norms = (self.q_norm, self.k_norm, self.v_norm)
        query, key, value = (
            self._normed(op, norm, part)
            for norm, part in zip(norms, (query, key, value), strict=True)
        )
        query, key = (
            op.RotaryEmbedding(
                part,
                op.Constant(value_ints=[0]),
                *rotary,
                rotary_embedding_dim=self.spec.head_dim,
                **heads,
            )
            for part in (query, key)
        )
        if self.spec.head_norms:
            heads["scale"] = 1.0
        if windows is None:
            return op.MultiHeadAttention(query, key, value, **heads)
        size, square = self.spec.hidden_size, self.spec.square * self.spec.hidden_size
        query, key, value = (
            op.Reshape(windows.split(op, part, square), [0, -1, size])
            for part in (query, key, value)
        )
        mixed = op.MultiHeadAttention(query, key, value, None, windows.mask, **heads)
        return windows.join(op, mixed, square)

    def _wide(self, op: Any, normed: Any) -> Any:
        """States inside the MLP."""
        wide = getattr(self, self.readers)(op, normed)
        if self.spec.mlp == "gated":
            wide, other = op.Split(wide, axis=-1, num_outputs=2, _outputs=2)
            return op.Mul(self._activate(op, wide), other)
        return self._activate(op, wide)

    def _activate(self, op: Any, wide: Any) -> Any:
        if self.spec.hidden_act == "quick_gelu":
            return self.dialect.quick_gelu(op, wide)
        if self.spec.hidden_act == "silu":
            return op.Mul(wide, op.Sigmoid(wide))
        return self.dialect.gelu(op, wide, approximate="tanh")


class Merger(nn.Module):  # type: ignore[misc]
    """``(1, patches, in_size)`` to rows ``(1, tokens, out_size)``. ``joined``: the norm is over the
    patches of a square as one vector."""

    def __init__(self, weights: WeightFile, name: str, spec: ConnectorSpec, joined: bool) -> None:
        super().__init__()
        self.joined, self.size, self.dialect = joined, spec.mlp_sizes[0], weights.dialect
        size, kind = (self.size, "layer") if joined else (spec.in_size, spec.norm_kind)
        self.norm = build_norm(weights, f"{name}.norm", size, kind, spec.norm_eps)
        self.mlp = mlp_linears(weights, spec, name)

    def forward(self, op: Any, hidden: Any) -> Any:
        shape = [1, -1, self.size]
        if self.joined:
            hidden = self.norm(op, op.Reshape(hidden, shape))
        else:
            hidden = op.Reshape(self.norm(op, hidden), shape)
        return run_mlp(op, self.mlp, hidden, self.dialect)


class MergerProjector(Merger):
    """Features to visual tokens, and the outputs of the encoder's ``deep_layers`` to as many
    rows each."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        further = [
            Merger(weights, f"projector.deep.{index}", spec, joined=True)
            for index in range(spec.deep)
        ]
        super().__init__(weights, "projector", spec, joined=False)
        self.deep = nn.ModuleList(further)

    def forward(  # type: ignore[override]
        self, op: Any, features: Any, deep: list[Any]
    ) -> tuple[Any, list[Any]]:
        added = [merger(op, hidden) for merger, hidden in zip(self.deep, deep, strict=True)]
        return super().forward(op, features), added


class PoolProjector(nn.Module):  # type: ignore[misc]
    """Averages of the patches of a square, an RMS norm without weight, and an MLP."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        super().__init__()
        self.shape, self.dialect = [1, -1, spec.factor**2, spec.in_size], weights.dialect
        self.norm = RMSNorm(weights, "", spec.in_size, spec.norm_eps)
        self.mlp = mlp_linears(weights, spec, "projector")

    def forward(self, op: Any, features: Any, deep: list[Any]) -> tuple[Any, list[Any]]:
        pooled = op.ReduceMean(op.Reshape(features, self.shape), [2], keepdims=0)
        return run_mlp(op, self.mlp, self.norm(op, pooled), self.dialect), deep


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Without a ``name`` it has no weight."""

    def __init__(self, weights: WeightFile, name: str, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon, self.dialect = epsilon, weights.dialect
        weight = weights.read(f"{name}.weight", size) if name else np.ones(size, np.float32)
        self.weight = weights.parameter(weight)

    def forward(self, op: Any, x: Any) -> Any:
        return self.dialect.rms_norm(op, x, self.weight, self.epsilon)


def build_norm(
    weights: WeightFile, name: str, size: int, kind: str, epsilon: float
) -> LayerNorm | RMSNorm:
    """The kind of norm that the spec names."""
    return (RMSNorm if kind == "rms" else LayerNorm)(weights, name, size, epsilon)
