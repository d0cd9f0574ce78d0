"""Vision transformers, features of a chosen layer: CLIP's (Radford et al. 2021), and those that
differ from it in tokens and norms as the spec says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.audio_encoder import WhisperEncoder
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.reference.steps import State, Step, Stepped


class ClipAttention(nn.Module):
    def __init__(self, spec: TransformerEncoder | WhisperEncoder) -> None:
        super().__init__()
        self.num_heads, self.head_dim = spec.num_attention_heads, spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.k_proj = nn.Linear(spec.hidden_size, spec.hidden_size, bias=spec.key_bias)
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
    def __init__(self, spec: TransformerEncoder | WhisperEncoder) -> None:
        super().__init__()
        self.activation = spec.hidden_act
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(_activate(self.activation, self.fc1(hidden)))
        return out


class ClipLayer(nn.Module):
    def __init__(self, spec: TransformerEncoder | WhisperEncoder) -> None:
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


class ClipTower(Stepped):
    """Normalised pixels ``(batch, 3, height, width)`` to features ``(batch, num_features,
    hidden_size)``. Its steps give ``grid``, the rows and columns of patches, to later ones."""

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
        """Return the input of the first layer ``(batch, num_positions, hidden_size)``."""
        state = State(pixels)
        for step in (self._patches, self._add_positions):
            state = step(state)
        out: Tensor = self.pre_norm(state.hidden)
        return out

    def steps(self) -> Iterator[Step]:
        """Yield the embedding's steps, the layers, and the choice of features."""
        yield Step("patch_embedding", self.patch_embedding, self._patches)
        yield Step("position_embedding", self.position_embedding, self._add_positions)
        yield Step.of("pre_norm", self.pre_norm)
        for index, layer in enumerate(self.layers):
            yield Step.of(f"layers.{index}", layer)
        yield Step.of("post_norm", self.post_norm, self._features)

    def _patches(self, state: State) -> State:
        made: Tensor = self.patch_embedding(state.hidden)
        hidden = made.flatten(2).transpose(1, 2)
        if self.spec.class_token:
            token = self.class_embedding.expand(len(hidden), 1, -1)
            hidden = torch.cat([token, hidden], dim=1)
        return state.then(hidden, grid=torch.tensor(made.shape[2:]))

    def _add_positions(self, state: State) -> State:
        hidden = state.hidden
        if self.spec.resized_positions:
            return state.then(hidden + self._resized_positions(state.given["grid"]))
        places = torch.arange(hidden.shape[1]).to(hidden.device)
        return state.then(hidden + self.position_embedding(places))

    def _resized_positions(self, grid: Tensor) -> Tensor:
        """Positions of a grid of patches ``(rows · columns, hidden_size)``."""
        side = self.spec.grid
        table = self.position_embedding(torch.arange(side * side)).T.reshape(1, -1, side, side)
        size = (int(grid[0]), int(grid[1]))
        resized = F.interpolate(table, size, mode="bilinear", antialias=True, align_corners=False)
        return resized.flatten(2)[0].T

    def _features(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.post_norm(hidden)
        return out[:, self.spec.num_positions - self.spec.num_features :]


def _norm(spec: TransformerEncoder) -> nn.LayerNorm:
    return nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
