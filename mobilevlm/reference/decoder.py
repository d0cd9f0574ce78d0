"""The language model: attention, MLP or experts, and the norms between, as the spec says.

With a spec's defaults it is Llama (Touvron et al. 2023): RMSNorm, rotary attention, SwiGLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.reference.experts import SparseMLP
from mobilevlm.reference.mlp import build_mlp
from mobilevlm.spec import DecoderSpec


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def build_norm(spec: DecoderSpec) -> nn.Module:
    """The kind of norm that the spec names."""
    if spec.norm == "rms":
        return RMSNorm(spec.hidden_size, spec.norm_eps)
    return nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)


def rotary_tables(spec: DecoderSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(…, length, rotary_channels / 2)`` of integer positions ``(…, length)``."""
    channels = spec.rotary_channels
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / spec.rope_theta ** (exponent / channels)
    angle = (positions.float() / spec.rope_scaling)[..., None] * frequency
    return angle.cos(), angle.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + rotary_channels / 2) of ``(…, heads, length, head_dim)``; channels
    beyond them stay as they are."""
    half = cos.shape[-1]
    first, second = states[..., :half], states[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, states[..., 2 * half :]], dim=-1)


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.num_heads, self.num_kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        heads, kv_heads = self.num_heads * spec.head_dim, self.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, heads, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, kv_heads, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, kv_heads, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(heads, spec.hidden_size, bias=spec.o_bias)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, length, _ = hidden.shape
        query = self.q_proj(hidden).view(batch, length, self.num_heads, -1).transpose(1, 2)
        key = self.k_proj(hidden).view(batch, length, self.num_kv_heads, -1).transpose(1, 2)
        value = self.v_proj(hidden).view(batch, length, self.num_kv_heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            rotate(query, *rotary),
            rotate(key, *rotary),
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, spec: DecoderSpec, index: int) -> None:
        super().__init__()
        self.input_norm = build_norm(spec)
        self.attn = Attention(spec)
        if not spec.parallel_residual:
            self.post_attention_norm = build_norm(spec)
        self.mlp = SparseMLP(spec, index) if spec.num_experts(index) else build_mlp(spec)
        self.parallel = spec.parallel_residual

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        normed = self.input_norm(hidden)
        hidden = hidden + self.attn(normed, rotary, mask)
        if not self.parallel:
            normed = self.post_attention_norm(hidden)
        return hidden + self.mlp(normed)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embeddings ``(batch, length, hidden_size)`` to logits ``(batch, length, vocab_size)``."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.learned_positions:
            self.position_embedding = nn.Embedding(spec.context_length, spec.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, index) for index in range(spec.num_hidden_layers)
        )
        self.norm = build_norm(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=spec.lm_head_bias)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def begin(self, embeds: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embeddings ``(batch, length, hidden_size)`` as the first layer takes them."""
        if not self.spec.learned_positions:
            return embeds
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)
        return embeds + self.position_embedding(positions)  # type: ignore[no-any-return]

    def forward(
        self, embeds: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``positions``: ``(length,)`` or ``(batch, 1, length)``, 0, 1, 2 … when not given.
        ``mask``: bool ``(batch, 1, length, length)``, true where attended; causal when not given.
        """
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)
        rotary = rotary_tables(self.spec, positions)
        hidden = self.begin(embeds, positions)
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask)
        out: Tensor = self.lm_head(self.norm(hidden))
        return out

    @property
    def sparse_layers(self) -> dict[int, SparseMLP]:
        """The experts of each layer that has some; they know what the last pass chose."""
        return {
            index: layer.mlp
            for index, layer in enumerate(self.layers)
            if isinstance(layer.mlp, SparseMLP)
        }
