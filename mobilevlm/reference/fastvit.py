"""FastViTHD in torch (FastVLM, Vasu et al. 2024; FastViT, Vasu et al. 2023): maps of channels
``(batch, width, grid, grid)``, branches fused, layer scales and batch norms in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.image_encoder import ConvEncoder
from mobilevlm.reference.steps import Step, Stepped


class Stem(nn.Module):
    """Pixels ``(batch, 3, size, size)`` to a map of a quarter of the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.depthwise = _depthwise(width, width, 3, stride=2)
        self.pointwise = nn.Linear(width, width)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = F.gelu(self.depthwise(F.gelu(self.conv(pixels))))
        return F.gelu(_pointwise(self.pointwise, hidden))


class Downsample(nn.Module):
    """A map to one of half the size and another width."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.conv = _depthwise(in_width, width, 7, stride=2)
        self.pointwise = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.gelu(_pointwise(self.pointwise, F.gelu(self.conv(hidden))))


class ConvMLP(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.conv = _depthwise(width, width, 7)
        self.fc1 = nn.Linear(width, wide)
        self.fc2 = nn.Linear(wide, width)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.conv(hidden).permute(0, 2, 3, 1)
        out: Tensor = self.fc2(F.gelu(self.fc1(rows)))
        return out.permute(0, 3, 1, 2)


class MixerBlock(nn.Module):
    """A fused RepMixer, whose residual is in its weights, and an MLP."""

    def __init__(self, spec: ConvEncoder, stage: int) -> None:
        super().__init__()
        width = spec.widths[stage]
        self.mixer = _depthwise(width, width, 3)
        self.mlp = ConvMLP(width, spec.mlp_size(stage))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mixer(hidden)
        return hidden + self.mlp(hidden)  # type: ignore[no-any-return]


class MapAttention(nn.Module):
    """All positions ``(batch, length, width)`` attend to all."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, rows: Tensor) -> Tensor:
        query, key, value = (
            proj(rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class AttentionBlock(nn.Module):
    def __init__(self, spec: ConvEncoder, stage: int) -> None:
        super().__init__()
        width = spec.widths[stage]
        self.norm = nn.LayerNorm(width, eps=spec.layer_norm_eps)
        self.attn = MapAttention(width, spec.head_dim)
        self.mlp = ConvMLP(width, spec.mlp_size(stage))

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.attn(self.norm(hidden.flatten(2).transpose(1, 2)))
        hidden = hidden + rows.transpose(1, 2).unflatten(2, hidden.shape[2:])
        return hidden + self.mlp(hidden)  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Blocks at one resolution, and what comes before them."""

    def __init__(self, spec: ConvEncoder, stage: int) -> None:
        super().__init__()
        width, attends = spec.widths[stage], stage in spec.attention_stages
        if stage:
            self.downsample = Downsample(spec.widths[stage - 1], width)
        if attends:
            self.position = _depthwise(width, width, 7)
        block = AttentionBlock if attends else MixerBlock
        self.blocks = nn.ModuleList(block(spec, stage) for _ in range(spec.depths[stage]))


class Expansion(nn.Module):
    """The last map with more channels, each weighed by what all positions have in common
    (squeeze-and-excitation), as rows ``(batch, grid², channels)``."""

    def __init__(self, spec: ConvEncoder) -> None:
        super().__init__()
        self.conv = _depthwise(spec.widths[-1], spec.hidden_size, 3)
        self.squeeze = nn.Linear(spec.hidden_size, spec.squeeze_size)
        self.excite = nn.Linear(spec.squeeze_size, spec.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv(hidden)
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(hidden.mean((2, 3))))))
        return F.gelu(hidden * weights[..., None, None]).flatten(2).transpose(1, 2)


class FastVit(Stepped):
    """Normalised pixels ``(batch, 3, size, size)`` to features
    ``(batch, num_features, hidden_size)``."""

    def __init__(self, spec: ConvEncoder) -> None:
        super().__init__()
        self.stem = Stem(spec.widths[0])
        self.stages = nn.ModuleList(Stage(spec, stage) for stage in range(len(spec.widths)))
        self.expansion = Expansion(spec)

    def steps(self) -> Iterator[Step]:
        """Yield the stem, the parts of each stage, and the expansion."""
        yield Step.of("stem", self.stem)
        for index, stage in enumerate(self.stages):
            for name, part in stage.named_children():
                if name != "blocks":
                    yield Step.of(f"stages.{index}.{name}", part)
            blocks = stage.get_submodule("blocks").named_children()
            for number, block in blocks:
                yield Step.of(f"stages.{index}.blocks.{number}", block)
        yield Step.of("expansion", self.expansion)


def _depthwise(in_width: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution in which each channel that comes in has its own that go out."""
    return nn.Conv2d(in_width, width, kernel, stride, kernel // 2, groups=in_width)


def _pointwise(linear: nn.Module, hidden: Tensor) -> Tensor:
    out: Tensor = linear(hidden.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2)
