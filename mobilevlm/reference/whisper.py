"""Whisper's encoder (Radford et al. 2022, section 2.2), as a model that hears has it in front of a
language model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.audio_encoder import WhisperEncoder
from mobilevlm.reference.clip import ClipLayer
from mobilevlm.reference.steps import Step, Stepped


class WhisperTower(Stepped):
    """Log-mel frames ``(batch, bins, frames)`` to features ``(batch, positions, hidden_size)``."""

    def __init__(self, spec: WhisperEncoder) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv1d(spec.bins, spec.hidden_size, 3)
        self.conv2 = nn.Conv1d(spec.hidden_size, spec.hidden_size, 3, stride=2)
        self.position_embedding = nn.Embedding(spec.positions, spec.hidden_size)
        self.layers = nn.ModuleList(ClipLayer(spec) for _ in range(spec.num_hidden_layers))
        self.post_norm = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)

    def steps(self) -> Iterator[Step]:
        """Yield the convolutions, the positions, the layers, and the norm behind the pooling."""
        yield Step.of("conv1", self.conv1, lambda frames: self._convolve(self.conv1, frames))
        yield Step.of("conv2", self.conv2, lambda frames: self._convolve(self.conv2, frames))
        yield Step.of("position_embedding", self.position_embedding, self._add_positions)
        for index, layer in enumerate(self.layers):
            yield Step.of(f"layers.{index}", layer)
        yield Step.of("post_norm", self.post_norm, self._features)

    def _convolve(self, conv: nn.Module, frames: Tensor) -> Tensor:
        behind = 0 if self.spec.cut else 1
        return F.gelu(conv(F.pad(frames, (1, behind))))

    def _add_positions(self, frames: Tensor) -> Tensor:
        places = torch.arange(frames.shape[2])
        out: Tensor = frames.transpose(1, 2) + self.position_embedding(places)
        return out

    def _features(self, hidden: Tensor) -> Tensor:
        if self.spec.pooling > 1:
            hidden = F.avg_pool1d(hidden.transpose(1, 2), self.spec.pooling).transpose(1, 2)
        out: Tensor = self.post_norm(hidden)
        return out
