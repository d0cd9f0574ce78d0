"""What a GGUF file says about its image encoder and projector (``mmproj``)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.keys import check_keys
from mobilevlm.gguf.names import Entry, projector_entries, tower_entries
from mobilevlm.input_spec import ConnectorSpec, FixedImage, SquareImages, TransformerEncoder

FEATURE_LAYER = "clip.vision.feature_layer"
LONGEST_EDGE = "clip.vision.preproc_image_size"
"""Key of the edge that an image is resized to before it is split."""
MAX_GRID = 96
"""Patches per edge: attention over more of them would take gigabytes."""
SMALLEST_DEVIATION = 1e-3
"""Of a channel whose values lie between 0 and 1."""
LDP_GRID = 24
"""llama.cpp's LDP and LDPv2 are written for this patch grid."""
LDPV2_GRID = 12
"""Visual tokens per edge, whatever the image's size."""


@dataclass(frozen=True)
class Encoder:
    """Image encoder and projector of a file."""

    image: SquareImages
    vision: TransformerEncoder
    """Up to the layer whose features are used."""
    projector: ConnectorSpec
    blocks: int
    """Layers that the file has."""
    swapped: bool
    """Whether the two layers of each MLP have each other's names, as in files of llama.cpp's first
    converter (``fc1`` is ``ffn_down`` there)."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors of the file."""
        tower = dataclasses.replace(self.vision, num_hidden_layers=self.blocks)
        return *tower_entries(tower, self.swapped), *projector_entries(self.projector)


def read_encoder(file: GgufFile, out_size: int) -> Encoder:
    """Return what the metadata say; tensors are not compared. ``out_size``: of the projector.

    Raises:
        BundleError: not an image encoder, a key is missing, of the wrong kind or beyond what the
            spec can say.
    """
    if file.architecture != "clip":
        raise BundleError(f"{file.path}: not an image encoder (mmproj)")
    check_keys(file, "encoder")
    if not file.metadata.get("clip.has_vision_encoder", False):
        raise BundleError(f"{file.path}: clip.has_vision_encoder is not true: no image encoder")
    size, patch = (_positive(file, f"clip.vision.{key}") for key in ("image_size", "patch_size"))
    hidden, wide, blocks, heads = (
        _positive(file, f"clip.vision.{key}")
        for key in (
            "embedding_length",
            "feed_forward_length",
            "block_count",
            "attention.head_count",
        )
    )
    _positive(file, "clip.vision.projection_dim")  # llama.cpp does not load a file without
    grid = size // patch
    if not 1 <= grid <= MAX_GRID:
        raise BundleError(
            f"{file.path}: images of {size} pixels in patches of {patch}: expected 1 to {MAX_GRID} "
            f"patches per edge"
        )
    if hidden % heads:
        raise BundleError(f"{file.path}: {heads} heads do not divide {hidden} channels")
    if hidden == wide:
        raise BundleError(
            f"{file.path}: embedding_length and feed_forward_length are both {hidden}: llama.cpp "
            f"cannot tell the two layers of the MLP apart"
        )
    vision = TransformerEncoder(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=_feature_layer(file, blocks),
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch,
        hidden_act="gelu" if file.metadata.get("clip.use_gelu") else "quick_gelu",
        layer_norm_eps=_epsilon(file),
    )
    mean, std = (_channels(file, f"clip.vision.image_{key}") for key in ("mean", "std"))
    for key, values, (least, most) in (
        ("mean", mean, (0.0, 1.0)),
        ("std", std, (SMALLEST_DEVIATION, 1 / SMALLEST_DEVIATION)),
    ):
        if not all(least <= value <= most for value in values):
            raise BundleError(
                f"{file.path}: clip.vision.image_{key} is {values}, expected numbers from {least} "
                f"to {most}"
            )
    image = FixedImage(size, size, _aspect(file), mean, std)
    kind = projector_kind(file, grid)
    out_grid = {"mlp": grid, "ldp": -(-grid // 2), "ldpv2": LDPV2_GRID}[kind]
    projector = ConnectorSpec(kind, hidden, out_size, 2, grid, out_grid)
    first = file.tensors.get("v.blk.0.ffn_down.weight")
    swapped = first is not None and first.shape == (wide, hidden)
    return Encoder(image, vision, projector, blocks, swapped)


def projector_kind(file: GgufFile, grid: int) -> Literal["mlp", "ldp", "ldpv2"]:
    """Return the projector's kind; files of the first converter do not say that it is an MLP.

    Raises:
        BundleError: it is not known, or needs another grid of patches.
    """
    kind = file.metadata.get("clip.projector_type", "mlp")
    if kind == "mlp":
        return "mlp"
    if kind not in ("ldp", "ldpv2"):
        raise BundleError(f"{file.path}: projector {kind!r:.60}, expected mlp, ldp, ldpv2")
    if grid != LDP_GRID:
        raise BundleError(
            f"{file.path}: {grid} × {grid} patches: the projector {kind} takes {LDP_GRID} × "
            f"{LDP_GRID}"
        )
    found: Literal["ldp", "ldpv2"] = kind
    return found


def _feature_layer(file: GgufFile, blocks: int) -> int:
    """Return how many layers are run: all where the file does not say."""
    layers = file.metadata.get(FEATURE_LAYER)
    if layers is None:
        return blocks
    if not isinstance(layers, list) or len(layers) != 1 or not 1 <= layers[0] <= blocks:
        raise BundleError(
            f"{file.path}: {FEATURE_LAYER} is {layers!r:.60}, expected one layer from 1 to {blocks}"
        )
    return int(layers[0])


def _epsilon(file: GgufFile) -> float:
    key = "clip.vision.attention.layer_norm_epsilon"
    value = file.metadata.get(key)
    if type(value) is not float or not 0 < value < 1:
        raise BundleError(f"{file.path}: {key} is {value!r:.60}, expected a small positive number")
    return value


def _aspect(file: GgufFile) -> Literal["pad", "crop"]:
    """Return how images become squares: padded, as LLaVA does, where the file does not say."""
    key = "clip.vision.image_aspect_ratio"
    value = file.metadata.get(key, "pad")
    if value not in ("pad", "square"):
        raise BundleError(
            f"{file.path}: {key} is {value!r:.60} (LLaVA-1.6 tiles): expected 'pad' or 'square'"
        )
    return "pad" if value == "pad" else "crop"


def _positive(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise BundleError(f"{file.path}: {key} is {value!r:.60}, expected a positive number")
    return value


def _channels(file: GgufFile, key: str) -> tuple[float, float, float]:
    """Return one number for each colour."""
    value: Any = file.metadata.get(key)
    if (
        not isinstance(value, list)
        or [type(entry) for entry in value] != [float] * 3
        or not all(map(math.isfinite, value))
    ):
        raise BundleError(f"{file.path}: {key} is {value!r:.60}, expected three numbers")
    red, green, blue = value
    return red, green, blue
