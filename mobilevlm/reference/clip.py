"""Vision transformers, features of a chosen layer: CLIP's (Radford et al. 2021), and those that
differ from it in tokens and norms as the spec says."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.spec import TransformerEncoder


class ClipAttention(nn.Module):
    def __init__(self, spec: TransformerEncoder) -> None:
        super().__init__()
        self.num_heads, self.head_dim = spec.num_attention_heads, spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.k_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.v_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.out_proj = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        query, key, value = (
            proj(hidden).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class ClipMLP(nn.Module):
    def __init__(self, spec: TransformerEncoder) -> None:
        super().__init__()
        self.activation = spec.hidden_act
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(_activate(self.activation, self.fc1(hidden)))
        return out


class ClipLayer(nn.Module):
    def __init__(self, spec: TransformerEncoder) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.attn = ClipAttention(spec)
        self.norm2 = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.mlp = ClipMLP(spec)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))  # type: ignore[no-any-return]


def _activate(name: str, hidden: Tensor) -> Tensor:
    if name == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate="tanh" if name == "gelu_tanh" else "none")


class ClipTower(nn.Module):
    """Normalised pixels ``(batch, 3, size, size)`` to features
    ``(batch, num_features, hidden_size)``."""

    def __init__(self, spec: TransformerEncoder) -> None:
        super().__init__()
        self.spec = spec
        if spec.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(spec.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, spec.hidden_size, spec.patch_size, stride=spec.patch_size, bias=spec.patch_bias
        )
        self.position_embedding = nn.Embedding(spec.num_positions, spec.hidden_size)
        self.pre_norm = _norm(spec) if spec.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(ClipLayer(spec) for _ in range(spec.num_hidden_layers))
        self.post_norm = _norm(spec) if spec.post_norm else nn.Identity()

    def embed(self, pixels: Tensor) -> Tensor:
        """Input of the first layer ``(batch, num_positions, hidden_size)``."""
        hidden = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if self.spec.class_token:
            token = self.class_embedding.expand(len(pixels), 1, -1)
            hidden = torch.cat([token, hidden], dim=1)
        hidden = hidden + self.position_embedding(torch.arange(hidden.shape[1]).to(hidden.device))
        out: Tensor = self.pre_norm(hidden)
        return out

    def features(self, state: Tensor) -> Tensor:
        """What the projector gets of the state after the last layer."""
        out: Tensor = self.post_norm(state)
        return out[:, self.spec.num_positions - self.spec.num_features :]

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.embed(pixels)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.features(hidden)


def _norm(spec: TransformerEncoder) -> nn.LayerNorm:
    return nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
