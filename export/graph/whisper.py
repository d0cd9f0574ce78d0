"""Graph of Whisper's encoder: log-mel frames to features."""

from __future__ import annotations

from typing import Any

from onnxscript import nn

from mobilevlm.audio_encoder import WhisperEncoder
from mobilevlm.export.graph.layers import LayerNorm
from mobilevlm.export.graph.vision import ClipLayer
from mobilevlm.export.graph.weight_file import WeightFile


class WhisperTower(nn.Module):  # type: ignore[misc]
    """``(1, bins, frames)`` to features ``(1, positions, hidden_size)``. Frames behind the sound
    are no part of a cut encoder's input, so that its work is as long as the sound is."""

    def __init__(self, weights: WeightFile, spec: WhisperEncoder) -> None:
        super().__init__()
        size = spec.hidden_size
        self.spec, self.dialect = spec, weights.dialect
        self.conv1 = Convolution(weights, "audio.conv1", spec.bins, spec, 1)
        self.conv2 = Convolution(weights, "audio.conv2", size, spec, 2)
        table = weights.read("audio.position_embedding.weight", spec.positions, size)
        self.positions = weights.parameter(table)
        self.layers = nn.ModuleList(
            [
                ClipLayer(weights, f"audio.layers.{index}", spec)
                for index in range(spec.num_hidden_layers)
            ]
        )
        self.post_norm = LayerNorm(weights, "audio.post_norm", size, spec.layer_norm_eps)

    def forward(self, op: Any, mel: Any) -> Any:
        hidden = mel
        for convolution in (self.conv1, self.conv2):
            made = convolution(op, hidden)
            hidden = self.dialect.gelu(op, made, approximate="none")
        hidden = op.Transpose(hidden, perm=[0, 2, 1])
        positions = op.Slice(self.positions, [0], op.Shape(hidden, start=1, end=2), [0])
        hidden = op.Add(hidden, positions)
        for layer in self.layers:
            hidden = layer(op, hidden)
        if self.spec.pooling > 1:
            hidden = self._pooled(op, hidden)
        return self.post_norm(op, hidden)

    def _pooled(self, op: Any, hidden: Any) -> Any:
        """Means of neighbouring positions; a rest is left out."""
        count, size = self.spec.pooling, self.spec.hidden_size
        whole = op.Mul(op.Div(op.Shape(hidden, start=1, end=2), [count]), [count])
        rows = op.Reshape(op.Slice(hidden, [0], whole, [1]), [1, -1, count, size])
        return op.ReduceMean(rows, [2], keepdims=0)


class Convolution(nn.Module):  # type: ignore[misc]
    """``(1, width, frames)`` to ``(1, hidden_size, frames / stride)``. Zeros stand before the
    frames, and unless the encoder is cut behind them."""

    def __init__(
        self, weights: WeightFile, name: str, width: int, spec: WhisperEncoder, stride: int
    ) -> None:
        super().__init__()
        self.pads, self.stride = [1, 0 if spec.cut else 1], stride
        kernel = weights.read(f"{name}.weight", spec.hidden_size, width, 3)
        self.weight = weights.parameter(kernel)
        self.bias = weights.parameter(weights.read(f"{name}.bias", spec.hidden_size))

    def forward(self, op: Any, frames: Any) -> Any:
        return op.Conv(
            frames, self.weight, self.bias, kernel_shape=[3], pads=self.pads, strides=[self.stride]
        )
