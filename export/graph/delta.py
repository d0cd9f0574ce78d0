"""Linear attention by the gated delta rule, in place of attention (Qwen3.5), on ONNX Runtime's
operator for it. (That for convolutions with a state takes twice as long as a sum of products.)"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.layers import joined
from mobilevlm.export.graph.short_convolution import END, convolve
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.linear_groups import delta_gates, delta_groups

_EPSILON = 1e-6
"""Added to squared lengths of queries and keys."""


class GatedDelta(nn.Module):  # type: ignore[misc]
    """``x (1, length, hidden_size)`` to ``(1, length, value_size)``, without the product behind
    it."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        assert spec.delta is not None
        self.delta, self.epsilon, self.dialect = spec.delta, spec.norm_eps, weights.dialect
        size, heads = spec.hidden_size, spec.delta.value_heads
        group, gates = next(delta_groups(spec, name)), delta_gates(spec, name)
        self.qkv_gate = joined(weights, group.names, size, group.out_sizes, bias=False)
        rows = [weights.read(f"{part}.weight", heads, size) for part in gates.names]
        self.gates = weights.parameter(np.concatenate(rows).T)  # float32 in every recipe
        self.gate_names = gates.names
        kernel = (spec.delta.mixed_size, 1, spec.delta.kernel)
        self.taps = weights.parameter(weights.read(f"{name}.conv.weight", *kernel).T)
        self.bias = weights.parameter(weights.read(f"{name}.time_bias.weight", heads))
        decay = -np.exp(weights.read(f"{name}.decay_log.weight", heads))
        self.decay = weights.parameter(decay.astype(np.float32))
        self.norm = weights.parameter(weights.read(f"{name}.norm.weight", spec.delta.value_dim))
        unit = np.full(spec.delta.key_dim, spec.delta.key_dim**-0.5, np.float32)
        self.unit = weights.parameter(unit)

    @property
    def products(self) -> list[tuple[Any, tuple[str, ...]]]:
        """Constant that this module itself multiplies by, with its canonical names."""
        return [(self.gates, self.gate_names)]

    def forward(self, op: Any, x: Any, inputs: Any, state: Any) -> tuple[Any, tuple[Any, Any]]:
        """``inputs``: of the convolution before this run ``(1, kernel - 1, channels)``; ``state``:
        ``(1, value_heads, key_dim, value_dim)``. Gives both as they are after it."""
        delta = self.delta
        qkv, gate = op.Split(
            self.qkv_gate(op, x), [delta.mixed_size, delta.value_size], axis=-1, _outputs=2
        )
        rate, step = op.Split(
            self.dialect.product(op, x, self.gates), axis=-1, num_outputs=2, _outputs=2
        )
        inputs = op.Concat(inputs, qkv, axis=1)
        mixed = convolve(op, inputs, self.taps, delta.kernel)
        inputs = op.Slice(inputs, [1 - delta.kernel], [END], [1])
        sizes = [delta.key_size, delta.key_size, delta.value_size]
        parts = op.Split(op.Mul(mixed, op.Sigmoid(mixed)), sizes, axis=-1, _outputs=3)
        query, key, value = parts
        found, state = op.LinearAttention(
            self._units(op, query),
            self._units(op, key),
            value,
            state,
            op.Mul(op.Softplus(op.Add(step, self.bias)), self.decay),
            op.Sigmoid(rate),
            q_num_heads=delta.value_heads,
            kv_num_heads=delta.value_heads,
            update_rule="gated_delta",
            scale=delta.key_dim**-0.5,
            _domain=CONTRIB,
            _outputs=2,
        )
        heads = op.Reshape(found, [1, -1, delta.value_heads, delta.value_dim])
        normed = self.dialect.rms_norm(op, heads, self.norm, self.epsilon)
        made = op.Reshape(normed, [1, -1, delta.value_size])
        return op.Mul(made, op.Mul(gate, op.Sigmoid(gate))), (inputs, state)

    def _units(self, op: Any, states: Any) -> Any:
        """Vectors divided by their lengths, each once for every value head that shares it. (A
        root-mean-square norm with the right weights is that.)"""
        delta = self.delta
        heads = op.Reshape(states, [1, -1, delta.key_heads, delta.key_dim])
        units = self.dialect.rms_norm(op, heads, self.unit, _EPSILON / delta.key_dim)
        if (shared := delta.value_heads // delta.key_heads) > 1:
            apart = op.Reshape(units, [1, -1, delta.key_heads, 1, delta.key_dim])
            units = op.Expand(apart, [1, 1, 1, shared, 1])
        return op.Reshape(units, [1, -1, delta.value_heads * delta.key_dim])
