"""Projectors: patch features ``(batch, num_patches, in_size)`` to visual tokens
``(batch, num_rows, out_size)``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.reference.mlp import MLP
from mobilevlm.reference.native import MergerProjector, PoolProjector
from mobilevlm.reference.norms import RMSNorm
from mobilevlm.reference.qformer import QFormer
from mobilevlm.reference.steps import State, Step, Stepped


class MLPProjector(nn.Module):
    """``linear`` and ``mlpNx_gelu`` (LLaVA, Liu et al. 2023), MoE-LLaVA's ``pool_mlpNx_gelu``."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.grid, self.out_grid = spec.grid, spec.out_grid
        self.norm: nn.Module = nn.Identity()
        if spec.pool_norm_eps is not None:
            self.norm = RMSNorm(spec.in_size, spec.pool_norm_eps)
        self.mlp = MLP(spec)
        self.newline = nn.Parameter(torch.zeros(spec.out_size)) if spec.newline else None

    def forward(self, features: Tensor) -> Tensor:
        if self.out_grid < self.grid:
            patches: Tensor = features.transpose(1, 2)
            patches = patches.reshape(*patches.shape[:2], self.grid, self.grid)
            features = F.avg_pool2d(patches, self.grid // self.out_grid).flatten(2).transpose(1, 2)
        out: Tensor = self.mlp(self.norm(features))
        if self.newline is not None:
            out = torch.cat([out, self.newline.expand(len(out), 1, -1)], dim=1)
        return out


class DownsampleProjector(Stepped):
    """``mlp_downsample`` (VILA, Lin et al. 2023): squares of patches as one vector each, norm, MLP.
    A grid that they do not fill is padded with zeros below and on the right."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.grid, self.factor, self.by_column = spec.grid, spec.factor, spec.order == "columns"
        self.norm = nn.LayerNorm(spec.mlp_sizes[0], eps=1e-5) if spec.norm else nn.Identity()
        self.mlp = MLP(spec)

    def steps(self) -> Iterator[Step]:
        """Yield the norm of the joined patches, and the MLP."""
        yield Step("norm", self.norm, self._joined)
        yield Step.of("mlp", self.mlp)

    def _joined(self, state: State) -> State:
        features = state.hidden
        grid = state.given.get("grid", torch.tensor([self.grid, self.grid])).tolist()
        patches = features.view(len(features), *grid, -1)
        down, across = (-edge % self.factor for edge in grid)
        patches, step = F.pad(patches, (0, 0, 0, across, 0, down)), range(self.factor)
        places = [
            patches[:, row :: self.factor, column :: self.factor] for row in step for column in step
        ]
        squares = torch.cat(places, dim=-1)
        if self.by_column:
            squares = squares.transpose(1, 2)
        return state.then(self.norm(squares.flatten(1, 2)))


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
    """A Q-Former and the Linear behind it (BLIP-2, Li et al. 2023; InstructBLIP, Dai et al.), in
    some for each window of the features (Granite Speech)."""

    def __init__(self, spec: ConnectorSpec) -> None:
        assert spec.qformer is not None
        super().__init__(spec.qformer, spec.in_size)
        self.window = spec.qformer.window
        self.mlp = MLP(spec)

    def steps(self) -> Iterator[Step]:
        """Yield the Q-Former's steps and the MLP."""
        first, *others = super().steps()
        yield first if not self.window else replace(first, run=lambda x: first.run(self._cut(x)))
        yield from others
        yield Step.of("mlp", self.mlp, self._rows if self.window else None)

    def _cut(self, state: State) -> State:
        """Features as a batch of windows, the last one filled with zeros."""
        [features] = state.hidden
        windows = F.pad(features, (0, 0, 0, -len(features) % self.window))
        return state.then(windows.reshape(-1, self.window, windows.shape[1]))

    def _rows(self, queries: Tensor) -> Tensor:
        out: Tensor = self.mlp(queries.flatten(0, 1)[None])
        return out


class StackProjector(nn.Module):
    """Neighbouring features of sound as one vector each, and an MLP (Voxtral); of one feature alone
    Qwen2-Audio's linear projector."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.wide = spec.mlp_sizes[0]
        self.mlp = MLP(spec)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.mlp(features.reshape(len(features), -1, self.wide))
        return out


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
        "merger": MergerProjector,
        "pool": PoolProjector,
        "stack": StackProjector,
    }
    return kinds[spec.kind](spec)
