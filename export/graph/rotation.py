"""Rotation of what enters the residual stream: rows of the embedding table and of encoders."""

from __future__ import annotations

from typing import Any

from onnxscript import nn

from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.quantize.rotation import rotation


class StreamRotation(nn.Module):  # type: ignore[misc]
    """``x (sequences, length, hidden_size)`` to the same, by the two small factors of the rotation
    (export/quantize/rotation.py) in float32: less to read and to compute than any linear layer."""

    def __init__(self, weights: WeightFile, size: int) -> None:
        super().__init__()
        matrix = rotation(size)
        self.shape = [0, -1, len(matrix.left), len(matrix.right)]
        self.size = size
        self.signs = weights.parameter(matrix.signs)
        self.left = weights.parameter(matrix.left.T)
        self.right = weights.parameter(matrix.right)

    def forward(self, op: Any, x: Any) -> Any:
        parts = op.MatMul(op.Reshape(op.Mul(x, self.signs), self.shape), self.right)
        return op.Reshape(op.MatMul(self.left, parts), [0, -1, self.size])
