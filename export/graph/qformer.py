"""The Q-Former: tower features, and an instruction where it reads one, to its queries' states.

Exact rewrites: what the queries are before the first layer is a constant; of the last layer only
the queries' states are computed behind self-attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import nn

from mobilevlm.connector_spec import ConnectorSpec, QFormerSpec
from mobilevlm.export.graph.layers import FLOAT, LayerNorm, Linear
from mobilevlm.export.graph.weight_file import WeightFile


class QFormerProjector(nn.Module):  # type: ignore[misc]
    """``(1, num_features, in_size)`` to ``(1, num_tokens, out_size)``; with windows these are a
    batch, and their tokens one behind the other."""

    def __init__(self, weights: WeightFile, spec: ConnectorSpec) -> None:
        super().__init__()
        assert spec.qformer is not None
        self.former = former = spec.qformer
        queries = weights.read("projector.query_tokens", former.num_queries, former.hidden_size)
        self.queries = weights.parameter(_normed(weights, former, queries)[None])
        self.embedding = None
        if spec.reads_text:
            self.embedding = TextEmbedding(weights, former)
        self.layers = nn.ModuleList(
            [
                QFormerLayer(weights, index, former, spec.in_size)
                for index in range(former.num_hidden_layers)
            ]
        )
        self.mlp = nn.ModuleList([Linear(weights, "projector.mlp.0", *spec.mlp_sizes)])

    def forward(self, op: Any, features: Any, instruction: Any | None = None) -> Any:
        queries, text = op.Identity(self.queries), None
        if self.embedding is not None:
            text = self.embedding(op, instruction)
        if self.former.window:
            queries, features = self._in_windows(op, queries, features)
        for layer in self.layers:
            queries, text = layer(op, queries, text, features)
        if self.former.window:
            queries = op.Reshape(queries, [1, -1, self.former.hidden_size])
        return self.mlp[0](op, queries)

    def _in_windows(self, op: Any, queries: Any, features: Any) -> tuple[Any, Any]:
        """The queries for each window, and the features of each, the last filled with zeros."""
        window, length = [self.former.window], op.Shape(features, start=1, end=2)
        count = op.Div(op.Add(length, [self.former.window - 1]), window)
        missing = op.Sub(op.Mul(count, window), length)
        padded = op.Pad(features, op.Concat([0, 0, 0, 0], missing, [0], axis=0))
        size = op.Shape(features, start=2)
        parts = op.Reshape(padded, op.Concat(count, window, size, axis=0))
        return op.Expand(queries, op.Concat(count, [1, 1], axis=0)), parts


class TextEmbedding(nn.Module):  # type: ignore[misc]
    """Ids ``(1, length)`` to ``(1, length, hidden_size)``: words, positions, norm."""

    def __init__(self, weights: WeightFile, spec: QFormerSpec) -> None:
        super().__init__()
        size = spec.hidden_size
        words = weights.read("projector.word_embedding.weight", spec.vocab_size, size)
        places = weights.read("projector.position_embedding.weight", spec.max_positions, size)
        half = weights.recipe.embeddings == "fp16"
        self.words = weights.parameter(words.astype(np.float16) if half else words)
        self.positions = weights.parameter(places)
        self.half = half
        self.norm = LayerNorm(weights, "projector.norm", size, spec.layer_norm_eps)

    def forward(self, op: Any, ids: Any) -> Any:
        words = op.Gather(self.words, ids)
        if self.half:
            words = op.Cast(words, to=FLOAT)
        places = op.Slice(self.positions, [0], op.Shape(ids, start=1, end=2), [0])
        return self.norm(op, op.Add(words, places))


class QFormerLayer(nn.Module):  # type: ignore[misc]
    """Takes and gives the states of the queries and of the text (none: there is none)."""

    def __init__(
        self,
        weights: WeightFile,
        index: int,
        spec: QFormerSpec,
        source_size: int,
    ) -> None:
        super().__init__()
        name, norm = f"projector.layers.{index}", (spec.hidden_size, spec.layer_norm_eps)
        self.spec = spec
        self.attn = SelfAttention(weights, f"{name}.attn", spec)
        self.attn_norm = LayerNorm(weights, f"{name}.attn_norm", *norm)
        self.cross = self.text_mlp = None
        if spec.has_cross_attention(index):
            self.cross = CrossAttention(weights, f"{name}.cross", spec, source_size)
            self.cross_norm = LayerNorm(weights, f"{name}.cross_norm", *norm)
        self.mlp = FeedForward(weights, f"{name}.mlp", spec)
        self.mlp_norm = LayerNorm(weights, f"{name}.mlp_norm", *norm)
        if spec.has_text(index):
            self.text_mlp = FeedForward(weights, f"{name}.text_mlp", spec)
            self.text_mlp_norm = LayerNorm(weights, f"{name}.text_mlp_norm", *norm)

    def forward(self, op: Any, queries: Any, text: Any | None, source: Any) -> tuple[Any, Any]:
        count = self.spec.num_queries
        hidden = queries if text is None else op.Concat(queries, text, axis=1)
        last = text is not None and self.text_mlp is None
        mixed = self.attn(op, hidden, queries if last else hidden)
        hidden = self.attn_norm(op, op.Add(queries if last else hidden, mixed))
        queries = hidden
        if self.text_mlp is not None:
            queries = op.Slice(hidden, [0], [count], [1])
            text = op.Slice(hidden, [count], [2**31], [1])
            text = self.text_mlp_norm(op, op.Add(text, self.text_mlp(op, text)))
        if self.cross is not None:
            queries = self.cross_norm(op, op.Add(queries, self.cross(op, queries, source)))
        return self.mlp_norm(op, op.Add(queries, self.mlp(op, queries))), text


class SelfAttention(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: QFormerSpec) -> None:
        super().__init__()
        self.spec, self.dialect, size = spec, weights.dialect, spec.hidden_size
        parts = [f"{name}.{part}_proj" for part in "qkv"]
        self.qkv = Linear(weights, parts, size, [size] * 3)
        self.out_proj = Linear(weights, f"{name}.out_proj", size, size)

    def forward(self, op: Any, hidden: Any, readers: Any) -> Any:
        """``readers``: the first of ``hidden``, or all."""
        query, key, value = op.Split(self.qkv(op, hidden), axis=-1, num_outputs=3, _outputs=3)
        if readers is not hidden:
            query = op.Slice(query, [0], [self.spec.num_queries], [1])
        heads, head_dim = self.spec.num_attention_heads, self.spec.head_dim
        return self.out_proj(op, self.dialect.attention(op, query, key, value, heads, head_dim))


class CrossAttention(nn.Module):  # type: ignore[misc]
    def __init__(
        self,
        weights: WeightFile,
        name: str,
        spec: QFormerSpec,
        source_size: int,
    ) -> None:
        super().__init__()
        self.spec, self.dialect, size = spec, weights.dialect, spec.hidden_size
        self.query_proj = Linear(weights, f"{name}.query_proj", size, size)
        parts = [f"{name}.{part}_proj" for part in ("key", "value")]
        self.key_value = Linear(weights, parts, source_size, [size] * 2)
        self.out_proj = Linear(weights, f"{name}.out_proj", size, size)

    def forward(self, op: Any, hidden: Any, source: Any) -> Any:
        key, value = op.Split(self.key_value(op, source), axis=-1, num_outputs=2, _outputs=2)
        query = self.query_proj(op, hidden)
        heads, head_dim = self.spec.num_attention_heads, self.spec.head_dim
        return self.out_proj(op, self.dialect.attention(op, query, key, value, heads, head_dim))


class FeedForward(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: QFormerSpec) -> None:
        super().__init__()
        size, wide, self.dialect = spec.hidden_size, spec.intermediate_size, weights.dialect
        self.fc1 = Linear(weights, f"{name}.fc1", size, wide)
        self.fc2 = Linear(weights, f"{name}.fc2", wide, size)

    def forward(self, op: Any, hidden: Any) -> Any:
        return self.fc2(op, self.dialect.gelu(op, self.fc1(op, hidden)))


def _normed(
    weights: WeightFile, spec: QFormerSpec, rows: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Layer normalisation of ``(rows, hidden_size)``, in float64."""
    exact = rows.astype(np.float64)
    centred = exact - exact.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + spec.layer_norm_eps)
    weight = weights.read("projector.norm.weight", spec.hidden_size)
    bias = weights.read("projector.norm.bias", spec.hidden_size)
    normed: NDArray[np.float32] = (centred / scale * weight + bias).astype(np.float32)
    return normed
