"""Checks of what a manifest says about images out, as those of :mod:`mobilevlm.bundle_checks`."""

from __future__ import annotations

from collections.abc import Iterator

from mobilevlm.linear_groups import output_groups
from mobilevlm.number_checks import (
    Check,
    check_layers,
    check_positive,
    check_weights,
    check_whole,
    shortened,
    size_of,
)
from mobilevlm.spec import ModelSpec

MOST_LEVELS = 16
"""Levels of a decoder of codes"""
LARGEST_EDGE = 1 << 13
"""Pixels along an edge of an image"""


def check_output(spec: ModelSpec, total: int) -> Iterator[Check]:
    """Check the output for images, and that the decoder may have one. ``total``: bytes of the
    bundle's files."""
    output, width, decoder = spec.drawing, spec.decoder.hidden_size, spec.decoder
    for part, layers in {
        "conv_layers": decoder.conv_layers,
        "rope_sections": decoder.rope_sections,
        "sliding_layers": decoder.sliding_layers,
        "encoder_layers": decoder.encoder_layers,
        "qk_norm": decoder.qk_norm,
        "delta": decoder.delta,
    }.items():
        yield f"decoder.{part}", layers, not layers, "none of a model that makes images"
    yield from check_whole("output", output, "num_codes code_size grid head_size embed_depth")
    yield check_layers("output.embed_depth", output.embed_depth)
    levels, most = len(output.decoder.widths), decoder.context_length
    yield "output.grid", output.grid, output.num_tokens < most, f"codes that fit into {most}"
    yield "output.widths", levels, 1 <= levels <= MOST_LEVELS, f"1 to {MOST_LEVELS} levels"
    edge = output.edge
    yield "the edge of an image", edge, edge <= LARGEST_EDGE, f"at most {LARGEST_EDGE} pixels"
    yield from check_whole("output", output.decoder, "latent_size groups blocks")
    yield check_layers("output.blocks", output.decoder.blocks * levels)
    groups = output.decoder.groups
    for size in output.decoder.widths:
        is_right = 0 < size < 1 << 31 and size % groups == 0
        yield "output.widths", size, is_right, f"multiples of {shortened(groups)} groups"
    yield from check_positive("output", output.decoder, "norm_eps")
    scale = output.guidance
    yield "output.guidance", scale, 0 <= scale <= 1e6, "0 to 1e6"
    ids = (*output.begin_ids, output.empty_id, *output.kept_ids)
    is_right = all(0 <= item < decoder.vocab_size for item in ids)
    yield "output.begin_ids, empty_id and kept_ids", ids, is_right, "ids of the vocabulary"
    attending = output.decoder.attention_levels
    is_right = all(0 <= level < levels for level in attending)
    yield "output.attention_levels", attending, is_right, f"levels below {levels}"
    weights = size_of(output_groups(output, width)) + 2 * output.num_codes * output.code_size
    convolutions = sum(9 * output.decoder.blocks * size**2 for size in output.decoder.widths)
    yield check_weights("outputs", weights + convolutions, total)
