"""The dense MLPs of decoders, of which an expert is one, and those of projectors."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.decoder_spec import DecoderSpec


class GatedMLP(nn.Module):
    """SwiGLU where the activation is SiLU (Shazeer 2020)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = spec.hidden_act
        hidden, wide = spec.hidden_size, spec.intermediate_size
        self.gate_proj = nn.Linear(hidden, wide, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(hidden, wide, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(wide, hidden, bias=spec.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = activate(self.activation, self.gate_proj(hidden))
        out: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return out


class PlainMLP(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = spec.hidden_act
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(activate(self.activation, self.fc1(hidden)))
        return out


def build_mlp(spec: DecoderSpec) -> nn.Module:
    """The kind of MLP that the spec names."""
    return GatedMLP(spec) if spec.mlp == "gated" else PlainMLP(spec)


def activate(name: str, hidden: Tensor) -> Tensor:
    """The activation function that a spec names."""
    if name == "relu":
        return F.relu(hidden)
    return F.silu(hidden) if name == "silu" else F.gelu(hidden, approximate="tanh")


class MLP(nn.ModuleList):
    """Linears with exact GELU between; one Linear is LLaVA's first projector."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__(nn.Linear(*sizes, bias=spec.bias) for sizes in pairwise(spec.mlp_sizes))

    def forward(self, hidden: Tensor) -> Tensor:
        for index, linear in enumerate(self):
            hidden = linear(hidden if index == 0 else F.gelu(hidden))
        return hidden
