"""Checks of a model's GGUF files before a library opens them.

llama.cpp aborts the process on absurd sizes, and mtmd takes a missing tensor for a null pointer and
crashes on the first image. So headers are compared with the spec first.
"""

from __future__ import annotations

from dataclasses import replace

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError
from mobilevlm.gguf.checks import (
    check_decoder_file,
    check_encoder_file,
    check_exact_encoder_file,
    check_vocabulary,
    other,
)
from mobilevlm.gguf.encoder import LONGEST_EDGE, read_encoder
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.mmproj import EXACT, projector_name
from mobilevlm.gguf.spec import decoder_spec
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import Tiles
from mobilevlm.spec import ModelSpec

_SAME = (
    "head_dim", "experts", "rotary_channels", "norm", "mlp", "hidden_act", "qk_norm", "post_norms",
    "sliding_window", "sliding_layers", "num_key_value_heads", "conv_layers", "conv_kernel",
    "rope_sections", "rope_interleaved", "deep_layers", "attention_gate", "delta",
)  # fmt: skip
"""Fields of a decoder's spec that a file must say too."""


def check_decoder(header: GgufFile, spec: DecoderSpec) -> None:
    """Refuses a file that is not the language model of the spec.

    Raises:
        BundleError: names the first key or tensor that is different.
    """
    if header.architecture == "clip":
        raise BundleError(f"{header.path}: an image encoder (mmproj), expected a language model")
    prefix = header.architecture
    for key, expected in {
        f"{prefix}.block_count": spec.num_hidden_layers,
        f"{prefix}.embedding_length": spec.hidden_size,
        f"{prefix}.feed_forward_length": spec.intermediate_size,
        f"{prefix}.attention.head_count": spec.num_attention_heads,
    }.items():
        _same(header, key, header.metadata.get(key), expected)
    table = header.tensors.get("token_embd.weight")
    shape = table.shape if table else None
    _same(header, "shape of token_embd.weight", shape, (spec.vocab_size, spec.hidden_size))
    found = decoder_spec(header)
    for name in _SAME:
        _same(header, name, getattr(found, name), getattr(spec, name))
    check_decoder_file(header, spec)
    check_vocabulary(header, spec.vocab_size)


def check_mmproj(header: GgufFile, spec: ModelSpec) -> None:
    """Refuses a file that is not the image encoder and projector of the spec.

    Raises:
        BundleError: names the first key or tensor that is missing or different.
    """
    if header.architecture != "clip":
        raise BundleError(f"{header.path}: not an image encoder (mmproj)")
    kind = header.metadata.get("clip.projector_type", "mlp")  # old files do not say
    _same(header, "clip.projector_type", kind, projector_name(spec.image))
    if kind in EXACT:
        check_exact_encoder_file(header, spec.image)
        return
    connector, vision = spec.image.connector, spec.image.transformer
    for key, expected in _vision_metadata(vision).items():
        _same(header, key, header.metadata.get(key), expected)
    found = read_encoder(header, connector.out_size)
    layers = found.vision.num_hidden_layers
    _same(header, "number of layers that are run", layers, vision.num_hidden_layers)
    if isinstance(tiles := spec.image.preparation, Tiles) and tiles.max_tiles != 1:
        _same(header, LONGEST_EDGE, header.metadata.get(LONGEST_EDGE), tiles.longest_edge)
    found = replace(found, projector=replace(found.projector, newline=connector.newline))
    check_encoder_file(header, found)


def _same(header: GgufFile, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise other(header, f"{what} is {found!r:.60}, expected {expected!r}")


def _vision_metadata(spec: TransformerEncoder) -> dict[str, int]:
    return {
        "clip.vision.image_size": spec.image_size,
        "clip.vision.patch_size": spec.patch_size,
        "clip.vision.embedding_length": spec.hidden_size,
        "clip.vision.feed_forward_length": spec.intermediate_size,
        "clip.vision.attention.head_count": spec.num_attention_heads,
    }
