"""The decoder stage with fixed shapes, of standard operators: what compilers for NPUs take.

A graph appends a chunk of ``length`` positions to at most ``window`` earlier ones. What depends on
the place of the chunk in the sequence comes in from outside: rotary tables, the mask and the
earlier keys and values; the chunk's own keys and values go out, and the caller keeps them. Module
and weight names are those of :mod:`mobilevlm.export.graph.decoder`, for any ``length``.
"""

from __future__ import annotations

from typing import Any

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph.decoder import DecoderLayer, DecoderStage, Norm, soft_cap
from mobilevlm.export.graph.layers import FLOAT
from mobilevlm.export.graph.weight_file import WeightFile


class StaticDecoderStage(DecoderStage):
    """``inputs_embeds (1, length, hidden_size)`` to ``logits (1, positions, vocab_size)`` of some
    positions, and the chunk's keys and values ``(1, num_key_value_heads, length, head_dim)``."""

    has_tables = False

    def layer(self, weights: WeightFile, index: int, spec: DecoderSpec) -> DecoderLayer:
        """The layer with this index."""
        return StaticLayer(weights, index, spec)

    def forward(  # type: ignore[override]
        self,
        op: Any,
        embeds: Any,
        masks: tuple[Any, Any],
        rotary: tuple[tuple[Any, Any], tuple[Any, Any]],
        position: Any,
        past: list[tuple[Any, Any]],
    ) -> tuple[Any, list[tuple[Any, Any]]]:
        """``masks``: of full layers and of sliding ones. ``rotary``: cosine and signed sine, see
        :func:`rotated`; those of the sliding layers' own base second. ``position``: whose logits
        are wanted, see :func:`chosen`."""
        residual, normed = embeds, self.input_norm(op, embeds)
        presents = []
        for index, (layer, key_value) in enumerate(zip(self.layers, past, strict=True)):
            wanted = position if index == len(past) - 1 else None
            mask, tables = masks[layer.is_sliding], rotary[self.sliding[index]]
            residual, normed, present = layer(op, residual, normed, mask, tables, key_value, wanted)
            presents.append(present)
        return self.logits(op, normed), presents


class StaticLayer(DecoderLayer):
    """Attention over earlier keys and values and the chunk's own, and MLP."""

    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__(weights, index, spec)
        self.is_sliding = spec.window(index) > 0

    def norm(self, weights: WeightFile, name: str, spec: DecoderSpec) -> Norm:
        """A norm after something is added to the residual stream."""
        return Norm(weights, name, spec)

    def forward(  # type: ignore[override]
        self,
        op: Any,
        residual: Any,
        normed: Any,
        mask: Any,
        rotary: tuple[Any, Any],
        past: tuple[Any, Any],
        position: Any | None,
    ) -> tuple[Any, Any, tuple[Any, Any]]:
        mixed, present = self._attend(op, self.qkv(op, normed), mask, rotary, past)
        if position is not None:
            mixed, residual = chosen(op, mixed, position), chosen(op, residual, position)
        attended = self.o_proj(op, mixed)
        if self.attn_output_norm is not None:
            attended = self.attn_output_norm(op, attended)
        residual = op.Add(residual, attended)
        if self.post_attention_norm is not None:
            normed = self.post_attention_norm(op, residual)
        elif position is not None:
            normed = chosen(op, normed, position)
        made = self.mlp(op, normed)
        made = made[0] if self.is_sparse else made
        if self.mlp_output_norm is not None:
            made = self.mlp_output_norm(op, made)
        residual = op.Add(residual, made)
        return residual, self.next_norm(op, residual), present

    def _attend(
        self, op: Any, qkv: Any, mask: Any, rotary: tuple[Any, Any], past: tuple[Any, Any]
    ) -> tuple[Any, tuple[Any, Any]]:
        """Mixed values ``(1, length, heads · head_dim)``, and the chunk's keys and values."""
        spec = self.spec
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, spec.head_dim
        group = heads // kv_heads
        query, key, value = op.Split(qkv, list(self.qkv_sizes), axis=-1, _outputs=3)
        query = op.Reshape(query, [1, -1, heads, dim])
        if self.q_norm is not None:
            query = self.q_norm(op, query)
        query = rotated(op, query, rotary, spec)
        key = op.Reshape(key, [1, -1, kv_heads, dim])
        if self.k_norm is not None:
            key = self.k_norm(op, key)
        key = rotated(op, key, rotary, spec)
        value = op.Reshape(value, [1, -1, kv_heads, dim])
        query = op.Transpose(op.Mul(query, spec.score_scale), perm=[0, 2, 1, 3])
        key, value = (op.Transpose(states, perm=[0, 2, 1, 3]) for states in (key, value))
        keys, values = op.Concat(past[0], key, axis=2), op.Concat(past[1], value, axis=2)
        if group > 1:  # heads with common keys are rows of one product
            query = op.Reshape(query, [1, kv_heads, -1, dim])
        scores = op.MatMul(query, op.Transpose(keys, perm=[0, 1, 3, 2]))
        if group > 1:
            total = mask.shape[3]
            scores = op.Reshape(scores, [kv_heads, group, -1, total])
        if spec.attention_softcap is not None:
            scores = soft_cap(op, scores, spec.attention_softcap)
        shares = op.Softmax(op.Add(scores, mask), axis=-1)
        if group > 1:
            shares = op.Reshape(shares, [1, kv_heads, -1, total])
        mixed = op.MatMul(shares, values)
        if group > 1:
            mixed = op.Reshape(mixed, [1, heads, -1, dim])
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [1, -1, heads * dim])
        return mixed, (key, value)


def chosen(op: Any, states: Any, position: Any) -> Any:
    """Select from ``(1, length, size)`` the wanted positions ``(1, positions, size)``.
    ``position``: their indices ``(positions,)``, or for graphs of elementary operators rows with a
    single 1 ``(1, positions, length)``, since Core ML takes no Gather."""
    if position.type.dtype == FLOAT:
        return op.MatMul(position, states)
    return op.Gather(states, position, axis=1)


def rotated(op: Any, states: Any, rotary: tuple[Any, Any], spec: DecoderSpec) -> Any:
    """``(1, length, heads, head_dim)`` with its first channels rotated: halves change places, and
    the sine of the first half is negative. ``rotary``: ``(1, length, 1, rotary_channels)`` each."""
    cos, sin = rotary
    channels, rest = spec.rotary_channels, None
    if channels < spec.head_dim:
        sizes = [channels, spec.head_dim - channels]
        states, rest = op.Split(states, sizes, axis=-1, _outputs=2)
    first, second = op.Split(states, [channels // 2] * 2, axis=-1, _outputs=2)
    swapped = op.Concat(second, first, axis=-1)
    turned = op.Add(op.Mul(states, cos), op.Mul(swapped, sin))
    return turned if rest is None else op.Concat(turned, rest, axis=-1)
