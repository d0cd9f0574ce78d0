"""A language model and an image encoder in GGUF files made elsewhere, seen as a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mobilevlm.bundle import SCHEMA_VERSION, Artifact, Bundle, FileEntry, Manifest, Quality
from mobilevlm.conversation import CONVERSATIONS, two_separator_template
from mobilevlm.errors import BundleError
from mobilevlm.gguf_file import GgufFile, read_gguf
from mobilevlm.gguf_spec import decoder_spec
from mobilevlm.spec import (
    ConversationSpec,
    ImageSpec,
    ModelSpec,
    ProjectorSpec,
    VisionSpec,
)

MAX_CONTEXT = 4096
"""Positions at most: llama.cpp allocates keys and values of all of them at once, and models made
for 131072 would take tens of gigabytes."""
LDPV2_GRID = 12
"""Visual tokens per edge, whatever the picture's size."""


def gguf_bundle(model: Path, mmproj: Path) -> tuple[Bundle, GgufFile]:
    """Both files as a bundle that lies nowhere, and the header of the language model.

    Raises:
        BundleError: a file is damaged, or of a kind that the spec cannot say.
    """
    decoder, vision = read_gguf(model), read_gguf(mmproj)
    paths = {"vision": mmproj.absolute().as_posix(), "decoder": model.absolute().as_posix()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        spec=model_spec(decoder, vision),
        recipe={"name": "gguf"},
        artifacts=(
            Artifact("vision", "gguf", "as in the file", paths["vision"], (), key=""),
            Artifact("decoder", "gguf", "as in the file", paths["decoder"], (), key=""),
        ),
        embeddings=None,
        quality=Quality(measured=False, note="made elsewhere"),
        files={path: FileEntry(Path(path).stat().st_size, "") for path in paths.values()},
        tools={},
    )
    return Bundle(Path(), manifest, digest=""), decoder


def model_spec(decoder: GgufFile, vision: GgufFile) -> ModelSpec:
    """The spec of a language model with its image encoder.

    What GGUF does not say is taken from the LLaVA lineage: pictures are padded to a square, and a
    chat template without pictures gives way to the conversation ``v1``.

    Raises:
        BundleError: a key is missing, of the wrong kind, or beyond what the spec can say.
    """
    language = decoder_spec(decoder)
    context = min(language.context_length, MAX_CONTEXT)
    if vision.architecture != "clip":
        raise BundleError(f"{vision.path}: not an image encoder (mmproj)")
    size, patch = (_positive(vision, f"clip.vision.{key}") for key in ("image_size", "patch_size"))
    hidden = _positive(vision, "clip.vision.embedding_length")
    grid = size // patch
    kind = vision.metadata.get("clip.projector_type", "mlp")
    out_grids = {"mlp": grid, "ldp": -(-grid // 2), "ldpv2": LDPV2_GRID}
    if kind not in out_grids:
        raise BundleError(f"{vision.path}: projector {kind!r:.60}, expected {', '.join(out_grids)}")
    mean, std = (_channels(vision, f"clip.vision.image_{key}") for key in ("mean", "std"))
    return ModelSpec(
        family="gguf",
        name=str(decoder.metadata.get("general.name", decoder.path.stem)),
        image=ImageSpec(size, size, "pad", mean, std),
        vision=VisionSpec(
            hidden_size=hidden,
            intermediate_size=_positive(vision, "clip.vision.feed_forward_length"),
            num_hidden_layers=_positive(vision, "clip.vision.block_count"),
            num_attention_heads=_positive(vision, "clip.vision.attention.head_count"),
            image_size=size,
            patch_size=patch,
            hidden_act="gelu" if vision.metadata.get("clip.use_gelu") else "quick_gelu",
            layer_norm_eps=float(
                vision.metadata.get("clip.vision.attention.layer_norm_epsilon", 1e-5)
            ),
        ),
        projector=ProjectorSpec(kind, hidden, language.hidden_size, 2, grid, out_grids[kind]),
        decoder=dataclasses.replace(language, context_length=context),
        conversation=_conversation(decoder),
    )


def _conversation(file: GgufFile) -> ConversationSpec:
    template = str(file.metadata.get("tokenizer.chat_template", ""))
    if "image" not in template:
        template = two_separator_template(CONVERSATIONS["v1"])
    eos = file.metadata.get("tokenizer.ggml.eos_token_id", 2)
    return ConversationSpec(template, (int(eos),), ("</s>",))


def _positive(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key)
    if type(value) is not int or value < 1:
        raise BundleError(f"{file.path}: {key} is {value!r:.60}, expected a positive number")
    return value


def _channels(file: GgufFile, key: str) -> tuple[float, float, float]:
    """One number for each colour."""
    value: Any = file.metadata.get(key)
    if not isinstance(value, list) or [type(entry) for entry in value] != [float] * 3:
        raise BundleError(f"{file.path}: {key} is {value!r:.60}, expected three numbers")
    red, green, blue = value
    return red, green, blue
