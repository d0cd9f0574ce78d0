"""The dense MLPs of decoders; an expert is one of them."""

from __future__ import annotations

from typing import Any

from onnxscript import nn

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph.dialects import Dialect
from mobilevlm.export.graph.layers import Linear
from mobilevlm.export.graph.weight_file import WeightFile


class GatedMLP(nn.Module):  # type: ignore[misc]
    """``(…, hidden_size)`` to the same. Gate and up are one product."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation, self.dialect = spec.hidden_act, weights.dialect
        hidden, wide = spec.hidden_size, spec.intermediate_size
        (gate, up), down = linear_names(name, spec)
        self.gate_up = Linear(weights, [gate, up], hidden, [wide, wide], bias=spec.mlp_bias)
        self.down_proj = Linear(weights, down, wide, hidden, bias=spec.mlp_bias)

    def forward(self, op: Any, x: Any) -> Any:
        gate, up = op.Split(self.gate_up(op, x), axis=-1, num_outputs=2, _outputs=2)
        return self.down_proj(op, op.Mul(activate(op, self.activation, gate, self.dialect), up))


class PlainMLP(nn.Module):  # type: ignore[misc]
    """``(…, hidden_size)`` to the same."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation, self.dialect = spec.hidden_act, weights.dialect
        (fc1,), fc2 = linear_names(name, spec)
        hidden, wide = spec.hidden_size, spec.intermediate_size
        self.fc1 = Linear(weights, fc1, hidden, wide, bias=spec.mlp_bias)
        self.fc2 = Linear(weights, fc2, wide, hidden, bias=spec.mlp_bias)

    def forward(self, op: Any, x: Any) -> Any:
        wide = self.fc1(op, x)
        return self.fc2(op, activate(op, self.activation, wide, self.dialect))


def build_mlp(weights: WeightFile, name: str, spec: DecoderSpec) -> nn.Module:
    """The kind of MLP that the spec names."""
    return {"gated": GatedMLP, "plain": PlainMLP}[spec.mlp](weights, name, spec)


def linear_names(name: str, spec: DecoderSpec) -> tuple[list[str], str]:
    """Canonical names of what reads an MLP's input, and of what makes its output."""
    readers, maker = spec.mlp_linears
    return [f"{name}.{reader}" for reader in readers], f"{name}.{maker}"


def activate(op: Any, name: str, x: Any, dialect: Dialect) -> Any:
    """Return the activation function that the spec names, of ``x``."""
    if name == "relu":
        return op.Relu(x)
    return op.Mul(x, op.Sigmoid(x)) if name == "silu" else dialect.gelu(op, x, approximate="tanh")
