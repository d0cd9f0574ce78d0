"""Vision transformers on images of any size (Qwen2-VL, Wang et al. 2024; window attention of
Qwen2.5-VL, Bai et al. 2025; learned positions and DeepStack of Qwen3-VL), and the mergers behind
them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.image_encoder import BOUNDS, NativeEncoder
from mobilevlm.reference.decoder import rotate
from mobilevlm.reference.mlp import MLP, activate
from mobilevlm.reference.norms import RMSNorm
from mobilevlm.reference.steps import State, Step, Stepped


class ClippedLinear(nn.Linear):
    """A linear layer whose inputs and outputs are clipped to bounds that are learned (Gemma 4)."""

    def __init__(self, in_size: int, out_size: int, bias: bool) -> None:
        super().__init__(in_size, out_size, bias)
        for name in BOUNDS:
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))

    def forward(self, hidden: Tensor) -> Tensor:
        least, greatest, lowest, highest = (self.get_parameter(name) for name in BOUNDS)
        return super().forward(hidden.clamp(least, greatest)).clamp(lowest, highest)


def _linear(spec: NativeEncoder, in_size: int, out_size: int) -> nn.Linear:
    return (ClippedLinear if spec.clipped else nn.Linear)(in_size, out_size, bias=spec.bias)


class NativeAttention(nn.Module):
    def __init__(self, spec: NativeEncoder) -> None:
        super().__init__()
        self.heads, size = spec.num_attention_heads, spec.hidden_size
        self.q_proj, self.k_proj = _linear(spec, size, size), _linear(spec, size, size)
        self.v_proj, self.out_proj = _linear(spec, size, size), _linear(spec, size, size)
        self.norm_eps = spec.norm_eps if spec.head_norms else None
        if spec.head_norms:
            self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps)

    def forward(self, hidden: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            proj(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = None
        if self.norm_eps is not None:
            query, key, scale = self.q_norm(query), self.k_norm(key), 1.0
            value = F.rms_norm(value, value.shape[-1:], eps=self.norm_eps)
        cos, sin = angles.cos(), angles.sin()
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class NativeMLP(nn.Module):
    def __init__(self, spec: NativeEncoder) -> None:
        super().__init__()
        self.activation = spec.hidden_act
        self.readers, self.maker = spec.mlp_linears
        for name in self.readers:
            self.add_module(name, _linear(spec, spec.hidden_size, spec.intermediate_size))
        self.add_module(self.maker, _linear(spec, spec.intermediate_size, spec.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        first, *others = (self.get_submodule(name)(hidden) for name in self.readers)
        if self.activation == "quick_gelu":
            wide = first * torch.sigmoid(1.702 * first)
        else:
            wide = activate(self.activation, first)
        for other in others:
            wide = wide * other
        out: Tensor = self.get_submodule(self.maker)(wide)
        return out


class NativeLayer(nn.Module):
    def __init__(self, spec: NativeEncoder) -> None:
        super().__init__()
        self.norm1 = _norm(spec.norm, spec.hidden_size, spec.norm_eps)
        self.attn = NativeAttention(spec)
        self.norm2 = _norm(spec.norm, spec.hidden_size, spec.norm_eps)
        self.mlp = NativeMLP(spec)
        self.attn_output_norm = self.mlp_output_norm = None
        if spec.post_norms:
            self.attn_output_norm = _norm(spec.norm, spec.hidden_size, spec.norm_eps)
            self.mlp_output_norm = _norm(spec.norm, spec.hidden_size, spec.norm_eps)

    def forward(self, hidden: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        mixed = self.attn(self.norm1(hidden), angles, mask)
        hidden = hidden + (mixed if self.attn_output_norm is None else self.attn_output_norm(mixed))
        made: Tensor = self.mlp(self.norm2(hidden))
        return hidden + (made if self.mlp_output_norm is None else self.mlp_output_norm(made))


class AxisPositions(nn.Module):
    """Row and column of patches ``(patches, 2)`` to the sum of what two tables have for each
    (Gemma 4)."""

    def __init__(self, spec: NativeEncoder) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, spec.axis_positions, spec.hidden_size))
        """That of columns first"""

    def forward(self, places: Tensor) -> Tensor:
        return self.weight[0, places[:, 1]] + self.weight[1, places[:, 0]]


class NativeTower(Stepped):
    """Normalised pixels ``(1, 3 · frames, height, width)`` to features ``(1, patches,
    hidden_size)``."""

    def __init__(self, spec: NativeEncoder) -> None:
        super().__init__()
        self.spec = spec
        patch = (spec.frames, spec.patch_size, spec.patch_size)
        self.patch_embedding = nn.Conv3d(
            3, spec.hidden_size, patch, stride=patch, bias=spec.patch_bias
        )
        if spec.position_grid:
            count = spec.position_grid**2
            self.position_embedding: nn.Module = nn.Embedding(count, spec.hidden_size)
        if spec.axis_positions:
            self.position_embedding = AxisPositions(spec)
        self.layers = nn.ModuleList(NativeLayer(spec) for _ in range(spec.num_hidden_layers))

    def steps(self) -> Iterator[Step]:
        """Yield the embedding's steps and the layers."""
        yield Step("patch_embedding", self.patch_embedding, self._embed)
        if self.spec.position_grid:
            yield Step("position_embedding", self.position_embedding, self._add_positions)
        if self.spec.axis_positions:
            yield Step("position_embedding", self.position_embedding, self._add_by_axis)
        for index, layer in enumerate(self.layers):
            yield Step(f"layers.{index}", layer, partial(self._run_layer, index))

    def _embed(self, state: State) -> State:
        spec, (_, channels, height, width) = self.spec, state.hidden.shape
        edge = spec.patch_size * spec.merge_size
        rows, columns, side = height // edge, width // edge, (spec.merge_size, spec.patch_size)
        frames = state.hidden.reshape(channels // 3, 3, rows, *side, columns, *side)
        frames = frames.expand(spec.frames, *frames.shape[1:])
        patches = frames.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(
            -1, 3, spec.frames, spec.patch_size, spec.patch_size
        )
        hidden: Tensor = self.patch_embedding(patches).flatten(1)[None]
        return state.then(hidden, grid=torch.tensor([rows, columns]))

    def _in_squares(self, values: Tensor) -> Tensor:
        """Return values of patches ``(rows, columns, …)`` in the order of patches ``(patches,
        …)``."""
        side = self.spec.merge_size
        height, width, *sizes = values.shape
        parts = values.reshape(height // side, side, width // side, side, *sizes)
        return parts.transpose(1, 2).flatten(0, 3)

    def _add_positions(self, state: State) -> State:
        side = self.spec.position_grid
        places = torch.arange(side * side, device=state.hidden.device)
        table: Tensor = self.position_embedding(places).reshape(side, side, -1)
        size = [int(count) * self.spec.merge_size for count in state.given["grid"]]
        resized = F.interpolate(
            table.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=True
        )
        return state.then(state.hidden + self._in_squares(resized[0].permute(1, 2, 0)))

    def _add_by_axis(self, state: State) -> State:
        return state.then(state.hidden + self.position_embedding(self._places(state)))

    def _run_layer(self, index: int, state: State) -> State:
        places = self._places(state)
        window = self.spec.window_of(index) * self.spec.merge_size
        mask = None
        if window:
            inside = places // window
            mask = (inside[:, None] == inside[None]).all(-1)
        hidden = self.layers[index](state.hidden, self._angles(places), mask)
        if index not in self.spec.deep_layers:
            return state.then(hidden)
        return state.then(hidden, **{f"tower.{self.spec.deep_layers.index(index)}": hidden})

    def _places(self, state: State) -> Tensor:
        """Return row and column of each patch ``(patches, 2)``."""
        rows, columns = (int(count) * self.spec.merge_size for count in state.given["grid"])
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return self._in_squares(places.reshape(rows, columns, 2))

    def _angles(self, places: Tensor) -> Tensor:
        """Return the angle of each pair of channels ``(patches, head_dim / 2)``."""
        half = self.spec.head_dim // 2
        exponent = torch.arange(0, half, 2, dtype=torch.float32) / half
        frequency = 1.0 / self.spec.rope_theta**exponent
        return (places[..., None].float() * frequency).flatten(1)


class Merger(nn.Module):
    """Output of a layer ``(1, patches, in_size)`` to rows ``(1, tokens, out_size)``; the norm is
    over the patches of a square as one vector (DeepStack, Meng et al. 2024)."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.joined = spec.mlp_sizes[0]
        self.norm = _norm("layer", self.joined, spec.norm_eps)
        self.mlp = MLP(spec)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.norm(hidden.reshape(len(hidden), -1, self.joined)))
        return out


class MergerProjector(Stepped):
    """Features to visual tokens, and the outputs of some layers to rows that ``deep.0``,
    ``deep.1`` … of the state hold."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.joined = spec.mlp_sizes[0]
        self.deep = nn.ModuleList(Merger(spec) for _ in range(spec.deep))
        self.norm = _norm(spec.norm_kind, spec.in_size, spec.norm_eps)
        self.mlp = MLP(spec)

    def steps(self) -> Iterator[Step]:
        """Yield the further mergers, and the norm and the MLP of this one."""
        for index, merger in enumerate(self.deep):
            yield Step(f"deep.{index}", merger, partial(self._merge, index))
        yield Step.of("norm", self.norm)
        yield Step.of("mlp", self.mlp, self._join)

    def _merge(self, index: int, state: State) -> State:
        rows = self.deep[index](state.given[f"tower.{index}"])
        return state.then(state.hidden, **{f"deep.{index}": rows})

    def _join(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.mlp(hidden.reshape(len(hidden), -1, self.joined))
        return out


class PoolProjector(Stepped):
    """Averages of the patches of a square, an RMS norm without weight, and an MLP (Gemma 4)."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        self.square, self.eps = spec.factor**2, spec.norm_eps
        self.mlp = MLP(spec)

    def steps(self) -> Iterator[Step]:
        """Yield the MLP, behind averages and norm."""
        yield Step.of("mlp", self.mlp, self._pool)

    def _pool(self, hidden: Tensor) -> Tensor:
        pooled = hidden.reshape(len(hidden), -1, self.square, hidden.shape[2]).mean(2)
        out: Tensor = self.mlp(F.rms_norm(pooled, pooled.shape[-1:], eps=self.eps))
        return out


def _norm(kind: str, size: int, eps: float) -> nn.Module:
    return RMSNorm(size, eps) if kind == "rms" else nn.LayerNorm(size, eps=eps)
