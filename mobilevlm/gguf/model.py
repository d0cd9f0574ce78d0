"""A language model and an image encoder in GGUF files made elsewhere, seen as a bundle."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from mobilevlm.bundle import SCHEMA_VERSION, Artifact, Bundle, FileEntry, Manifest, Quality
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.gguf.checks import (
    check_decoder_file,
    check_encoder_file,
    check_vocabulary,
    is_utf8,
)
from mobilevlm.gguf.conversation import (
    gguf_conversation,
    marked_conversation,
    text_conversation,
)
from mobilevlm.gguf.encoder import TILED, read_encoder
from mobilevlm.gguf.file import GgufFile, read_gguf
from mobilevlm.gguf.image_marks import image_layout
from mobilevlm.gguf.pair import MAX_PAIR_CONTEXT, projector_name
from mobilevlm.gguf.spec import bytes_per_token, decoder_spec
from mobilevlm.input_spec import InputSpec
from mobilevlm.recipe import Limits, LinearFormat, Recipe
from mobilevlm.spec import ModelSpec

_AS_STORED = LinearFormat("fp32")
_RECIPE = Recipe(
    "gguf",
    tower=_AS_STORED,
    projector=_AS_STORED,
    decoder=_AS_STORED,
    lm_head=_AS_STORED,
    embeddings="fp32",
    limits=Limits(math.inf, math.inf),
)
"""A stand-in for the recipe that such files have none of. Only its name is read: engines take the
types that the tensors have."""

MAX_CONTEXT = 4096
"""Positions at most: llama.cpp allocates keys and values of all of them at once, and models made
for 131072 would take tens of gigabytes."""


def gguf_bundle(model: Path, mmproj: Path) -> tuple[Bundle, GgufFile]:
    """Both files as a bundle that lies nowhere, and the header of the language model.

    Raises:
        BundleError: a file is damaged, or of a kind that the spec cannot say.
    """
    decoder, vision = read_gguf(model), read_gguf(mmproj)
    spec = model_spec(decoder, vision)
    return bundle_of_files(decoder, vision, spec, bytes_per_token(decoder, spec.decoder)), decoder


def bundle_of_files(
    decoder: GgufFile, vision: GgufFile, spec: ModelSpec, bytes_of_token: int
) -> Bundle:
    """Return a bundle that lies nowhere. ``bytes_of_token``: weights that a decoding step reads."""
    model, mmproj = decoder.path, vision.path
    paths = {"vision": mmproj.absolute().as_posix(), "decoder": model.absolute().as_posix()}
    label = "as in the file"
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        spec=spec,
        recipe=_RECIPE,
        artifacts=(
            Artifact("vision", "gguf", label, paths["vision"], (), key=""),
            Artifact(
                "decoder",
                "gguf",
                label,
                paths["decoder"],
                tuple(path.absolute().as_posix() for path in decoder.parts[1:]),
                key="",
                bytes_per_token=bytes_of_token,
            ),
        ),
        embeddings=None,
        quality=Quality(measured=False, note="made elsewhere"),
        files={
            path.absolute().as_posix(): FileEntry(path.stat().st_size, "")
            for path in (mmproj, *decoder.parts)
        },
        tools={},
    )
    return Bundle(Path(), manifest, digest="")


def checked_decoder(file: GgufFile, most: int = MAX_CONTEXT) -> DecoderSpec:
    """Return the spec of a language model whose tensors and vocabulary fit it. ``most``: positions
    of its context at most.

    Raises:
        BundleError: as :func:`model_spec`.
    """
    spec = decoder_spec(file)
    spec = dataclasses.replace(spec, context_length=min(spec.context_length, most))
    check_decoder_file(file, spec)
    check_vocabulary(file, spec.vocab_size)
    return spec


def model_spec(decoder: GgufFile, vision: GgufFile | None) -> ModelSpec:
    """Return the spec of a language model with its image encoder, both checked for engines and
    exports alike, or of a language model alone.

    What GGUF does not say is taken from the family of the projector: LLaVA's images are padded to a
    square, and a file without a chat template that can hold an image gets the conversation ``v1``;
    tiles of Idefics3 and InternVL are those of the official processors, with the usual marks.

    Raises:
        BundleError: a key or tensor is missing, of the wrong kind, contradicts the others, or is
            beyond what the spec can say.
    """
    name = decoder.metadata.get("general.name")
    name = name if isinstance(name, str) and is_utf8(name) else decoder.path.stem
    if vision is None:
        language = checked_decoder(decoder)
        return ModelSpec("gguf", name, {}, language, text_conversation(decoder))
    is_tiled = projector_name(vision) in TILED
    language = checked_decoder(decoder, MAX_PAIR_CONTEXT if is_tiled else MAX_CONTEXT)
    encoder = read_encoder(vision, language.hidden_size)
    check_encoder_file(vision, encoder)
    layout, mark = image_layout(decoder, encoder)
    return ModelSpec(
        family="gguf",
        name=name,
        inputs={"image": InputSpec(encoder.image, encoder.vision, encoder.projector, layout)},
        decoder=language,
        conversation=(
            marked_conversation(decoder, mark) if is_tiled else gguf_conversation(decoder)
        ),
    )
