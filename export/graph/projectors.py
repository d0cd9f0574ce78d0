"""Projectors: features ``(1, num_patches, in_size)`` to rows ``(1, num_rows, out_size)``.

Exact rewrite: LDPv2's average pooling commutes with the second Linear of its MLP, so it comes
first and that Linear does a quarter of the work.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.export.graph.dialects import Dialect, hard_sigmoid
from mobilevlm.export.graph.layers import LayerNorm, Linear, to_grid, to_tokens
from mobilevlm.export.graph.qformer import QFormerProjector
from mobilevlm.export.graph.weight_file import WeightFile


class MLPProjector(nn.Module):  # type: ignore[misc]
    """Linears with exact GELU between, for some after average pooling, and for some a learned row
    behind the visual tokens."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        super().__init__()
        self.pooling, self.dialect = None, weights.dialect
        if spec.out_grid < spec.grid:
            self.pooling = AveragePooling(weights, spec.grid, spec.out_grid, spec.in_size)
        self.norm, self.epsilon = None, spec.pool_norm_eps or 0.0
        if spec.pool_norm_eps is not None:
            self.norm = weights.parameter(weights.read("projector.norm.weight", spec.in_size))
        self.mlp, self.newline = mlp_linears(weights, spec), None
        if spec.newline:
            row = weights.read("projector.newline", spec.out_size)
            self.newline = weights.parameter(row[None, None])

    def forward(self, op: Any, features: Any) -> Any:
        hidden = features if self.pooling is None else self.pooling(op, features)
        if self.norm is not None:
            hidden = self.dialect.rms_norm(op, hidden, self.norm, self.epsilon)
        hidden = run_mlp(op, self.mlp, hidden, self.dialect)
        return hidden if self.newline is None else op.Concat(hidden, self.newline, axis=1)


class AveragePooling(nn.Module):  # type: ignore[misc]
    """Adaptive average pooling of ``(1, grid², size)``; a matrix product where its bins overlap."""

    def __init__(self, weights: WeightFile, grid: int, out_grid: int, size: int) -> None:
        super().__init__()
        self.grid, self.out_grid, self.size = grid, out_grid, size
        self.dialect = weights.dialect
        if grid % out_grid:
            matrix = _pooling_matrix(grid, out_grid)
            self.matrix = weights.parameter(matrix.T if self.dialect.rows_only else matrix)

    def forward(self, op: Any, hidden: Any) -> Any:
        out = self.out_grid
        if self.grid % out:
            if not self.dialect.rows_only:
                return op.MatMul(self.matrix, hidden)
            channels = op.Transpose(hidden, perm=[0, 2, 1])
            return op.Transpose(self.dialect.product(op, channels, self.matrix), perm=[0, 2, 1])
        # One direction after the other: compilers for NPUs have no six dimensions.
        bins = self.grid // out
        rows = op.Reshape(hidden, [1, out, bins, self.grid * self.size])
        rows = op.Reshape(op.ReduceMean(rows, [2], keepdims=0), [1, out * out, bins, self.size])
        return op.ReduceMean(rows, [2], keepdims=0)


class DownsampleProjector(nn.Module):  # type: ignore[misc]
    """Squares of patches as one vector each, norm, Linears with exact GELU between."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        super().__init__()
        self.spec, self.dialect = spec, weights.dialect
        self.norm = None
        if spec.norm:
            self.norm = LayerNorm(weights, "projector.norm", spec.mlp_sizes[0], 1e-5)
        self.mlp = mlp_linears(weights, spec)

    def forward(self, op: Any, features: Any, grid: tuple[Any, Any] | None = None) -> Any:
        """``grid``: rows and columns of patches, each ``(1,)``, where they vary; the squares divide
        them then."""
        spec, missing = self.spec, -self.spec.grid % self.spec.factor
        # Neighbours in a row are one vector already: accelerators have no six dimensions.
        if grid is None:
            patches = op.Reshape(features, [1, spec.grid, spec.grid, spec.in_size])
            if missing:
                patches = op.Pad(patches, [0, 0, 0, 0, 0, missing, missing, 0])
            row = [spec.factor, spec.out_grid, spec.factor * spec.in_size]
            squares = op.Reshape(patches, [spec.out_grid, *row])
        else:
            columns = op.Div(grid[1], [spec.factor])
            sizes = ([-1, spec.factor], columns, [spec.factor * spec.in_size])
            squares = op.Reshape(features, op.Concat(*sizes, axis=0))
        by_column = spec.order == "columns"
        squares = op.Transpose(squares, perm=[2, 0, 1, 3] if by_column else [0, 2, 1, 3])
        count = spec.num_tokens if grid is None else -1
        hidden = op.Reshape(squares, [1, count, spec.mlp_sizes[0]])
        if self.norm is not None:
            hidden = self.norm(op, hidden)
        return run_mlp(op, self.mlp, hidden, self.dialect)


class LDPv2Projector(nn.Module):  # type: ignore[misc]
    """MLP, average pooling to ``out_grid``, depthwise 3 × 3 with residual."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        super().__init__()
        self.spec, self.dialect = spec, weights.dialect
        self.mlp = mlp_linears(weights, spec)
        self.pooling = AveragePooling(weights, spec.grid, spec.out_grid, spec.out_size)
        self.kernel = weights.parameter(
            weights.read("projector.peg.weight", spec.out_size, 1, 3, 3)
        )
        self.bias = weights.parameter(weights.read("projector.peg.bias", spec.out_size))

    def forward(self, op: Any, features: Any) -> Any:
        spec = self.spec
        hidden = self.dialect.gelu(op, self.mlp[0](op, features), approximate="none")
        hidden = self.mlp[1](op, self.pooling(op, hidden))
        hidden = to_grid(op, hidden, spec.out_size, spec.out_grid)
        mixed = op.Conv(hidden, self.kernel, self.bias, group=spec.out_size, pads=[1, 1, 1, 1])
        return to_tokens(op, op.Add(mixed, hidden), spec.out_size, spec.num_tokens)


class LDPProjector(nn.Module):  # type: ignore[misc]
    """MLP and two inverted-residual blocks, the second of stride 2."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        super().__init__()
        self.spec, self.dialect = spec, weights.dialect
        self.mlp = mlp_linears(weights, spec)
        self.blocks = nn.ModuleList(
            [
                InvertedResidual(weights, f"projector.blocks.{index}", spec, stride)
                for index, stride in enumerate((1, 2))
            ]
        )

    def forward(self, op: Any, features: Any) -> Any:
        spec = self.spec
        hidden = self.dialect.gelu(op, self.mlp[0](op, features), approximate="none")
        hidden = self.mlp[1](op, hidden)
        hidden = to_grid(op, hidden, spec.out_size, spec.grid)
        for block in self.blocks:
            hidden = block(op, hidden)
        return to_tokens(op, hidden, spec.out_size, spec.num_tokens)


class InvertedResidual(nn.Module):  # type: ignore[misc]
    """Depthwise 3 × 3, squeeze-and-excitation, pointwise, on ``(1, channels, grid, grid)``."""

    def __init__(self, weights: WeightFile, name: str, spec: ConnectorSpec, stride: int) -> None:
        super().__init__()
        channels, squeezed = spec.out_size, spec.squeeze_size
        self.dialect = weights.dialect
        self.channels, self.stride = channels, stride
        self.depthwise = weights.parameter(
            weights.read(f"{name}.depthwise.weight", channels, 1, 3, 3)
        )
        self.norm1 = ChannelNorm(weights, f"{name}.norm1", channels)
        self.squeeze = Conv1x1(weights, f"{name}.squeeze", channels, squeezed)
        self.excite = Conv1x1(weights, f"{name}.excite", squeezed, channels)
        self.pointwise = Conv1x1(weights, f"{name}.pointwise", channels, channels, bias=False)
        self.norm2 = ChannelNorm(weights, f"{name}.norm2", channels)

    def forward(self, op: Any, hidden: Any) -> Any:
        out = op.Conv(
            hidden,
            self.depthwise,
            group=self.channels,
            pads=[1, 1, 1, 1],
            strides=[self.stride, self.stride],
        )
        out = self.norm1(op, out)
        out = self.dialect.hard_swish(op, out)
        gate = self.excite(op, op.Relu(self.squeeze(op, op.GlobalAveragePool(out))))
        gate = hard_sigmoid(op, gate)
        out = self.norm2(op, self.pointwise(op, op.Mul(out, gate)))
        return op.Add(out, hidden) if self.stride == 1 else out


class Conv1x1(nn.Module):  # type: ignore[misc]
    def __init__(
        self, weights: WeightFile, name: str, in_size: int, out_size: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = weights.parameter(weights.read(f"{name}.weight", out_size, in_size, 1, 1))
        self.bias = weights.parameter(weights.read(f"{name}.bias", out_size)) if bias else None

    def forward(self, op: Any, hidden: Any) -> Any:
        return op.Conv(hidden, self.weight, self.bias)


class ChannelNorm(nn.Module):  # type: ignore[misc]
    """Layer normalisation over channels of ``(1, channels, height, width)``."""

    def __init__(self, weights: WeightFile, name: str, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(weights, name, channels, 1e-5)

    def forward(self, op: Any, hidden: Any) -> Any:
        hidden = self.norm(op, op.Transpose(hidden, perm=[0, 2, 3, 1]))
        return op.Transpose(hidden, perm=[0, 3, 1, 2])


def build_projector(weights: WeightFile, spec: ConnectorSpec) -> nn.Module:
    """The projector that the spec names."""
    kinds = {
        "mlp": MLPProjector,
        "ldp": LDPProjector,
        "ldpv2": LDPv2Projector,
        "mlp_downsample": DownsampleProjector,
        "qformer": QFormerProjector,
    }
    return kinds[spec.kind](weights, spec)


def mlp_linears(weights: WeightFile, spec: ConnectorSpec, name: str = "projector") -> nn.ModuleList:
    """The Linears of an MLP below this canonical name."""
    return nn.ModuleList(
        [
            Linear(weights, f"{name}.mlp.{index}", *sizes, bias=spec.bias)
            for index, sizes in enumerate(pairwise(spec.mlp_sizes))
        ]
    )


def run_mlp(op: Any, linears: nn.ModuleList, hidden: Any, dialect: Dialect) -> Any:
    """Linears with exact GELU between."""
    for index, linear in enumerate(linears):
        hidden = linear(op, dialect.gelu(op, hidden, approximate="none") if index else hidden)
    return hidden


def _pooling_matrix(grid: int, out: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """``(out², grid²)``: bin i is ``floor(i · grid / out)`` to ``ceil((i + 1) · grid / out)``."""
    bins = np.zeros((out, grid), np.float64)
    for index in range(out):
        start, stop = index * grid // out, -(-(index + 1) * grid // out)
        bins[index, start:stop] = 1 / (stop - start)
    return np.kron(bins, bins).astype(np.float32)
