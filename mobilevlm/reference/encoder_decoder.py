"""A language model with an encoder for the prompt (T5, Raffel et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.decoder_spec import DecoderSpec, RelativePositions
from mobilevlm.reference.decoder import build_norm
from mobilevlm.reference.mlp import build_mlp
from mobilevlm.reference.steps import State, Step, Stepped, steps_of


class SelfAttention(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec, width = spec, spec.num_attention_heads * spec.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(spec.hidden_size, width, bias=spec.qkv_bias) for _ in "qkv"
        )
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=spec.o_bias)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """``bias``: added to the scores ``(1, heads, length, length)``."""
        query, key, value = (
            _heads(self.spec, part(hidden)) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.o_proj(_attend(self.spec, query, key, value, bias))
        return out


class CrossAttention(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec, width = spec, spec.num_attention_heads * spec.head_dim
        self.query_proj = nn.Linear(spec.hidden_size, width, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=spec.o_bias)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = _heads(self.spec, self.query_proj(hidden))
        out: Tensor = self.o_proj(_attend(self.spec, query, key, value, None))
        return out


class CrossKeyValue(nn.Module):
    """Keys and values of the encoder's output for one layer of the decoder."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec, width = spec, spec.num_attention_heads * spec.head_dim
        self.key_proj = nn.Linear(spec.hidden_size, width, bias=spec.qkv_bias)
        self.value_proj = nn.Linear(spec.hidden_size, width, bias=spec.qkv_bias)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_proj(states), self.value_proj(states)
        return _heads(self.spec, key), _heads(self.spec, value)


class EncoderLayer(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_norm, self.attn = build_norm(spec), SelfAttention(spec)
        self.post_attention_norm, self.mlp = build_norm(spec), build_mlp(spec)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.input_norm(hidden), bias)
        return hidden + self.mlp(self.post_attention_norm(hidden))  # type: ignore[no-any-return]


class CrossLayer(EncoderLayer):
    """A layer of the decoder."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        self.cross_norm, self.cross = build_norm(spec), CrossAttention(spec)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, bias: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        hidden = hidden + self.attn(self.input_norm(hidden), bias)
        hidden = hidden + self.cross(self.cross_norm(hidden), key, value)
        return hidden + self.mlp(self.post_attention_norm(hidden))  # type: ignore[no-any-return]


class Encoder(Stepped):
    """Embeddings ``(batch, length, hidden_size)`` to states of the same shape."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        assert spec.relative_positions is not None
        self.positions = spec.relative_positions
        self.relative_bias = nn.Embedding(self.positions.num_buckets, spec.num_attention_heads)
        self.layers = nn.ModuleList(EncoderLayer(spec) for _ in range(spec.encoder_layers))
        self.norm = build_norm(spec)
        self.cross = nn.ModuleList(CrossKeyValue(spec) for _ in range(spec.num_hidden_layers))

    def steps(self) -> Iterator[Step]:
        """Yield the layers and the last norm."""
        yield Step("relative_bias", self.relative_bias, self._add_bias)
        for index, layer in enumerate(self.layers):
            yield Step(f"layers.{index}", layer, partial(_run_layer, layer, ("bias",)))
        yield Step.of("norm", self.norm)

    def _add_bias(self, state: State) -> State:
        buckets = relative_buckets(self.positions, state.hidden.shape[1], both_ways=True)
        return state.then(state.hidden, bias=self.relative_bias(buckets).movedim(-1, 0)[None])


class EncoderDecoder(Stepped):
    """Embeddings of a prompt and tokens of an answer to logits of the answer. The head follows the
    steps."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        assert spec.relative_positions is not None
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.encoder = Encoder(spec)
        positions = spec.relative_positions
        self.relative_bias = nn.Embedding(positions.num_buckets, spec.num_attention_heads)
        self.layers = nn.ModuleList(CrossLayer(spec) for _ in range(spec.num_hidden_layers))
        self.norm = build_norm(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=spec.lm_head_bias)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def steps(self) -> Iterator[Step]:
        """Yield the encoder's steps, then those of the decoder, which read ``answer``: ids
        ``(batch, tokens)``, the start token first."""
        yield from steps_of("encoder", self.encoder)
        yield Step("embed_tokens", self.embed_tokens, self._begin_answer)
        yield Step("relative_bias", self.relative_bias, self._add_bias)
        for index, (layer, cross) in enumerate(zip(self.layers, self.encoder.cross, strict=True)):
            yield Step(f"encoder.cross.{index}", cross, partial(_add_keys, cross))
            names = ("bias", "key", "value")
            yield Step(f"layers.{index}", layer, partial(_run_layer, layer, names))
        yield Step.of("norm", self.norm)

    def _begin_answer(self, state: State) -> State:
        return state.then(self.embed_tokens(state.given["answer"]), source=state.hidden)

    def _add_bias(self, state: State) -> State:
        assert self.spec.relative_positions is not None
        count = state.hidden.shape[1]
        buckets = relative_buckets(self.spec.relative_positions, count, both_ways=False)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        bias = self.relative_bias(buckets).movedim(-1, 0)[None]
        return state.then(state.hidden, bias=bias.masked_fill(later.to(bias.device), -math.inf))

    def start(self, embeds: Tensor) -> State:
        """Return the state of a prompt ``(batch, length, hidden_size)``."""
        return State(embeds)

    def answered(self, prompt: State, answer: Sequence[int]) -> State:
        """Return the state of one prompt and its answer before the first step."""
        return State(prompt.hidden, {"answer": torch.tensor([[self.spec.start_token_id, *answer]])})

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(…, vocab_size)`` of what the steps give ``(…, hidden_size)``."""
        out: Tensor = self.lm_head(hidden)
        return out


def _run_layer(layer: nn.Module, names: tuple[str, ...], state: State) -> State:
    return state.then(layer(state.hidden, *(state.given[name] for name in names)))


def _add_keys(cross: nn.Module, state: State) -> State:
    key, value = cross(state.given["source"])
    return state.then(state.hidden, key=key, value=value)


def relative_buckets(spec: RelativePositions, length: int, both_ways: bool) -> Tensor:
    """``(queries, keys)``: one bucket for each small distance, then ever more distances to each.
    ``both_ways``: later keys have the second half of the buckets; else none of their own
    (``T5Attention._relative_position_bucket``)."""
    places = torch.arange(length)
    distance = places[None, :] - places[:, None]
    buckets = spec.num_buckets // 2 if both_ways else spec.num_buckets
    base = (distance > 0) * buckets if both_ways else torch.zeros_like(distance)
    distance = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(spec.max_distance / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return base + torch.where(distance < exact, distance, far)


def _heads(spec: DecoderSpec, states: Tensor) -> Tensor:
    return states.view(*states.shape[:2], spec.num_attention_heads, -1).transpose(1, 2)


def _attend(
    spec: DecoderSpec, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=spec.score_scale
    )
    return mixed.transpose(1, 2).flatten(2)
