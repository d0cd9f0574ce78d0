"""Q-Former: learned queries that read an image's features (BLIP-2, Li et al. 2023), and the
instruction too (InstructBLIP, Dai et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.connector_spec import QFormerSpec
from mobilevlm.reference.steps import State, Step, Stepped


class SelfAttention(nn.Module):
    def __init__(self, spec: QFormerSpec) -> None:
        super().__init__()
        self.num_heads = spec.num_attention_heads
        self.q_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.k_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.v_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.out_proj = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        out: Tensor = self.out_proj(_attend(query, key, value, self.num_heads))
        return out


class CrossAttention(nn.Module):
    def __init__(self, spec: QFormerSpec, source_size: int) -> None:
        super().__init__()
        self.num_heads = spec.num_attention_heads
        self.query_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.key_proj = nn.Linear(source_size, spec.hidden_size)
        self.value_proj = nn.Linear(source_size, spec.hidden_size)
        self.out_proj = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        query, key, value = self.query_proj(hidden), self.key_proj(source), self.value_proj(source)
        out: Tensor = self.out_proj(_attend(query, key, value, self.num_heads))
        return out


class FeedForward(nn.Module):
    def __init__(self, spec: QFormerSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(hidden)))
        return out


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries, and a feed-forward of
    its own for each; a norm behind every sum."""

    def __init__(self, spec: QFormerSpec, index: int, source_size: int) -> None:
        super().__init__()
        self.num_queries = spec.num_queries
        self.has_cross, self.has_text = spec.has_cross_attention(index), spec.has_text(index)
        self.attn, self.attn_norm = SelfAttention(spec), _norm(spec)
        if self.has_cross:
            self.cross, self.cross_norm = CrossAttention(spec, source_size), _norm(spec)
        self.mlp, self.mlp_norm = FeedForward(spec), _norm(spec)
        if self.has_text:
            self.text_mlp, self.text_mlp_norm = FeedForward(spec), _norm(spec)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        hidden = self.attn_norm(hidden + self.attn(hidden))
        queries, text = hidden[:, : self.num_queries], hidden[:, self.num_queries :]
        if self.has_cross:
            queries = self.cross_norm(queries + self.cross(queries, source))
        queries = self.mlp_norm(queries + self.mlp(queries))
        if not self.has_text:
            return queries  # type: ignore[no-any-return]
        text = self.text_mlp_norm(text + self.text_mlp(text))
        return torch.cat([queries, text], dim=1)


class QFormer(Stepped):
    """Features ``(batch, num_features, source_size)`` to ``(batch, num_queries, hidden_size)``.

    With a vocabulary it also reads ``instruction_ids`` ``(length,)``, the same for a whole batch.
    """

    def __init__(self, spec: QFormerSpec, source_size: int) -> None:
        super().__init__()
        self.reads_text = spec.vocab_size > 0
        self.query_tokens = nn.Parameter(torch.zeros(spec.num_queries, spec.hidden_size))
        if self.reads_text:
            self.word_embedding = nn.Embedding(spec.vocab_size, spec.hidden_size)
            self.position_embedding = nn.Embedding(spec.max_positions, spec.hidden_size)
        self.norm = _norm(spec)
        self.layers = nn.ModuleList(
            QFormerLayer(spec, index, source_size) for index in range(spec.num_hidden_layers)
        )

    def steps(self) -> Iterator[Step]:
        """Yield the text's embedding, the norm before the layers, and the layers."""
        if self.reads_text:
            yield Step("word_embedding", self.word_embedding, self._embed_text)
            yield Step("position_embedding", self.position_embedding, self._add_positions)
        yield Step("norm", self.norm, self._begin)
        for index, layer in enumerate(self.layers):
            yield Step(f"layers.{index}", layer, partial(_run_layer, layer))

    def _embed_text(self, state: State) -> State:
        return state.then(state.hidden, text=self.word_embedding(state.given["instruction_ids"]))

    def _add_positions(self, state: State) -> State:
        text = state.given["text"]
        places = torch.arange(len(text), device=text.device)
        return state.then(state.hidden, text=text + self.position_embedding(places))

    def _begin(self, state: State) -> State:
        hidden: Tensor = self.query_tokens
        if self.reads_text:
            hidden = torch.cat([hidden, state.given["text"]])
        features = state.hidden
        return state.then(self.norm(hidden).expand(len(features), -1, -1), features=features)


def _run_layer(layer: nn.Module, state: State) -> State:
    return state.then(layer(state.hidden, state.given["features"]))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    query, key, value = (
        part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _norm(spec: QFormerSpec) -> nn.LayerNorm:
    return nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
