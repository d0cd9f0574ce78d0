"""Checks of what a manifest says about the language model, as those of
:mod:`mobilevlm.bundle_checks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mobilevlm.linear_groups import decoder_groups
from mobilevlm.number_checks import (
    Check,
    check_layers,
    check_positive,
    check_weights,
    check_whole,
    shortened,
    size_of,
)

if TYPE_CHECKING:
    from mobilevlm.decoder_spec import DecoderSpec

MOST_POSITIONS = 1 << 20
"""Most positions of a context"""
MOST_AXES = 4
"""Axes of a position"""
MOST_KERNEL = 64
"""Positions that a short convolution reads"""
MOST_STATE = 1 << 24
"""Numbers that a gated delta layer keeps of a sequence; Qwen3.5 has 2¹⁸ to 2²⁰."""
MOST_EXPERTS = 1 << 16
"""Experts of all layers together"""


def check_decoder(decoder: DecoderSpec, total: int) -> Iterator[Check]:
    """Check the language model. ``total``: bytes of the bundle's files."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim context_length"
    )
    yield from check_whole("decoder", decoder, names)
    yield from check_whole("decoder", decoder, "encoder_layers", 0)
    names = (
        "norm_eps rope_theta rope_scaling attention_scale embed_scale sliding_rope_theta "
        "attention_softcap logit_softcap"
    )
    yield from check_positive("decoder", decoder, names)
    for name in ("num_hidden_layers", "encoder_layers"):
        yield check_layers(f"decoder.{name}", getattr(decoder, name))
    length = decoder.context_length
    yield "decoder.context_length", length, length <= MOST_POSITIONS, f"at most {MOST_POSITIONS}"
    heads, groups = decoder.num_attention_heads, decoder.num_key_value_heads
    expected = f"a divisor of {shortened(heads)} heads"
    yield "decoder.num_key_value_heads", groups, heads % groups == 0, expected
    channels, most = decoder.rotary_channels, decoder.head_dim
    is_right = 0 <= channels <= most and channels % 2 == 0
    yield "decoder.rotary_dim", channels, is_right, f"an even number up to {shortened(most)}"
    start = decoder.start_token_id
    is_right = 0 <= start < decoder.vocab_size
    yield "decoder.start_token_id", start, is_right, "an id of the vocabulary"
    yield from _blocks(decoder)
    buckets = decoder.relative_positions
    if buckets is not None:
        yield from check_whole("decoder.relative_positions", buckets, "num_buckets max_distance")
        yield check_weights("decoder.relative_positions", buckets.num_buckets * heads, total)
    yield from _experts(decoder)
    yield check_weights("decoder", size_of(decoder_groups(decoder)), total)


def _blocks(decoder: DecoderSpec) -> Iterator[Check]:
    yield from check_whole("decoder", decoder, "sliding_window", 0)
    is_right = decoder.embed_scale == 1 or not decoder.encoder_layers
    yield "decoder.embed_scale", decoder.embed_scale, is_right, "1 beside an encoder"
    layers, window = decoder.sliding_layers, decoder.sliding_window
    is_right = _ascending(layers, decoder) and (window > 0) == (len(layers) > 0)
    yield "decoder.sliding_layers", layers, is_right, "layers of the decoder, and a sliding_window"
    is_right = not (decoder.post_norms and decoder.parallel_residual)
    yield "decoder.post_norms", decoder.post_norms, is_right, "none beside parallel_residual"
    sections, pairs = decoder.rope_sections, decoder.rotary_channels // 2
    is_right = not sections or (min(sections) >= 0 and sum(sections) == pairs)
    is_right = is_right and len(sections) <= MOST_AXES
    yield "decoder.rope_sections", sections, is_right, f"up to {MOST_AXES}, together {pairs}"
    other = "learned_positions" if decoder.learned_positions else "sliding_rope_theta"
    is_right = not (sections and getattr(decoder, other))
    yield "decoder.rope_sections", sections, is_right, f"none beside {other}"
    layers, kernel = decoder.conv_layers, decoder.conv_kernel
    is_right = _ascending(layers, decoder) and len(layers) < decoder.num_hidden_layers
    yield "decoder.conv_layers", layers, is_right, "layers of the decoder, and not all of them"
    is_right = 2 <= kernel <= MOST_KERNEL if layers else kernel == 0
    yield "decoder.conv_kernel", kernel, is_right, f"2 to {MOST_KERNEL} where there are conv_layers"
    yield from _delta(decoder)
    yield from _own_sizes(decoder)
    is_right = _ascending(decoder.deep_layers, decoder)
    yield "decoder.deep_layers", decoder.deep_layers, is_right, "layers of the decoder"
    for name in (
        "qk_norm",
        "post_norms",
        "sliding_layers",
        "attention_softcap",
        "logit_softcap",
        "rope_sections",
        "conv_layers",
        "deep_layers",
        "image_blocks",
        "attention_gate",
        "delta",
        "value_norm",
        "shared_kv_layers",
        "layer_input_size",
        "layer_scale",
    ):
        value = getattr(decoder, name)
        is_right = not (value and decoder.encoder_layers)
        yield f"decoder.{name}", value, is_right, "none beside an encoder (encoder_layers)"


def _own_sizes(decoder: DecoderSpec) -> Iterator[Check]:
    """Check sizes that some layers have for themselves, and inputs of layers."""
    names = "global_head_dim shared_kv_layers shared_intermediate_size layer_input_size"
    yield from check_whole("decoder", decoder, names, 0)
    head = decoder.global_head_dim
    is_right = head % 2 == 0 and (head == 0 or decoder.rotary_dim is None)
    yield "decoder.global_head_dim", head, is_right, "an even number, without rotary_dim"
    pairs, most = decoder.turned_pairs, (head or decoder.rotary_channels) // 2
    is_right = pairs is None or (0 <= pairs <= most and not decoder.rope_sections)
    yield "decoder.turned_pairs", pairs, is_right, f"up to {shortened(most)}, and one axis"
    count, shared = decoder.num_hidden_layers, decoder.shared_kv_layers
    kinds = [decoder.window(layer) for layer in range(count)]
    is_right = shared < count and set(kinds[count - shared :]) <= set(kinds[: count - shared])
    others = decoder.conv_layers or decoder.delta or decoder.attention_gate or decoder.image_blocks
    is_right = is_right and not (shared and (others or not decoder.qk_norm or decoder.sound_rank))
    expected = "layers behind others of their kinds, with norms of queries, of attention alone"
    yield "decoder.shared_kv_layers", shared, is_right, expected
    is_right = not decoder.value_norm or decoder.qk_norm
    yield "decoder.value_norm", decoder.value_norm, is_right, "none without qk_norm"
    width = decoder.layer_input_width
    yield "the inputs of all layers", width, width <= MOST_STATE, f"at most {MOST_STATE} numbers"
    index = decoder.layer_input_id
    yield "decoder.layer_input_id", index, 0 <= index < decoder.vocab_size, "an id"
    is_right = not (decoder.layer_scale or decoder.layer_input_size) or not decoder.deep_layers
    yield "decoder.deep_layers", decoder.deep_layers, is_right, "none beside inputs of layers"


def _delta(decoder: DecoderSpec) -> Iterator[Check]:
    delta = decoder.delta
    if delta is None:
        return
    names = " ".join(field.name for field in dataclasses.fields(delta)[1:])
    yield from check_whole("decoder.delta", delta, names)
    is_right = _ascending(delta.layers, decoder) and len(delta.layers) > 0
    is_right = is_right and len(delta.layers) < decoder.num_hidden_layers
    yield "delta.layers", delta.layers, is_right, "layers of the decoder, and not all of them"
    is_right = not decoder.conv_layers
    yield "decoder.conv_layers", decoder.conv_layers, is_right, "none beside gated delta layers"
    is_right = delta.value_heads % delta.key_heads == 0
    yield "delta.value_heads", delta.value_heads, is_right, f"a multiple of {delta.key_heads}"
    is_right = 2 <= delta.kernel <= MOST_KERNEL
    yield "delta.kernel", delta.kernel, is_right, f"2 to {MOST_KERNEL}"
    size = delta.value_heads * delta.key_dim * delta.value_dim
    yield "the state of a delta layer", size, size <= MOST_STATE, f"at most {MOST_STATE} numbers"


def _ascending(layers: tuple[int, ...], decoder: DecoderSpec) -> bool:
    """Return whether these are different layers of the decoder, in order."""
    inside = all(0 <= layer < decoder.num_hidden_layers for layer in layers)
    return inside and list(layers) == sorted(set(layers))


def _experts(decoder: DecoderSpec) -> Iterator[Check]:
    experts = decoder.experts
    if experts is None:
        return
    layers, counts = experts.layers, experts.num_experts
    is_right = list(layers) == sorted(set(layers)) and len(layers) == len(counts) > 0
    is_right = is_right and layers[0] >= 0 and layers[-1] < decoder.num_hidden_layers
    yield "experts.layers", layers, is_right, "layers of the decoder, each with its experts"
    is_right = all(1 <= experts.top_k <= count < 1 << 16 for count in counts)
    yield "experts.num_experts", counts, is_right, f"at least top_k {shortened(experts.top_k)}"
    count = sum(counts)
    yield "the number of experts", count, count <= MOST_EXPERTS, f"at most {MOST_EXPERTS}"
