"""The decoder stage: embeddings and KV buffers to logits, on ONNX Runtime's CPU operators.

Attention writes the new keys and values into buffers that the caller owns (GroupQueryAttention with
shared past and present), so a step copies nothing and going back is a matter of ``total_length``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph.delta import GatedDelta
from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.experts import SparseMLP
from mobilevlm.export.graph.head_padding import cut_heads, pad_heads
from mobilevlm.export.graph.image_blocks import Blocks, attend_blocks, read_blocks
from mobilevlm.export.graph.layers import Linear, joined
from mobilevlm.export.graph.mlp import activate, build_mlp
from mobilevlm.export.graph.rotation import StreamRotation
from mobilevlm.export.graph.short_convolution import ShortConvolution
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.rotary import frequencies, rotary_tables


@dataclass(frozen=True)
class _Reach:
    """Inputs of attention in layers with one window."""

    seqlens: Any
    total: Any
    """Slots in the buffers after the run, and one less in ``seqlens``"""
    blocks: Blocks | None
    sound: Any | None = None
    """1 where the prompt has sound, else 0"""

    @classmethod
    def of(
        cls,
        op: Any,
        embeds: Any,
        lengths: tuple[Any, Any],
        image: tuple[Any, Any] | None,
        windows: list[int],
        several: bool = False,
        sound: Any | None = None,
    ) -> dict[int, _Reach]:
        """Return it by window. ``lengths``: slots after the run, of the whole sequence and in the
        buffers of sliding layers; ``several``: a run may be of several sequences of one length."""
        found = {}
        for window in sorted(set(windows)):
            total, blocks = lengths[window > 0], None
            if image is not None:
                length = op.Shape(embeds, start=1, end=2)
                blocks = read_blocks(op, *image, length, (lengths[0], total), window)
            seqlens = op.Sub(total, 1)
            if several:
                seqlens = op.Expand(seqlens, op.Shape(embeds, start=0, end=1))
            found[window] = cls(seqlens, total, blocks, sound)
        return found


class DecoderStage(nn.Module):  # type: ignore[misc]
    """``inputs_embeds (1, length, hidden_size)`` to ``logits (1, positions, vocab_size)`` of the
    positions asked for, and the KV buffers ``(1, num_key_value_heads, capacity,
    cache_head_dim)``; of each sparse layer also the router's logits, for verification."""

    has_tables = True
    """Rotary tables are inside the graph, unless positions have several axes"""

    def __init__(self, weights: WeightFile, spec: DecoderSpec, several: bool = False) -> None:
        """``several``: a run may be of several sequences of one length."""
        super().__init__("decoder")
        layers = range(spec.num_hidden_layers)
        self.several = several
        self.states: Any = None
        """Rows that the head reads, once the graph is made"""
        self.fused_rotary = all(has_fused_rotary(spec, index) for index in layers)
        self.windows = [spec.window(index) for index in layers]
        self.cos_cache = self.sin_cache = self.angles = self.positions = None
        self.sliding_cos = self.sliding_sin = self.sliding_angles = None
        self.sliding = [spec.has_sliding_rope(index) for index in layers]
        if self.has_tables and spec.rotary_channels and not spec.rope_sections:
            far = [index for index in layers if not self.sliding[index]]
            near = [index for index in layers if self.sliding[index]]
            if far:
                self.cos_cache, self.sin_cache, self.angles = _rotary(weights, spec, far)
            if near:
                stored = _rotary(weights, spec, near)
                self.sliding_cos, self.sliding_sin, self.sliding_angles = stored
        self.scalings = {sliding: spec.rope(sliding)[1] for sliding in set(self.sliding)}
        if spec.learned_positions:
            sizes = (spec.context_length, spec.hidden_size)
            table = weights.read("decoder.position_embedding.weight", *sizes)
            with weights.read_in_part(1 / spec.context_length):
                self.positions = weights.parameter(table)
        self.sources = [spec.kv_layer(index) for index in layers]
        self.layer_inputs = LayerInputs(weights, spec) if spec.layer_input_size else None
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
        window_length: Any | None = None,
        image: tuple[Any, Any] | None = None,
        sound: Any | None = None,
        stored: Any | None = None,
    ) -> tuple[Any, list[tuple[Any, ...]], dict[int, Any]]:
        """``tables``: cosine and sine of this run ``(length, rotary_channels / 2)``, for positions
        of several axes; ``deep``: what is added after some layers; ``window_length``: slots in the
        buffers of sliding layers after this run; ``image``: as of :func:`read_blocks`; ``sound``: 1
        where the prompt has sound, else 0; ``stored``: rows of the table of layers' own inputs
        ``(1, length, layers, layer_input_size)``."""
        lengths = (total_length, window_length)
        reach = _Reach.of(op, embeds, lengths, image, self.windows, self.several, sound)
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
        for sliding, angles in ((False, self.angles), (True, self.sliding_angles)):
            if angles is not None:
                rotary[sliding] = _turning(op, embeds, angles, self.scalings[sliding], start)
        if tables:
            rotary[False] = (*tables, op.Constant(value_ints=[0]))
        residual, normed = embeds, self.input_norm(op, embeds)
        own = None if self.layer_inputs is None else self.layer_inputs(op, embeds, stored)
        presents: list[tuple[Any, ...]] = []
        routers = {}
        for index, (layer, key_value) in enumerate(zip(self.layers, past, strict=True)):
            positions = logits_positions if index == len(past) - 1 else None
            if self.sources[index] != index:
                key_value = presents[self.sources[index]]
            residual, normed, present, router = layer(
                op,
                residual,
                normed,
                reach[self.windows[index]],
                rotary[self.sliding[index]],
                key_value,
                positions,
                deep.get(index),
                None if own is None else op.Gather(own, op.Constant(value_int=index), axis=2),
            )
            presents.append(present)
            if router is not None:
                routers[index] = router
        self.states = normed
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
        self.reads, spec = spec.kv_layer(index) != index, spec.at(index)
        name = f"decoder.layers.{index}"
        last = index == spec.num_hidden_layers - 1
        next_norm = "decoder.norm" if last else f"decoder.layers.{index + 1}.input_norm"
        self.spec, self.settings = spec, _attention_settings(spec, index)
        self.num_heads, self.num_kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        heads, kv_heads = self.num_heads * spec.head_dim, self.num_kv_heads * spec.head_dim
        hidden = spec.hidden_size
        qkv = [f"{name}.attn.{part}_proj" for part in "qkv"]
        self.qkv_sizes: tuple[int, ...] = (heads * (1 + spec.attention_gate), kv_heads, kv_heads)
        self.fused_rotary = has_fused_rotary(spec, index)
        self.rotary_channels = spec.rotary_channels
        self.short_conv = self.delta = self.q_norm = self.k_norm = None
        self.v_norm = None
        if spec.mixer(index) == "delta" and spec.delta is not None:
            self.delta, wide = GatedDelta(weights, f"{name}.delta", spec), spec.delta.value_size
            self.o_proj = Linear(weights, f"{name}.delta.out_proj", wide, hidden, bias=False)
        elif spec.mixer(index) == "short_conv":
            conv = f"{name}.short_conv"
            self.short_conv = ShortConvolution(weights, conv, spec)
            self.o_proj = Linear(weights, f"{conv}.out_proj", hidden, hidden, bias=spec.conv_bias)
        else:
            if self.reads:
                qkv, self.qkv_sizes = qkv[:1], self.qkv_sizes[:1]
                empty = np.zeros((1, 0, self.num_kv_heads * spec.cache_head_dim), np.float32)
                self.no_rows = weights.parameter(empty)
            self.qkv = joined(weights, qkv, hidden, self.qkv_sizes, bias=spec.qkv_bias)
            if spec.sound_rank:
                rank, attn = spec.sound_rank, f"{name}.attn"
                downs = [f"{attn}.q_down", f"{attn}.v_down"]
                self.lora_down = Linear(weights, downs, hidden, [rank, rank], bias=False)
                self.q_up = Linear(weights, f"{attn}.q_up", rank, heads, bias=False)
                self.v_up = Linear(weights, f"{attn}.v_up", rank, kv_heads, bias=False)
            self.o_proj = Linear(weights, f"{name}.attn.o_proj", heads, hidden, bias=spec.o_bias)
            if spec.qk_norm:
                self.q_norm = Norm(weights, f"{name}.attn.q_norm", spec, spec.head_dim)
            if spec.qk_norm and not self.reads:
                self.k_norm = Norm(weights, f"{name}.attn.k_norm", spec, spec.head_dim)
            if spec.value_norm:
                self.v_norm = Norm(weights, "", spec, spec.head_dim)
        self.post_attention_norm = None
        if not spec.parallel_residual:
            self.post_attention_norm = self.norm(weights, f"{name}.post_attention_norm", spec)
        self.is_sparse = spec.num_experts(index) > 0
        if self.is_sparse:
            self.mlp = SparseMLP(weights, f"{name}.mlp", spec, index)
        else:
            self.mlp = build_mlp(weights, f"{name}.mlp", spec)
        self.layer_input = None
        if spec.layer_input_size:
            self.layer_input = LayerInput(weights, f"{name}.layer_input", spec)
        self.scale = None
        if spec.layer_scale:
            self.scale = weights.parameter(weights.read(f"{name}.scale.weight", 1))
        self.ends_with_sum = self.layer_input is None and self.scale is None
        self.next_norm = (
            self.norm(weights, next_norm, spec)
            if self.ends_with_sum
            else Norm(weights, next_norm, spec)
        )
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
        reach: _Reach,
        rotary: tuple[Any, Any, Any],
        past: tuple[Any, ...],
        positions: Any | None,
        deep: Any | None,
        own: Any | None = None,
    ) -> tuple[Any, Any, tuple[Any, ...], Any | None]:
        apart, gate = self.delta or self.short_conv, None
        if apart is not None:
            mixed, present = apart(op, normed, *past)
        else:
            mixed, present, gate = self._mixed(op, normed, reach, rotary, past)
        if positions is not None:
            mixed = op.Gather(mixed, positions, axis=1)
            residual = op.Gather(residual, positions, axis=1)
            deep = None if deep is None else op.Gather(deep, positions, axis=1)
            gate = None if gate is None else op.Gather(gate, positions, axis=1)
            own = None if own is None else op.Gather(own, positions, axis=1)
        if apart is None:
            mixed = cut_heads(op, mixed, self.num_heads, self.spec)
        if gate is not None:
            mixed = op.Mul(mixed, op.Sigmoid(gate))
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
        if self.ends_with_sum:
            residual, normed = self.next_norm(op, made, residual)
            return residual, normed, present, router
        residual = op.Add(residual, made)
        if self.layer_input is not None:
            residual = op.Add(residual, self.layer_input(op, residual, own))
        if self.scale is not None:
            residual = op.Mul(residual, self.scale)
        return residual, self.next_norm(op, residual), present, router

    def _mixed(
        self,
        op: Any,
        normed: Any,
        reach: _Reach,
        rotary: tuple[Any, Any, Any],
        past: tuple[Any, ...],
    ) -> tuple[Any, tuple[Any, ...], Any | None]:
        """Mixed values ``(1, length, heads · cache_head_dim)``, the buffers, and the gate ``(1,
        length, heads · head_dim)`` where there is one."""
        qkv, gate = self.qkv(op, normed), None
        if reach.sound is not None:
            qkv = self._with_sound(op, qkv, normed, reach.sound)
        if self.spec.attention_gate:
            qkv, gate = self._without_gate(op, qkv)
        parts = self._query(op, qkv, rotary) if self.reads else self._rotated(op, qkv, rotary)
        made = op.GroupQueryAttention(
            *parts,
            *past,
            *(reach.seqlens, reach.total),
            *(rotary[:2] if self.fused_rotary else (None, None)),
            num_heads=self.num_heads,
            kv_num_heads=self.num_kv_heads,
            do_rotary=int(self.fused_rotary and self.rotary_channels > 0),
            **self.settings,
            _domain=CONTRIB,
            _outputs=1 if self.reads else 3,
        )
        mixed, key, value = (made, *past) if self.reads else made
        if reach.blocks is not None:
            buffers = key, value
            mixed = attend_blocks(
                op, reach.blocks, parts[0], buffers, mixed, self.spec, self._capped
            )
        return mixed, () if self.reads else (key, value), gate

    def _query(self, op: Any, query: Any, rotary: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Query, and no rows of keys and values, as attention takes them that reads the buffers of
        another layer."""
        if self.q_norm is not None:
            query = self._normed_heads(op, self.q_norm, query, self.num_heads)
        query = pad_heads(op, query, self.num_heads, self.spec)
        if not self.fused_rotary:
            query = self._turned(op, query, self.num_heads, rotary)
        return query, self.no_rows, self.no_rows

    def _with_sound(self, op: Any, qkv: Any, normed: Any, sound: Any) -> Any:
        """Add the products that act where the prompt has sound; 0 times them changes nothing."""
        narrow = op.Mul(self.lora_down(op, normed), sound)
        for_query, for_value = op.Split(narrow, axis=-1, num_outputs=2, _outputs=2)
        query, key, value = op.Split(qkv, list(self.qkv_sizes), axis=-1, _outputs=3)
        query = op.Add(query, self.q_up(op, for_query))
        return op.Concat(query, key, op.Add(value, self.v_up(op, for_value)), axis=-1)

    def _without_gate(self, op: Any, qkv: Any) -> tuple[Any, Any]:
        """Query, key and value, and the gates that stand behind the query of each head."""
        both, *others = op.Split(qkv, list(self.qkv_sizes), axis=-1, _outputs=3)
        heads = op.Reshape(both, [1, -1, self.num_heads, 2 * self.spec.head_dim])
        size = self.num_heads * self.spec.head_dim
        query, gate = (
            op.Reshape(part, [1, -1, size])
            for part in op.Split(heads, axis=-1, num_outputs=2, _outputs=2)
        )
        return op.Concat(query, *others, axis=-1), gate

    def _capped(self, op: Any, scores: Any) -> Any:
        cap = self.spec.attention_softcap
        return scores if cap is None else soft_cap(op, scores, cap)

    def _rotated(self, op: Any, qkv: Any, rotary: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Query, key and value as attention takes them: all in the first where it rotates."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            sizes = [count * self.spec.head_dim for count in counts]
            query, key, value = op.Split(qkv, sizes, axis=-1, _outputs=3)
            query = self._normed_heads(op, self.q_norm, query, self.num_heads)
            key = self._normed_heads(op, self.k_norm, key, self.num_kv_heads)
            if self.v_norm is not None:
                value = self._normed_heads(op, self.v_norm, value, self.num_kv_heads)
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
        query = self._turned(op, query, self.num_heads, rotary)
        return query, self._turned(op, key, self.num_kv_heads, rotary), value

    def _turned(self, op: Any, states: Any, heads: int, rotary: tuple[Any, Any, Any]) -> Any:
        cos, sin, start = rotary
        settings = {"rotary_embedding_dim": self.rotary_channels, "_domain": CONTRIB}
        return op.RotaryEmbedding(states, start, cos, sin, num_heads=heads, **settings)

    def _normed_heads(self, op: Any, norm: nn.Module, states: Any, heads: int) -> Any:
        """``(1, length, heads * head_dim)`` with each head normalised."""
        split = op.Reshape(states, [1, -1, heads, self.spec.head_dim])
        return op.Reshape(norm(op, split), [1, -1, heads * self.spec.head_dim])


class LayerInputs(nn.Module):  # type: ignore[misc]
    """Own inputs of all layers ``(1, length, layers, layer_input_size)``, of the embeddings and of
    the rows of a table, which are scaled already."""

    def __init__(self, weights: WeightFile, spec: DecoderSpec) -> None:
        super().__init__()
        name, self.dialect = "decoder.layer_inputs", weights.dialect
        self.shape = [1, -1, spec.num_hidden_layers, spec.layer_input_size]
        width = spec.layer_input_width
        self.proj = Linear(weights, f"{name}.proj", spec.hidden_size, width, bias=False)
        # The factor 1 / sqrt(hidden_size) before a norm changes its epsilon only.
        self.epsilon = spec.norm_eps * spec.hidden_size
        norm = weights.read(f"{name}.norm.weight", spec.layer_input_size)
        self.weight = weights.parameter(norm * np.float32(2**-0.5))

    def forward(self, op: Any, embeds: Any, stored: Any) -> Any:
        made = op.Reshape(self.proj(op, embeds), self.shape)
        made = self.dialect.rms_norm(op, made, self.weight, self.epsilon)
        return op.Add(made, op.Mul(stored, 2**-0.5))


class LayerInput(nn.Module):  # type: ignore[misc]
    """Residual branch of a layer's own input: a gate of the stream times that input, projected."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.layer_input_size
        self.activation, self.dialect = spec.hidden_act, weights.dialect
        self.gate = Linear(weights, f"{name}.gate", hidden, inner, bias=False)
        self.proj = Linear(weights, f"{name}.proj", inner, hidden, bias=False)
        self.norm = Norm(weights, f"{name}.norm", spec)

    def forward(self, op: Any, hidden: Any, own: Any) -> Any:
        wide = activate(op, self.activation, self.gate(op, hidden), self.dialect)
        return self.norm(op, self.proj(op, op.Mul(wide, own)))


class WatchedLayer(nn.Module):  # type: ignore[misc]
    """One layer by itself: ``hidden (1, length, hidden_size)`` to the residual stream after it.
    Positions begin with 0, nothing came before."""

    def __init__(self, weights: WeightFile, index: int, spec: DecoderSpec) -> None:
        super().__init__("layer")
        self.index = index
        self.input_norm = Norm(weights, f"decoder.layers.{index}.input_norm", spec)
        self.layer = DecoderLayer(weights, index, spec)
        self.cos_cache = self.sin_cache = self.angles = None
        self.scaling = spec.rope(spec.has_sliding_rope(index))[1]
        if spec.rotary_channels and not spec.rope_sections and spec.mixer(index) == "attn":
            stored = _rotary(weights, spec, [index])
            self.cos_cache, self.sin_cache, self.angles = stored

    def forward(
        self,
        op: Any,
        hidden: Any,
        total_length: Any,
        past: tuple[Any, ...],
        tables: tuple[Any, ...] = (),
        image: tuple[Any, Any] | None = None,
        deep: Any | None = None,
        sound: Any | None = None,
        own: Any | None = None,
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Return the residual stream, the norm that is next, and the buffers. ``tables``, ``image``
        and ``sound`` as of :class:`DecoderStage`; ``deep``: what is added after the layer; ``own``:
        the layer's own input ``(1, length, layer_input_size)``."""
        start = op.Constant(value_ints=[0])
        if self.angles is None:
            rotary = (*(tables or (self.cos_cache, self.sin_cache)), start)
        else:
            rotary = _turning(op, hidden, self.angles, self.scaling, start)
        window = self.layer.spec.window(self.index)
        lengths = (total_length, total_length)
        [reach] = _Reach.of(op, hidden, lengths, image, [window], sound=sound).values()
        normed = self.input_norm(op, hidden)
        after, following, present, _ = self.layer(
            op, hidden, normed, reach, rotary, past, None, deep, own
        )
        return after, following, present


class Norm(nn.Module):  # type: ignore[misc]
    """``size``: channels of a head, over which norms have no bias; ``hidden_size`` when not
    given. Without a ``name`` it has no weight."""

    def __init__(
        self, weights: WeightFile, name: str, spec: DecoderSpec, size: int | None = None
    ) -> None:
        super().__init__()
        self.epsilon, self.dialect = spec.norm_eps, weights.dialect
        if size is None:
            self.weight, self.bias = _norm_parameters(weights, name, spec)
        else:
            weight = weights.read(f"{name}.weight", size) if name else np.ones(size, np.float32)
            self.weight, self.bias = weights.parameter(weight), None

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


LARGEST_TABLES = 1 << 23
"""Bytes of cosines and sines that a graph stores, where no operator asks for them: of the 131072
positions of Gemma 3 4B they would take 268 MB."""


def _rotary(
    weights: WeightFile, spec: DecoderSpec, layers: Sequence[int]
) -> tuple[Any | None, Any | None, Any | None]:
    """Return cosine and sine of all positions in layers that rotate alike, or the radians of a step
    ``(1, rotary_channels / 2)``, from which the graph makes those of a run."""
    sliding, size = spec.has_sliding_rope(layers[0]), 4 * spec.context_length
    is_fused = any(has_fused_rotary(spec, index) for index in layers)
    spec = spec.at(layers[0])
    if is_fused or size * spec.rotary_channels <= LARGEST_TABLES:
        cos, sin = rotary_tables(spec, sliding)
        return weights.parameter(cos), weights.parameter(sin), None
    return None, None, weights.parameter(frequencies(spec, spec.rope(sliding)[0])[None])


def _turning(op: Any, states: Any, angles: Any, scaling: float, start: Any) -> tuple[Any, Any, Any]:
    """Return cosine and sine ``(length, rotary_channels / 2)`` of a run ``states (1, length,
    channels)``, which begins at the position ``start (1,)``, and the row of its first position."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    length = op.Squeeze(op.Shape(states, start=1, end=2), [0])
    positions = op.Cast(op.Add(op.Range(zero, length, one), start), to=ir.DataType.FLOAT)
    steps = op.Div(op.Unsqueeze(positions, [1]), op.Constant(value_float=float(scaling)))
    turned = op.Mul(steps, angles)
    return op.Cos(turned), op.Sin(turned), op.Constant(value_ints=[0])


def has_fused_rotary(spec: DecoderSpec, index: int) -> bool:
    """Return whether GroupQueryAttention can rotate in a layer: in heads of multiples of 16
    channels, multiples of 8 pairs, by positions of one axis that are those of the slots in its
    buffers, and where nobody else needs queries. Without rotary positions there is nothing to
    rotate."""
    if spec.rope_sections or spec.window(index) or spec.image_blocks:
        return False
    spec = spec.at(index)
    whole_heads = spec.cache_head_dim % 16 == 0
    return spec.rotary_channels == 0 or (whole_heads and spec.rotary_channels % 16 == 0)
