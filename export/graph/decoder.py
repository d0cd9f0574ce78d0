"""The decoder stage: embeddings and KV buffers to logits, on ONNX Runtime's CPU operators.

Attention writes the new keys and values into buffers that the caller owns (GroupQueryAttention with
shared past and present), so a step copies nothing and going back is a matter of ``total_length``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.layers import Linear
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.spec import DecoderSpec


class DecoderStage(nn.Module):  # type: ignore[misc]
    """``inputs_embeds (1, length, hidden_size)`` to ``logits (1, positions, vocab_size)`` of the
    positions asked for, and the KV buffers ``(1, num_key_value_heads, capacity, head_dim)``."""

    def __init__(self, weights: WeightFile, spec: DecoderSpec) -> None:
        super().__init__("decoder")
        self.epsilon = spec.rms_norm_eps
        cos, sin = rotary_tables(spec)
        self.cos_cache, self.sin_cache = weights.parameter(cos), weights.parameter(sin)
        self.input_norm = RMSNorm(weights, "decoder.layers.0.input_norm", spec)
        self.layers = nn.ModuleList(
            [DecoderLayer(weights, index, spec) for index in range(spec.num_hidden_layers)]
        )
        self.lm_head = Linear(
            weights,
            "decoder.lm_head",
            spec.hidden_size,
            spec.vocab_size,
            bias=False,
        )

    def forward(
        self,
        op: Any,
        embeds: Any,
        total_length: Any,
        logits_positions: Any,
        past: list[tuple[Any, Any]],
    ) -> tuple[Any, list[tuple[Any, Any]]]:
        seqlens = op.Sub(total_length, 1)
        rotary = (self.cos_cache, self.sin_cache)
        residual, normed = embeds, self.input_norm(op, embeds)
        presents = []
        for index, (layer, key_value) in enumerate(zip(self.layers, past, strict=True)):
            positions = logits_positions if index == len(past) - 1 else None
            residual, normed, present = layer(
                op, residual, normed, seqlens, total_length, rotary, key_value, positions
            )
            presents.append(present)
        return self.lm_head(op, normed), presents


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """Attention and MLP. Takes the residual stream and its norm, and gives both for the next layer,
    since the operator that adds the residual normalises too. In the last layer only the positions
    whose logits are asked for go on after attention."""

    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__()
        name = f"decoder.layers.{index}"
        last = index == spec.num_hidden_layers - 1
        next_norm = "decoder.norm" if last else f"decoder.layers.{index + 1}.input_norm"
        self.num_heads, self.num_kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        heads, kv_heads = self.num_heads * spec.head_dim, self.num_kv_heads * spec.head_dim
        hidden, wide = spec.hidden_size, spec.intermediate_size
        qkv = [f"{name}.attn.{part}_proj" for part in "qkv"]
        self.qkv = Linear(weights, qkv, hidden, [heads, kv_heads, kv_heads], bias=False)
        self.o_proj = Linear(weights, f"{name}.attn.o_proj", heads, hidden, bias=False)
        self.post_attention_norm = SkipRMSNorm(weights, f"{name}.post_attention_norm", spec)
        gate_up = [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"]
        self.gate_up = Linear(weights, gate_up, hidden, [wide, wide], bias=False)
        self.down_proj = Linear(weights, f"{name}.mlp.down_proj", wide, hidden, bias=False)
        self.next_norm = SkipRMSNorm(weights, next_norm, spec)

    def forward(
        self,
        op: Any,
        residual: Any,
        normed: Any,
        seqlens: Any,
        total_length: Any,
        rotary: tuple[Any, Any],
        past: tuple[Any, Any],
        positions: Any | None,
    ) -> tuple[Any, Any, tuple[Any, Any]]:
        mixed, key, value = op.GroupQueryAttention(
            self.qkv(op, normed),
            None,
            None,
            *past,
            seqlens,
            total_length,
            *rotary,
            num_heads=self.num_heads,
            kv_num_heads=self.num_kv_heads,
            do_rotary=1,
            _domain=CONTRIB,
            _outputs=3,
        )
        if positions is not None:
            mixed, residual = (
                op.Gather(mixed, positions, axis=1),
                op.Gather(residual, positions, axis=1),
            )
        residual, normed = self.post_attention_norm(op, self.o_proj(op, mixed), residual)
        gate, up = op.Split(self.gate_up(op, normed), axis=-1, num_outputs=2, _outputs=2)
        activated = op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
        residual, normed = self.next_norm(op, self.down_proj(op, activated), residual)
        return residual, normed, (key, value)


class RMSNorm(nn.Module):  # type: ignore[misc]
    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        self.epsilon = spec.rms_norm_eps
        self.weight = weights.parameter(weights.read(f"{name}.weight", spec.hidden_size))

    def forward(self, op: Any, x: Any) -> Any:
        return op.SimplifiedLayerNormalization(x, self.weight, axis=-1, epsilon=self.epsilon)


class SkipRMSNorm(nn.Module):  # type: ignore[misc]
    """Adds to the residual stream; gives the sum and its norm."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        self.epsilon = spec.rms_norm_eps
        self.weight = weights.parameter(weights.read(f"{name}.weight", spec.hidden_size))

    def forward(self, op: Any, x: Any, residual: Any) -> tuple[Any, Any]:
        normed, _, _, total = op.SkipSimplifiedLayerNormalization(
            x, residual, self.weight, epsilon=self.epsilon, _domain=CONTRIB, _outputs=4
        )
        return total, normed


def rotary_tables(
    spec: DecoderSpec,
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]:
    """Cosine and sine ``(context_length, head_dim / 2)``, in float32 as in the reference code."""
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    frequency = (np.float32(1) / np.float32(spec.rope_theta) ** exponent).astype(np.float32)
    positions = np.arange(spec.context_length, dtype=np.float32) / np.float32(spec.rope_scaling)
    angle = np.outer(positions, frequency).astype(np.float32)
    return np.cos(angle), np.sin(angle)
