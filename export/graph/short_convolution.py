"""A short convolution between gates, in place of attention (LFM2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph.layers import Linear
from mobilevlm.export.graph.weight_file import WeightFile

END = np.iinfo(np.int64).max
"""End of a slice that goes on to the last row"""


def convolve(op: Any, inputs: Any, taps: Any, kernel: int, bias: Any | None = None) -> Any:
    """Return each channel of ``inputs (1, kernel - 1 + length, channels)`` convolved with its
    ``taps (kernel, channels)`` ``(1, length, channels)``.

    A sum of shifted products: a position has the same bits in a run of any length.
    """
    parts = op.Split(taps, axis=0, num_outputs=kernel, _outputs=kernel)
    total = bias
    for place, tap in enumerate(parts):
        part = op.Mul(op.Slice(inputs, [place], [place + 1 - kernel or END], [1]), tap)
        total = part if total is None else op.Add(total, part)
    return total


class ShortConvolution(nn.Module):  # type: ignore[misc]
    """``x (1, length, hidden_size)`` to the same, without the product behind it: ``in_proj`` makes
    two gates and values, each channel of ``gate · values`` is convolved with what came before, and
    the other gate multiplies the result.
    """

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        size, self.kernel = spec.hidden_size, spec.conv_kernel
        self.in_proj = Linear(weights, f"{name}.in_proj", size, 3 * size, bias=spec.conv_bias)
        taps = weights.read(f"{name}.conv.weight", size, 1, self.kernel)
        self.taps = weights.parameter(taps.T)
        self.bias = None
        if spec.conv_bias:
            self.bias = weights.parameter(weights.read(f"{name}.conv.bias", size))

    def forward(self, op: Any, x: Any, past: Any) -> tuple[Any, tuple[Any]]:
        """``past``: the inputs of the convolution before this run ``(1, kernel - 1, hidden_size)``;
        gives them and those of the run."""
        before, after, values = op.Split(self.in_proj(op, x), axis=-1, num_outputs=3, _outputs=3)
        inputs = op.Concat(past, op.Mul(before, values), axis=1)
        mixed = convolve(op, inputs, self.taps, self.kernel, self.bias)
        return op.Mul(after, mixed), (inputs,)
