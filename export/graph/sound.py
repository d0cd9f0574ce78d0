"""The audio stage: log-mel frames to rows for the decoder, encoder and connector in one graph."""

from __future__ import annotations

from typing import Any

from onnxscript import nn

from mobilevlm.audio_encoder import ConformerEncoder, WhisperEncoder
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.export.graph.conformer import ConformerTower
from mobilevlm.export.graph.projectors import mlp_linears, run_mlp
from mobilevlm.export.graph.qformer import QFormerProjector
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.graph.whisper import WhisperTower
from mobilevlm.spec import ModelSpec


class AudioStage(nn.Module):  # type: ignore[misc]
    """float32 ``(1, bins, frames)`` to rows ``(1, rows, hidden_size)`` and the encoder's features
    ``(1, num_features, encoder hidden_size)``."""

    def __init__(self, weights: WeightFile, spec: ModelSpec) -> None:
        super().__init__("audio")
        encoder, connector = spec.audio.encoder, spec.audio.connector
        if isinstance(encoder, WhisperEncoder):
            self.tower: nn.Module = WhisperTower(weights, encoder)
        else:
            assert isinstance(encoder, ConformerEncoder)
            self.tower = ConformerTower(weights, encoder)
        between = QFormerProjector if connector.qformer is not None else StackProjector
        self.projector = between(weights, connector)

    def forward(self, op: Any, mel: Any) -> tuple[Any, Any]:
        features = self.tower(op, mel)
        return self.projector(op, features), features


class StackProjector(nn.Module):  # type: ignore[misc]
    """Neighbouring features as one vector each, and Linears with exact GELU between."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        super().__init__()
        self.spec, self.dialect = spec, weights.dialect
        self.mlp = mlp_linears(weights, spec)

    def forward(self, op: Any, features: Any) -> Any:
        if self.spec.factor > 1:
            features = op.Reshape(features, [1, -1, self.spec.mlp_sizes[0]])
        return run_mlp(op, self.mlp, features, self.dialect)
