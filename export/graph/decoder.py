"""The decoder stage: embeddings and KV buffers to logits, on ONNX Runtime's CPU operators.

Attention writes the new keys and values into buffers that the caller owns (GroupQueryAttention with
shared past and present), so a step copies nothing and going back is a matter of ``total_length``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.experts import SparseMLP
from mobilevlm.export.graph.head_padding import cut_heads, pad_heads
from mobilevlm.export.graph.layers import Linear
from mobilevlm.export.graph.mlp import build_mlp
from mobilevlm.export.graph.rotation import StreamRotation
from mobilevlm.export.graph.short_convolution import ShortConvolution
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.rotary import rotary_tables


class DecoderStage(nn.Module):  # type: ignore[misc]
    """``inputs_embeds (1, length, hidden_size)`` to ``logits (1, positions, vocab_size)`` of the
    positions asked for, and the KV buffers ``(1, num_key_value_heads, capacity,
    cache_head_dim)``; of each sparse layer also the router's logits, for verification."""

    has_tables = True
    """Rotary tables are inside the graph, unless positions have several axes"""

    def __init__(self, weights: WeightFile, spec: DecoderSpec) -> None:
        super().__init__("decoder")
        self.fused_rotary = has_fused_rotary(spec)
        self.cos_cache = self.sin_cache = self.positions = None
        self.sliding_cos = self.sliding_sin = None
        self.sliding = [spec.has_sliding_rope(index) for index in range(spec.num_hidden_layers)]
        if self.has_tables and spec.rotary_channels and not spec.rope_sections:
            if not all(self.sliding):
                cos, sin = rotary_tables(spec)
                self.cos_cache, self.sin_cache = weights.parameter(cos), weights.parameter(sin)
            if any(self.sliding):
                cos, sin = rotary_tables(spec, sliding=True)
                self.sliding_cos, self.sliding_sin = weights.parameter(cos), weights.parameter(sin)
        if spec.learned_positions:
            sizes = (spec.context_length, spec.hidden_size)
            table = weights.read("decoder.position_embedding.weight", *sizes)
            with weights.read_in_part(1 / spec.context_length):
                self.positions = weights.parameter(table)
        self.rotation = None
        if weights.recipe.is_rotated:
            self.rotation = StreamRotation(weights, spec.hidden_size)
        self.input_norm = Norm(weights, "decoder.layers.0.input_norm", spec)
        self.layers = nn.ModuleList(
            [self.layer(weights, index, spec) for index in range(spec.num_hidden_layers)]
        )
        self.cap = spec.logit_softcap
        self.lm_head = Linear(
            weights,
            "decoder.lm_head",
            spec.hidden_size,
            spec.vocab_size,
            bias=spec.lm_head_bias,
        )

    def layer(self, weights: WeightFile, index: int, spec: DecoderSpec) -> DecoderLayer:
        """The layer with this index."""
        return DecoderLayer(weights, index, spec)

    def forward(
        self,
        op: Any,
        embeds: Any,
        total_length: Any,
        logits_positions: Any,
        past: list[tuple[Any, ...]],
        tables: tuple[Any, ...] = (),
        deep: Mapping[int, Any] = MappingProxyType({}),
    ) -> tuple[Any, list[tuple[Any, ...]], dict[int, Any]]:
        """``tables``: cosine and sine of this run ``(length, rotary_channels / 2)``, for positions
        of several axes; ``deep``: what is added after some layers."""
        seqlens = op.Sub(total_length, 1)
        if self.rotation is not None:
            embeds = self.rotation(op, embeds)
            deep = {index: self.rotation(op, rows) for index, rows in deep.items()}
        start = None
        if (not self.fused_rotary and not tables) or self.positions is not None:
            end = op.Cast(total_length, to=ir.DataType.INT64)
            start = op.Sub(end, op.Shape(embeds, start=1, end=2))
            if self.positions is not None:
                embeds = op.Add(embeds, op.Slice(self.positions, start, end, [0]))
        rotary = {
            False: (self.cos_cache, self.sin_cache, start),
            True: (self.sliding_cos, self.sliding_sin, start),
        }
        if tables:
            rotary[False] = (*tables, op.Constant(value_ints=[0]))
        residual, normed = embeds, self.input_norm(op, embeds)
        presents, routers = [], {}
        for index, (layer, key_value) in enumerate(zip(self.layers, past, strict=True)):
            positions = logits_positions if index == len(past) - 1 else None
            residual, normed, present, router = layer(
                op,
                residual,
                normed,
                seqlens,
                total_length,
                rotary[self.sliding[index]],
                key_value,
                positions,
                deep.get(index),
            )
            presents.append(present)
            if router is not None:
                routers[index] = router
        return self.logits(op, normed), presents, routers

    def logits(self, op: Any, normed: Any) -> Any:
        """States after the last norm to logits."""
        made = self.lm_head(op, normed)
        return made if self.cap is None else soft_cap(op, made, self.cap)


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """Attention, or a short convolution, and MLP. Takes the residual stream and its norm, and gives
    both for the next layer, since the operator that adds the residual normalises too. In the last
    layer only the positions whose logits are asked for go on after attention."""

    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__()
        name = f"decoder.layers.{index}"
        last = index == spec.num_hidden_layers - 1
        next_norm = "decoder.norm" if last else f"decoder.layers.{index + 1}.input_norm"
        self.spec, self.settings = spec, _attention_settings(spec, index)
        self.num_heads, self.num_kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        heads, kv_heads = self.num_heads * spec.head_dim, self.num_kv_heads * spec.head_dim
        hidden = spec.hidden_size
        qkv = [f"{name}.attn.{part}_proj" for part in "qkv"]
        self.qkv_sizes = (heads, kv_heads, kv_heads)
        self.fused_rotary, self.rotary_channels = has_fused_rotary(spec), spec.rotary_channels
        self.short_conv = self.q_norm = self.k_norm = None
        if index in spec.conv_layers:
            conv = f"{name}.short_conv"
            self.short_conv = ShortConvolution(weights, conv, spec)
            self.o_proj = Linear(weights, f"{conv}.out_proj", hidden, hidden, bias=spec.conv_bias)
        else:
            self.qkv = Linear(weights, qkv, hidden, self.qkv_sizes, bias=spec.qkv_bias)
            self.o_proj = Linear(weights, f"{name}.attn.o_proj", heads, hidden, bias=spec.o_bias)
            if spec.qk_norm:
                self.q_norm = Norm(weights, f"{name}.attn.q_norm", spec, spec.head_dim)
                self.k_norm = Norm(weights, f"{name}.attn.k_norm", spec, spec.head_dim)
        self.post_attention_norm = None
        if not spec.parallel_residual:
            self.post_attention_norm = self.norm(weights, f"{name}.post_attention_norm", spec)
        self.is_sparse = spec.num_experts(index) > 0
        if self.is_sparse:
            self.mlp = SparseMLP(weights, f"{name}.mlp", spec, index)
        else:
            self.mlp = build_mlp(weights, f"{name}.mlp", spec)
        self.next_norm = self.norm(weights, next_norm, spec)
        self.attn_output_norm = self.mlp_output_norm = None
        if spec.post_norms:
            self.attn_output_norm = Norm(weights, f"{name}.attn_output_norm", spec)
            self.mlp_output_norm = Norm(weights, f"{name}.mlp_output_norm", spec)

    def norm(self, weights: WeightFile, name: str, spec: DecoderSpec) -> nn.Module:
        """A norm after something is added to the residual stream."""
        return SkipNorm(weights, name, spec)

    def forward(
        self,
        op: Any,
        residual: Any,
        normed: Any,
        seqlens: Any,
        total_length: Any,
        rotary: tuple[Any, Any, Any],
        past: tuple[Any, ...],
        positions: Any | None,
        deep: Any | None,
    ) -> tuple[Any, Any, tuple[Any, ...], Any | None]:
        if self.short_conv is not None:
            mixed, present = self.short_conv(op, normed, *past)
        else:
            mixed, present = self._mixed(op, normed, (seqlens, total_length), rotary, past)
        if positions is not None:
            mixed = op.Gather(mixed, positions, axis=1)
            residual = op.Gather(residual, positions, axis=1)
            deep = None if deep is None else op.Gather(deep, positions, axis=1)
        if self.short_conv is None:
            mixed = cut_heads(op, mixed, self.num_heads, self.spec)
        attended = self.o_proj(op, mixed)
        if self.attn_output_norm is not None:
            attended = self.attn_output_norm(op, attended)
        if self.post_attention_norm is not None:
            residual, normed = self.post_attention_norm(op, attended, residual)
        else:
            residual = op.Add(residual, attended)
            normed = normed if positions is None else op.Gather(normed, positions, axis=1)
        router = None
        if self.is_sparse:
            made, router = self.mlp(op, normed)
        else:
            made = self.mlp(op, normed)
        if self.mlp_output_norm is not None:
            made = self.mlp_output_norm(op, made)
        if deep is not None:
            made = op.Add(made, deep)
        residual, normed = self.next_norm(op, made, residual)
        return residual, normed, present, router

    def _mixed(
        self,
        op: Any,
        normed: Any,
        lengths: tuple[Any, Any],
        rotary: tuple[Any, Any, Any],
        past: tuple[Any, ...],
    ) -> tuple[Any, tuple[Any, Any]]:
        """Mixed values ``(1, length, heads · cache_head_dim)``, and the buffers."""
        mixed, key, value = op.GroupQueryAttention(
            *self._rotated(op, self.qkv(op, normed), rotary),
            *past,
            *lengths,
            *(rotary[:2] if self.fused_rotary else (None, None)),
            num_heads=self.num_heads,
            kv_num_heads=self.num_kv_heads,
            do_rotary=int(self.fused_rotary and self.rotary_channels > 0),
            **self.settings,
            _domain=CONTRIB,
            _outputs=3,
        )
        return mixed, (key, value)

    def _rotated(self, op: Any, qkv: Any, rotary: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Query, key and value as attention takes them: all in the first where it rotates."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key, value = op.Split(qkv, list(self.qkv_sizes), axis=-1, _outputs=3)
            query = self._normed_heads(op, self.q_norm, query, self.num_heads)
            key = self._normed_heads(op, self.k_norm, key, self.num_kv_heads)
            parts = zip((query, key, value), counts, strict=True)
            query, key, value = (pad_heads(op, part, count, self.spec) for part, count in parts)
            if self.fused_rotary:
                return query, key, value
        else:
            qkv = pad_heads(op, qkv, sum(counts), self.spec)
            if self.fused_rotary:
                return qkv, None, None
            sizes = [count * self.spec.cache_head_dim for count in counts]
            query, key, value = op.Split(qkv, sizes, axis=-1, _outputs=3)
        cos, sin, start = rotary
        settings = {"rotary_embedding_dim": self.rotary_channels, "_domain": CONTRIB}
        query, key = (
            op.RotaryEmbedding(states, start, cos, sin, num_heads=heads, **settings)
            for states, heads in ((query, self.num_heads), (key, self.num_kv_heads))
        )
        return query, key, value

    def _normed_heads(self, op: Any, norm: nn.Module, states: Any, heads: int) -> Any:
        """``(1, length, heads * head_dim)`` with each head normalised."""
        split = op.Reshape(states, [1, -1, heads, self.spec.head_dim])
        return op.Reshape(norm(op, split), [1, -1, heads * self.spec.head_dim])


class WatchedLayer(nn.Module):  # type: ignore[misc]
    """One layer by itself: ``hidden (1, length, hidden_size)`` to the residual stream after it, and
    the norm that is next. Positions begin with 0, nothing came before."""

    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__("layer")
        self.input_norm = Norm(weights, f"decoder.layers.{index}.input_norm", spec)
        self.layer = DecoderLayer(weights, index, spec)
        self.cos_cache = self.sin_cache = None
        if spec.rotary_channels and not spec.rope_sections and index not in spec.conv_layers:
            cos, sin = rotary_tables(spec, spec.has_sliding_rope(index))
            self.cos_cache, self.sin_cache = weights.parameter(cos), weights.parameter(sin)

    def forward(
        self,
        op: Any,
        hidden: Any,
        total_length: Any,
        past: tuple[Any, ...],
        tables: tuple[Any, ...] = (),
    ) -> tuple[Any, Any]:
        """``tables`` as of :class:`DecoderStage`."""
        turned = tables or (self.cos_cache, self.sin_cache)
        rotary = (*turned, op.Constant(value_ints=[0]))
        normed, lengths = self.input_norm(op, hidden), op.Sub(total_length, 1)
        after, following, _, _ = self.layer(
            op, hidden, normed, lengths, total_length, rotary, past, None, None
        )
        return after, following


class Norm(nn.Module):  # type: ignore[misc]
    """``size``: channels of a head, over which norms have no bias; ``hidden_size`` when not
    given."""

    def __init__(
        self, weights: WeightFile, name: str, spec: DecoderSpec, size: int | None = None
    ) -> None:
        super().__init__()
        self.epsilon, self.dialect = spec.norm_eps, weights.dialect
        if size is None:
            self.weight, self.bias = _norm_parameters(weights, name, spec)
        else:
            self.weight, self.bias = weights.parameter(weights.read(f"{name}.weight", size)), None

    def forward(self, op: Any, x: Any) -> Any:
        if self.bias is None:
            return self.dialect.rms_norm(op, x, self.weight, self.epsilon)
        return self.dialect.layer_norm(op, x, self.weight, self.bias, self.epsilon)


class SkipNorm(nn.Module):  # type: ignore[misc]
    """Adds to the residual stream; gives the sum and its norm."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        self.epsilon = spec.norm_eps
        self.weight, self.bias = _norm_parameters(weights, name, spec)

    def forward(self, op: Any, x: Any, residual: Any) -> tuple[Any, Any]:
        settings = {"epsilon": self.epsilon, "_domain": CONTRIB, "_outputs": 4}
        if self.bias is None:
            made = op.SkipSimplifiedLayerNormalization(x, residual, self.weight, **settings)
        else:
            made = op.SkipLayerNormalization(x, residual, self.weight, self.bias, **settings)
        normed, _, _, total = made
        return total, normed


def _norm_parameters(
    weights: WeightFile, name: str, spec: DecoderSpec
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight, and bias where the norm has one."""
    weight = weights.parameter(weights.read(f"{name}.weight", spec.hidden_size))
    if spec.norm == "rms":
        return weight, None
    return weight, weights.parameter(weights.read(f"{name}.bias", spec.hidden_size))


def soft_cap(op: Any, x: Any, cap: float) -> Any:
    """``cap · tanh(x / cap)``"""
    return op.Mul(op.Tanh(op.Mul(x, 1 / cap)), cap)


def _attention_settings(spec: DecoderSpec, index: int) -> dict[str, float]:
    """Return attributes of a layer's attention where its own choices would be wrong."""
    settings: dict[str, float] = {}
    if spec.cache_head_dim != spec.head_dim or spec.attention_scale is not None:
        settings["scale"] = spec.score_scale
    if spec.attention_softcap is not None:
        settings["softcap"] = spec.attention_softcap
    if spec.window(index):
        settings["local_window_size"] = spec.window(index)
    return settings


def has_fused_rotary(spec: DecoderSpec) -> bool:
    """Whether GroupQueryAttention can rotate: in heads of multiples of 16 channels, multiples of 8
    pairs, by positions of one axis. Without rotary positions there is nothing to rotate."""
    if spec.rope_sections:
        return False
    whole_heads = spec.cache_head_dim % 16 == 0
    return spec.rotary_channels == 0 or (whole_heads and spec.rotary_channels % 16 == 0)
