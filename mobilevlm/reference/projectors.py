"""Projectors: patch features ``(batch, num_patches, in_size)`` to visual tokens
``(batch, num_rows, out_size)``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.input_spec import ConnectorSpec
from mobilevlm.reference.qformer import QFormer
from mobilevlm.reference.steps import Step


class MLP(nn.ModuleList):
    """Linears with exact GELU between; one Linear is LLaVA's first projector."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__(nn.Linear(*sizes, bias=spec.bias) for sizes in pairwise(spec.mlp_sizes))

    def forward(self, hidden: Tensor) -> Tensor:
        for index, linear in enumerate(self):
            hidden = linear(hidden if index == 0 else F.gelu(hidden))
        return hidden


class MLPProjector(nn.Module):
    """``linear`` and ``mlpNx_gelu`` (LLaVA, Liu et al. 2023), MoE-LLaVA's ``pool_mlpNx_gelu``."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.grid, self.out_grid = spec.grid, spec.out_grid
        self.mlp = MLP(spec)
        self.newline = nn.Parameter(torch.zeros(spec.out_size)) if spec.newline else None

    def forward(self, features: Tensor) -> Tensor:
        if self.out_grid < self.grid:
            patches: Tensor = features.transpose(1, 2)
            patches = patches.reshape(*patches.shape[:2], self.grid, self.grid)
            features = F.avg_pool2d(patches, self.grid // self.out_grid).flatten(2).transpose(1, 2)
        out: Tensor = self.mlp(features)
        if self.newline is not None:
            out = torch.cat([out, self.newline.expand(len(out), 1, -1)], dim=1)
        return out


class DownsampleProjector(nn.Module):
    """``mlp_downsample`` (VILA, Lin et al. 2023): squares of patches as one vector each, norm, MLP.
    A grid that they do not fill is padded with zeros below and on the right."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.grid, self.factor, self.by_column = spec.grid, spec.factor, spec.order == "columns"
        self.norm = nn.LayerNorm(spec.mlp_sizes[0], eps=1e-5) if spec.norm else nn.Identity()
        self.mlp = MLP(spec)

    def forward(self, features: Tensor) -> Tensor:
        patches = features.view(len(features), self.grid, self.grid, -1)
        missing, step = -self.grid % self.factor, range(self.factor)
        patches = F.pad(patches, (0, 0, 0, missing, 0, missing))
        places = [
            patches[:, row :: self.factor, column :: self.factor] for row in step for column in step
        ]
        squares = torch.cat(places, dim=-1)
        if self.by_column:
            squares = squares.transpose(1, 2)
        out: Tensor = self.mlp(self.norm(squares.flatten(1, 2)))
        return out


class LDPv2Projector(nn.Module):
    """MLP, average pooling to 12 × 12, depthwise 3 × 3 with residual (MobileVLM V2, fig. 3)."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.grid, self.out_grid = spec.grid, spec.out_grid
        self.mlp = MLP(spec)
        self.peg = nn.Conv2d(spec.out_size, spec.out_size, 3, padding=1, groups=spec.out_size)

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = self.mlp(features).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        hidden = F.adaptive_avg_pool2d(hidden, self.out_grid)
        hidden = self.peg(hidden) + hidden
        return hidden.flatten(2).transpose(1, 2)


class InvertedResidual(nn.Module):
    """Depthwise 3 × 3, squeeze-and-excitation, pointwise; the norms are over channels."""

    def __init__(self, spec: ConnectorSpec, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        channels, squeezed = spec.out_size, spec.squeeze_size
        self.depthwise = nn.Conv2d(
            channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False
        )
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, hidden: Tensor) -> Tensor:
        out = F.hardswish(_channel_norm(self.norm1, self.depthwise(hidden)))
        gate = F.relu(self.squeeze(out.mean(dim=(2, 3), keepdim=True)))
        out = out * F.hardsigmoid(self.excite(gate))
        out = _channel_norm(self.norm2, self.pointwise(out))
        return out + hidden if self.residual else out


class LDPProjector(nn.Module):
    """MLP and two inverted-residual blocks, the second of stride 2 (MobileVLM, fig. 3)."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.grid = spec.grid
        self.mlp = MLP(spec)
        self.blocks = nn.ModuleList(InvertedResidual(spec, stride) for stride in (1, 2))

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = self.mlp(features).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.flatten(2).transpose(1, 2)


class QFormerProjector(QFormer):
    """A Q-Former and the Linear behind it (BLIP-2, Li et al. 2023; InstructBLIP, Dai et al.)."""

    def __init__(self, spec: ConnectorSpec) -> None:
        assert spec.qformer is not None
        super().__init__(spec.qformer, spec.in_size)
        self.mlp = MLP(spec)

    def steps(self) -> Iterator[Step]:
        """Yield the Q-Former's steps and the MLP."""
        yield from super().steps()
        yield Step.of("mlp", self.mlp)


def _channel_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    out: Tensor = norm(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return out


def build_projector(spec: ConnectorSpec) -> nn.Module:
    """The projector that the spec names."""
    kinds = {
        "mlp": MLPProjector,
        "ldp": LDPProjector,
        "ldpv2": LDPv2Projector,
        "mlp_downsample": DownsampleProjector,
        "qformer": QFormerProjector,
    }
    return kinds[spec.kind](spec)
