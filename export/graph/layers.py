"""Layers that several graphs use: linear layers in every precision, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.quantize import q4_0
from mobilevlm.export.quantize.blocks import half_scales, signed_columns
from mobilevlm.export.quantize.errors import relative_error
from mobilevlm.export.recipes.layer_formats import quantize, to_half
from mobilevlm.recipe import BLOCK_BITS

FLOAT = ir.DataType.FLOAT
SMALLEST = float(np.finfo(np.float32).tiny)
"""Divisor of a row of zeros."""


class Linear(nn.Module):  # type: ignore[misc]
    """``x (…, in_size)`` to ``x · Wᵀ + b (…, out_size)``.

    ``names``: canonical tensors without ``.weight``; several are stacked along the output and
    multiplied at once (fused q, k and v), with ``bias`` for all or for each. The recipe says how
    they are stored.
    """

    def __init__(
        self,
        weights: WeightFile,
        names: str | Sequence[str],
        in_size: int,
        out_sizes: int | Sequence[int],
        *,
        bias: bool | Sequence[bool] = True,
    ) -> None:
        super().__init__()
        names = [names] if isinstance(names, str) else list(names)
        sizes = [out_sizes] if isinstance(out_sizes, int) else list(out_sizes)
        parts = list(zip(names, sizes, strict=True))
        weight = _stacked([weights.read(f"{name}.weight", size, in_size) for name, size in parts])
        self.names, self.in_size, self.out_size = tuple(names), in_size, sum(sizes)
        self.dialect = weights.dialect
        self.format = weights.recipe.format_of(names[0])
        label = ",".join(names)
        scheme = self.format.scheme
        self.zero_points = None
        if scheme is not None:
            stored = weights.q4_0(names) if scheme == q4_0.SCHEME else None
            quantized = stored or quantize(weight, self.format, names[0], weights.hessian)
            weights.errors[label] = quantized.relative_error
            if self.format.precision == "int8":
                self.weight = weights.parameter(signed_columns(quantized))
                self.scale = weights.parameter(quantized.scales[:, 0])
            else:
                self.weight = weights.parameter(quantized.packed)
                self.scale = weights.parameter(half_scales(quantized))
                if quantized.zero_points is not None:
                    self.zero_points = weights.parameter(quantized.zero_points)
        elif self.format.precision == "fp16":
            half = to_half(weight)
            weights.errors[label] = relative_error(half, weight)
            self.weight = weights.parameter(half.T)
        else:
            self.weight = weights.parameter(weight.T)
        self.bias = None
        biased = [bias] * len(names) if isinstance(bias, bool) else list(bias)
        if any(biased):
            vectors = [
                weights.read(f"{name}.bias", size) if given else np.zeros(size, np.float32)
                for (name, size), given in zip(parts, biased, strict=True)
            ]
            self.bias = weights.parameter(_stacked(vectors))

    @property
    def products(self) -> list[tuple[Any, tuple[str, ...]]]:
        """Constant that this module multiplies by, with its canonical names."""
        return [(self.weight, self.names)]

    def forward(self, op: Any, x: Any) -> Any:
        if self.format.precision == "int8":
            if self.format.activations == "token":
                return self._by_token(op, x)
            return op.DynamicQuantizeMatMul(
                x, self.weight, self.scale, None, self.bias, _domain=CONTRIB
            )
        if self.format.precision in BLOCK_BITS:
            return op.MatMulNBits(
                x,
                self.weight,
                op.Cast(self.scale, to=FLOAT),
                self.zero_points,
                None,
                self.bias,
                K=self.in_size,
                N=self.out_size,
                bits=BLOCK_BITS[self.format.precision],
                block_size=self.format.block_size,
                accuracy_level=4,
                _domain=CONTRIB,
            )
        weight = self.weight
        if self.format.precision == "fp16":
            weight = op.Cast(weight, to=FLOAT)
        return self.dialect.product(op, x, weight, self.bias)

    def _by_token(self, op: Any, x: Any) -> Any:
        """A scale for each row of ``x``: rows are divided by their largest magnitude, so that the
        one scale that DynamicQuantizeMatMul chooses for all suits each, and multiplied by it after.

        That operator's zero point lies where the range asks for it: what an activation function
        made, almost all positive, gets up to twice as fine a step as zero point 128 would give.
        Cost on AVX2, as a ratio to one scale for the tensor (benchmarks/int8_matmul.py): 1.03 to
        1.09 for many rows, 1.1 for one. MatMulInteger with the scales outside takes 1.04 to 1.20,
        QuantizeLinear with MatMulIntegerToFloat 1.04 to 1.10; neither is more exact.
        """
        largest = op.Max(op.ReduceMax(op.Abs(x), [-1], keepdims=1), SMALLEST)
        product = op.DynamicQuantizeMatMul(
            op.Div(x, largest), self.weight, self.scale, _domain=CONTRIB
        )
        product = op.Mul(product, largest)
        return product if self.bias is None else op.Add(product, self.bias)


class Joined(nn.Module):  # type: ignore[misc]
    """Layers that read the same input, as a product for each run of layers of one format, whose
    outputs follow each other. Arguments as of :class:`Linear`."""

    def __init__(
        self,
        weights: WeightFile,
        names: Sequence[str],
        in_size: int,
        out_sizes: Sequence[int],
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        parts = zip(names, out_sizes, strict=True)
        self._leaves = []
        for _, run in groupby(parts, key=lambda part: weights.recipe.format_of(part[0])):
            some, sizes = zip(*run, strict=True)
            self._leaves.append(some[0].rpartition(".")[2])
            setattr(self, self._leaves[-1], Linear(weights, some, in_size, sizes, bias=bias))

    def forward(self, op: Any, x: Any) -> Any:
        made = [getattr(self, leaf)(op, x) for leaf in self._leaves]
        return op.Concat(*made, axis=-1)


def joined(
    weights: WeightFile,
    names: Sequence[str],
    in_size: int,
    out_sizes: Sequence[int],
    *,
    bias: bool,
) -> Linear | Joined:
    """Return one product for all layers where the recipe gives them one format, else several."""
    formats = {weights.recipe.format_of(name) for name in names}
    kind = Linear if len(formats) == 1 else Joined
    return kind(weights, names, in_size, out_sizes, bias=bias)


class LayerNorm(nn.Module):  # type: ignore[misc]
    """Layer normalisation over the last axis."""

    def __init__(self, weights: WeightFile, name: str, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon, self.dialect = epsilon, weights.dialect
        self.weight = weights.parameter(weights.read(f"{name}.weight", size))
        self.bias = weights.parameter(weights.read(f"{name}.bias", size))

    def forward(self, op: Any, x: Any) -> Any:
        return self.dialect.layer_norm(op, x, self.weight, self.bias, self.epsilon)


def to_grid(op: Any, tokens: Any, channels: int, grid: int) -> Any:
    """``(1, grid², channels)`` to ``(1, channels, grid, grid)``."""
    return op.Reshape(op.Transpose(tokens, perm=[0, 2, 1]), [1, channels, grid, grid])


def to_tokens(op: Any, hidden: Any, channels: int, tokens: int) -> Any:
    """``(1, channels, grid, grid)`` to ``(1, grid², channels)``."""
    return op.Transpose(op.Reshape(hidden, [1, channels, tokens]), perm=[0, 2, 1])


def _stacked(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
