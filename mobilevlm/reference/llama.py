"""Llama decoder (Touvron et al. 2023): RMSNorm, rotary attention, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.spec import DecoderSpec


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def rotary_tables(spec: DecoderSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(…, length, head_dim / 2)`` for integer positions ``(…, length)``."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / spec.rope_theta ** (exponent / spec.head_dim)
    angle = (positions.float() / spec.rope_scaling)[..., None] * frequency
    return angle.cos(), angle.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + head_dim / 2) of ``(…, heads, length, head_dim)``."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LlamaAttention(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.num_heads, self.num_kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        heads, kv_heads = self.num_heads * spec.head_dim, self.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, spec.hidden_size, bias=False)

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


class LlamaMLP(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class LlamaLayer(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.attn = LlamaAttention(spec)
        self.post_attention_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = LlamaMLP(spec)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        hidden = hidden + self.attn(self.input_norm(hidden), rotary, mask)
        return hidden + self.mlp(self.post_attention_norm(hidden))  # type: ignore[no-any-return]


class LlamaDecoder(nn.Module):
    """Embeddings ``(batch, length, hidden_size)`` to logits ``(batch, length, vocab_size)``."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(spec) for _ in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, embeds: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``positions``: ``(length,)`` or ``(batch, 1, length)``, 0, 1, 2 … when not given.
        ``mask``: bool ``(batch, 1, length, length)``, true where attended; causal when not given.
        """
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)
        rotary = rotary_tables(self.spec, positions)
        hidden = embeds
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask)
        out: Tensor = self.lm_head(self.norm(hidden))
        return out
