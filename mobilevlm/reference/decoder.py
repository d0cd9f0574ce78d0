"""The language model: attention, MLP or experts, and the norms between, as the spec says.

With a spec's defaults it is Llama (Touvron et al. 2023): RMSNorm, rotary attention, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.reference.delta import GatedDelta
from mobilevlm.reference.experts import SparseMLP
from mobilevlm.reference.mlp import activate, build_mlp
from mobilevlm.reference.norms import RMSNorm
from mobilevlm.reference.steps import State, Step, Stepped, run_steps


def build_norm(spec: DecoderSpec) -> nn.Module:
    """The kind of norm that the spec names."""
    if spec.norm == "rms":
        return RMSNorm(spec.hidden_size, spec.norm_eps)
    return nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)


def rotary_tables(spec: DecoderSpec, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(…, length, rotary_channels / 2)`` of integer positions ``(…, length)`` in
    a layer; where they have several axes, of ``(axes, length)``, or of ``(length,)`` on all."""
    spec = spec.at(layer)
    theta, scaling = spec.rope(spec.has_sliding_rope(layer))
    channels = spec.rotary_channels
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / theta ** (exponent / channels)
    if spec.turned_pairs is not None:
        frequency[spec.turned_pairs :] = 0
    angle = (positions.float() / scaling)[..., None] * frequency
    if spec.rope_sections and positions.dim() > 1:
        angle = _by_axis(spec, angle)
    return angle.cos(), angle.sin()


def _by_axis(spec: DecoderSpec, angle: Tensor) -> Tensor:
    """Angles ``(length, rotary_channels / 2)``, each of its axis, from those of all axes ``(axes,
    length, rotary_channels / 2)`` (``apply_multimodal_rotary_pos_emb`` of Qwen2.5-VL,
    ``apply_interleaved_mrope`` of Qwen3-VL)."""
    sections = spec.rope_sections
    if not spec.rope_interleaved:
        parts = torch.split(angle, list(sections), dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    mixed = angle[0].clone()
    for axis, count in enumerate(sections[1:], 1):
        places = slice(axis, count * len(sections), len(sections))
        mixed[:, places] = angle[axis, :, places]
    return mixed


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + rotary_channels / 2) of ``(…, heads, length, head_dim)``; channels
    beyond them stay as they are."""
    half = cos.shape[-1]
    first, second = states[..., :half], states[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, states[..., 2 * half :]], dim=-1)


def block_mask(length: int, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """Mask ``(1, 1, length, length)``, true where attended: the past, and all of a query's own
    block. ``blocks``: first position, and that behind the last."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for start, end in blocks:
        seen[start:end, start:end] = True
    return seen[None, None]


def soft_cap(values: Tensor, cap: float | None) -> Tensor:
    """``cap · tanh(values / cap)``; without a cap the values."""
    return values if cap is None else torch.tanh(values / cap) * cap


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec, window: int = 0, reads: bool = False) -> None:
        """``reads``: keys and values are those of another layer."""
        super().__init__()
        self.head_dim, self.window, self.reads = spec.head_dim, window, reads
        self.value_eps = spec.norm_eps if spec.value_norm else None
        self.num_heads, self.num_kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        heads, kv_heads = self.num_heads * spec.head_dim, self.num_kv_heads * spec.head_dim
        self.is_gated = spec.attention_gate
        asked = 2 * heads if spec.attention_gate else heads
        self.q_proj = nn.Linear(spec.hidden_size, asked, bias=spec.qkv_bias)
        if not reads:
            self.k_proj = nn.Linear(spec.hidden_size, kv_heads, bias=spec.qkv_bias)
            self.v_proj = nn.Linear(spec.hidden_size, kv_heads, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(heads, spec.hidden_size, bias=spec.o_bias)
        self.rank = spec.sound_rank
        if spec.sound_rank:
            self.q_down = nn.Linear(spec.hidden_size, spec.sound_rank, bias=False)
            self.q_up = nn.Linear(spec.sound_rank, heads, bias=False)
            self.v_down = nn.Linear(spec.hidden_size, spec.sound_rank, bias=False)
            self.v_up = nn.Linear(spec.sound_rank, kv_heads, bias=False)
        self.has_norms = spec.qk_norm
        self.scale, self.cap = spec.attention_scale, spec.attention_softcap
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps)
            if not reads:
                self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        heard: bool = False,
        shared: list[Tensor] | None = None,
    ) -> Tensor:
        """``heard``: the prompt has sound; ``shared``: keys and values of the layer that this one
        reads; an empty list is given those that it makes."""
        batch, length, _ = hidden.shape
        asked = self.q_proj(hidden)
        if heard and self.rank:
            asked = asked + self.q_up(self.q_down(hidden))
        query = asked.view(batch, length, self.num_heads, -1).transpose(1, 2)
        gate = None
        if self.is_gated:
            query, gate = query.chunk(2, dim=-1)
        if self.has_norms:
            query = self.q_norm(query)
        query = rotate(query, *rotary)
        key, value = shared or self._keys_and_values(hidden, rotary, heard)
        if shared == []:
            shared += [key, value]
        if 0 < self.window < length:
            mask = self._in_window(mask, length, hidden.device)
        attend = self._plain if self.cap is None else self._capped
        mixed = attend(query, key, value, mask)
        if gate is not None:
            mixed = mixed * gate.sigmoid()
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _keys_and_values(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], heard: bool
    ) -> tuple[Tensor, Tensor]:
        values = self.v_proj(hidden)
        if heard and self.rank:
            values = values + self.v_up(self.v_down(hidden))
        key, value = (
            part.unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)
            for part in (self.k_proj(hidden), values)
        )
        if self.has_norms:
            key = self.k_norm(key)
        if self.value_eps is not None:
            value = F.rms_norm(value, value.shape[-1:], eps=self.value_eps)
        return rotate(key, *rotary), value

    def _in_window(self, mask: Tensor | None, length: int, device: torch.device) -> Tensor:
        """Return the mask without keys that lie a window or more before their query."""
        everywhere = torch.ones(length, length, dtype=torch.bool, device=device)
        seen = everywhere.tril() if mask is None else mask
        return seen & everywhere.triu(1 - self.window)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention whose scores have a soft cap, ``(batch, heads, length, head_dim)``."""
        if mask is None:
            length = query.shape[2]
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        group = self.num_heads // self.num_kv_heads
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        scores = soft_cap(query @ key.transpose(2, 3) * scale, self.cap)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


class ShortConvolution(nn.Module):
    """A causal convolution of each channel between two gates (LFM2)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        size, kernel, bias = spec.hidden_size, spec.conv_kernel, spec.conv_bias
        self.in_proj = nn.Linear(size, 3 * size, bias=bias)
        self.conv = nn.Conv1d(size, size, kernel, groups=size, padding=kernel - 1, bias=bias)
        self.out_proj = nn.Linear(size, size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        before, after, values = self.in_proj(hidden).chunk(3, dim=-1)
        mixed = self.conv((before * values).transpose(1, 2))[..., : hidden.shape[1]]
        return self.out_proj(after * mixed.transpose(1, 2))  # type: ignore[no-any-return]


class LayerInput(nn.Module):
    """The residual stream, and what a layer's own input makes of it (Gemma 3n, Gemma 4)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden_size, spec.layer_input_size, bias=False)
        self.proj = nn.Linear(spec.layer_input_size, spec.hidden_size, bias=False)
        self.norm = build_norm(spec)
        self.activation = spec.hidden_act

    def forward(self, hidden: Tensor, own: Tensor) -> Tensor:
        wide = activate(self.activation, self.gate(hidden)) * own
        return hidden + self.norm(self.proj(wide))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned number that a layer's output is multiplied by (Gemma 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


class DecoderLayer(nn.Module):
    def __init__(self, spec: DecoderSpec, index: int) -> None:
        super().__init__()
        reads, spec = spec.kv_layer(index) != index, spec.at(index)
        self.input_norm = build_norm(spec)
        self.mixer = spec.mixer(index)
        if self.mixer == "attn":
            self.attn = Attention(spec, spec.window(index), reads)
        elif self.mixer == "delta":
            self.delta = GatedDelta(spec)
        else:
            self.short_conv = ShortConvolution(spec)
        if not spec.parallel_residual:
            self.post_attention_norm = build_norm(spec)
        self.mlp = SparseMLP(spec, index) if spec.num_experts(index) else build_mlp(spec)
        self.parallel, self.has_post_norms = spec.parallel_residual, spec.post_norms
        if spec.post_norms:
            self.attn_output_norm, self.mlp_output_norm = build_norm(spec), build_norm(spec)
        self.layer_input = LayerInput(spec) if spec.layer_input_size else None
        self.scale = LayerScale() if spec.layer_scale else None

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        heard: bool = False,
        shared: list[Tensor] | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """``shared`` as of :class:`Attention`; ``own``: the layer's own input ``(batch, length,
        layer_input_size)``."""
        normed = self.input_norm(hidden)
        given = (rotary, mask, heard, shared) if self.mixer == "attn" else ()
        mixed = getattr(self, self.mixer)(normed, *given)
        hidden = hidden + (self.attn_output_norm(mixed) if self.has_post_norms else mixed)
        if not self.parallel:
            normed = self.post_attention_norm(hidden)
        made = self.mlp(normed)
        hidden = hidden + (self.mlp_output_norm(made) if self.has_post_norms else made)
        if self.layer_input is not None and own is not None:
            hidden = self.layer_input(hidden, own)
        return hidden if self.scale is None else self.scale(hidden)


class TokenEmbedding(nn.Embedding):
    """Rows of the table, times the scale that the spec names."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec.vocab_size, spec.hidden_size)
        self.scale = spec.embed_scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows if self.scale == 1 else rows * self.scale


class RowTable(nn.Module):
    """Rows of a table by token, which are read from the checkpoint when they are asked for, since
    the table is larger than all else."""

    rows_at: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    """Rows ``(…, columns)`` of tokens"""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.rows_at(ids.numpy()))


class LayerInputs(nn.Module):
    """Inputs of all layers ``(batch, length, layers, layer_input_size)``: a projection of the
    embeddings beside rows of a table by token, ``decoder.embed_layers``."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.shape = (spec.num_hidden_layers, spec.layer_input_size)
        self.factor, self.table_factor = spec.hidden_size**-0.5, spec.layer_input_size**0.5
        self.proj = nn.Linear(spec.hidden_size, spec.layer_input_width, bias=False)
        self.norm = RMSNorm(spec.layer_input_size, spec.norm_eps)

    def forward(self, embeds: Tensor, stored: Tensor) -> Tensor:
        """``stored``: rows of the table."""
        of_embeds = self.norm(self._by_layer(self.proj(embeds) * self.factor))
        of_tokens = self._by_layer(stored) * self.table_factor
        return (of_embeds + of_tokens) * 2**-0.5  # type: ignore[no-any-return]

    def _by_layer(self, rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:-1], *self.shape)


class Decoder(Stepped):
    """Embeddings ``(batch, length, hidden_size)`` to logits ``(batch, length, vocab_size)``. The
    head follows the steps."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = TokenEmbedding(spec)
        if spec.learned_positions:
            self.position_embedding = nn.Embedding(spec.context_length, spec.hidden_size)
        if spec.layer_input_size:
            self.embed_layers = RowTable()
            self.layer_inputs = LayerInputs(spec)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, index) for index in range(spec.num_hidden_layers)
        )
        self.norm = build_norm(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=spec.lm_head_bias)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def start(
        self,
        embeds: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        deep: Sequence[Tensor] = (),
        heard: bool = False,
        ids: Tensor | None = None,
    ) -> State:
        """Return the state before the first step. ``positions``: ``(length,)`` or
        ``(batch, 1, length)``, 0, 1, 2 … when not given; of several axes ``(axes, length)``.
        ``mask``: bool ``(batch, 1, length, length)``, true where attended; causal when not given.
        ``deep``: what is added after each of ``deep_layers``, as ``embeds``; ``heard``: the prompt
        has sound; ``ids``: tokens ``(batch, length)`` whose rows are the layers' own inputs, where
        layers have some."""
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)
        layers = self.spec.deep_layers if deep else ()
        given = {f"deep.{layer}": rows for layer, rows in zip(layers, deep, strict=True)}
        if mask is not None:
            given["mask"] = mask
        if heard:
            given["heard"] = torch.ones(1)
        if self.spec.layer_input_size:
            assert ids is not None, "ids of the rows, which layers look their own inputs up by"
            given["ids"] = ids
        return State(embeds, {**given, "positions": positions})

    def answered(self, prompt: State, answer: Sequence[int]) -> State:
        """Return the state of a prompt and its answer before the first step; ``prompt``: that of
        one prompt, from :meth:`start`."""
        count, given = len(answer), prompt.given
        tokens = self.embed_tokens(torch.tensor([answer]).long())
        placed, mask = given["positions"], given.get("mask")
        following = int(placed.max()) + 1 + torch.arange(count)
        placed = torch.cat([placed, following.expand(*placed.shape[:-1], count)], dim=-1)
        if mask is not None:
            length = mask.shape[-1]
            mask = F.pad(mask, (0, count, 0, count))
            mask[..., length:, :] = block_mask(length + count, ())[..., length:, :]
        names = [f"deep.{layer}" for layer in self.spec.deep_layers]
        deep = [F.pad(given[name], (0, 0, 0, count)) for name in names if name in given]
        whole = torch.cat([prompt.hidden, tokens], dim=1)
        ids = given.get("ids")
        if ids is not None:
            ids = torch.cat([ids, torch.tensor([answer]).long()], dim=1)
        return self.start(whole, placed, mask, deep, "heard" in given, ids)

    def steps(self) -> Iterator[Step]:
        """Yield the layers and the last norm, whose output the head reads."""
        if self.spec.learned_positions:
            yield Step("position_embedding", self.position_embedding, self._add_positions)
        if self.spec.layer_input_size:
            yield Step("embed_layers", self.embed_layers, self._look_up_layers)
            yield Step("layer_inputs", self.layer_inputs, self._make_layer_inputs)
        for index, layer in enumerate(self.layers):
            yield Step(f"layers.{index}", layer, partial(self._run_layer, index))
        yield Step.of("norm", self.norm)

    def _add_positions(self, state: State) -> State:
        return state.then(state.hidden + self.position_embedding(state.given["positions"]))

    def _look_up_layers(self, state: State) -> State:
        return state.then(state.hidden, stored=self.embed_layers(state.given["ids"]))

    def _make_layer_inputs(self, state: State) -> State:
        inputs = self.layer_inputs(state.hidden, state.given["stored"])
        return state.then(state.hidden, layer_inputs=inputs)

    def _run_layer(self, index: int, state: State) -> State:
        spec, given = self.spec, state.given
        rotary = rotary_tables(spec, given["positions"], index)
        source, own = spec.kv_layer(index), given.get("layer_inputs")
        names = [f"{source}.key", f"{source}.value"]
        shared = [given[name] for name in names] if source != index else []
        hidden = self.layers[index](
            state.hidden,
            rotary,
            given.get("mask"),
            "heard" in given,
            shared,
            None if own is None else own[:, :, index],
        )
        kept = dict(zip(names, shared, strict=True)) if index in spec.kv_sources else {}
        added = given.get(f"deep.{index}")
        return state.then(hidden if added is None else hidden + added, **kept)

    def forward(  # type: ignore[override]
        self,
        embeds: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        deep: Sequence[Tensor] = (),
    ) -> Tensor:
        """See :meth:`start` for the arguments."""
        state = run_steps(self.steps(), self.start(embeds, positions, mask, deep))
        return self.logits(state.hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(…, vocab_size)`` of what the steps give ``(…, hidden_size)``."""
        return soft_cap(self.lm_head(hidden), self.spec.logit_softcap)

    @property
    def sparse_layers(self) -> dict[int, SparseMLP]:
        """The experts of each layer that has some; they know what the last pass chose."""
        return {
            index: layer.mlp
            for index, layer in enumerate(self.layers)
            if isinstance(layer.mlp, SparseMLP)
        }
