"""A Conformer encoder (Gulati et al. 2020) as Granite Speech has it: attention inside blocks of
frames with vectors for distances (Shaw et al. 2018), and the guess of a CTC head added half-way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.audio_encoder import ConformerEncoder
from mobilevlm.reference.steps import Step, Stepped


class HalfMLP(nn.Module):
    """Half of what an MLP with SiLU makes."""

    def __init__(self, spec: ConformerEncoder) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = 0.5 * self.fc2(F.silu(self.fc1(self.norm(hidden))))
        return out


class BlockAttention(nn.Module):
    """Attention of ``(1, frames, hidden_size)`` inside blocks."""

    def __init__(self, spec: ConformerEncoder) -> None:
        super().__init__()
        self.spec, wide = spec, spec.num_attention_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, wide, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, wide, bias=False)
        self.out_proj = nn.Linear(wide, spec.hidden_size)
        self.distances = nn.Embedding(2 * spec.distances + 1, spec.head_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        block, length = self.spec.block, hidden.shape[1]
        padded = F.pad(hidden, (0, 0, 0, -length % block))
        query, key, value = (
            proj(padded).view(-1, block, self.spec.num_attention_heads, self.spec.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        places = torch.arange(block)
        apart = (places[:, None] - places).clamp(-self.spec.distances, self.spec.distances)
        vectors = self.distances(apart + self.spec.distances)  # (block, block, head_dim)
        scores = torch.einsum("bihd,bjhd->bhij", query, key)
        scores = (scores + torch.einsum("bihd,ijd->bhij", query, vectors)) * (
            self.spec.head_dim**-0.5
        )
        exists = torch.arange(padded.shape[1]).view(-1, 1, 1, block) < length
        scores = scores.masked_fill(~exists, -torch.inf)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)
        out: Tensor = self.out_proj(mixed.reshape(1, padded.shape[1], -1)[:, :length])
        return out


class ConvolutionModule(nn.Module):
    """A gate, a convolution of single channels, a norm by stored statistics, SiLU."""

    def __init__(self, spec: ConformerEncoder) -> None:
        super().__init__()
        size, self.kernel = spec.conv_size, spec.conv_kernel
        self.norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.up = nn.Linear(spec.hidden_size, 2 * size)
        self.depthwise = nn.Conv1d(size, size, spec.conv_kernel, groups=size, bias=False)
        self.batch_norm = BatchNorm(size, spec.norm_eps)
        self.down = nn.Linear(size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = F.glu(self.up(self.norm(hidden))).transpose(1, 2)
        before = self.kernel // 2
        wide = self.depthwise(F.pad(wide, (before, self.kernel - 1 - before)))
        out: Tensor = self.down(F.silu(self.batch_norm(wide)).transpose(1, 2))
        return out


class BatchNorm(nn.Module):
    """A batch norm ``(batch, size, length)`` by its stored mean and variance."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.mean = nn.Parameter(torch.zeros(size))
        self.variance = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.batch_norm(
            hidden, self.mean, self.variance, self.weight, self.bias, eps=self.epsilon
        )


class ConformerLayer(nn.Module):
    def __init__(self, spec: ConformerEncoder) -> None:
        super().__init__()
        self.ff1 = HalfMLP(spec)
        self.attn_norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.attn = BlockAttention(spec)
        self.conv = ConvolutionModule(spec)
        self.ff2 = HalfMLP(spec)
        self.norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.ff1(hidden)
        hidden = hidden + self.attn(self.attn_norm(hidden))
        hidden = hidden + self.conv(hidden)
        hidden = hidden + self.ff2(hidden)
        out: Tensor = self.norm(hidden)
        return out


class Guess(nn.Module):
    """Probabilities of a CTC head, as a vector that is added."""

    def __init__(self, spec: ConformerEncoder) -> None:
        super().__init__()
        self.head = nn.Linear(spec.hidden_size, spec.guesses)
        self.back = nn.Linear(spec.guesses, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.back(self.head(hidden).softmax(-1))
        return out


class ConformerTower(Stepped):
    """Joined log-mel frames ``(1, bins, frames)`` to features ``(1, frames, hidden_size)``."""

    def __init__(self, spec: ConformerEncoder) -> None:
        super().__init__()
        self.spec = spec
        self.input = nn.Linear(spec.bins, spec.hidden_size)
        self.layers = nn.ModuleList(ConformerLayer(spec) for _ in range(spec.num_hidden_layers))
        self.guess = Guess(spec)

    def steps(self) -> Iterator[Step]:
        """Yield the first product, the layers, and behind half of them the guess."""
        yield Step.of("input", self.input, lambda mel: self.input(mel.transpose(1, 2)))
        for index, layer in enumerate(self.layers):
            yield Step.of(f"layers.{index}", layer)
            if index == self.spec.guess_layer:
                yield Step.of("guess", self.guess)
