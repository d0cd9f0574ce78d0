"""Image encoder and projector as a GGUF file (``mmproj``) describes them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.keys import Role, check_keys
from mobilevlm.gguf.names import Entry, projector_entries, scale_entries, tower_entries
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import (
    MOST_TILES,
    MOST_TILES_PER_EDGE,
    AspectTiles,
    FixedImage,
    SquareImages,
    Tiles,
)

FEATURE_LAYER = "clip.vision.feature_layer"
LONGEST_EDGE = "clip.vision.preproc_image_size"
"""Key of the edge that an image is resized to before it is split."""
LEAST_TILES, GREATEST_TILES = "clip.vision.preproc_min_tiles", "clip.vision.preproc_max_tiles"
SCALE_FACTOR = "clip.vision.projector.scale_factor"
"""Key of the patches along each edge of the square that becomes one visual token."""
DEFAULT_TILES = (1, 12)
"""Fewest and most tiles of InternVL's images, where the file does not say: llama.cpp's defaults."""
MAX_GRID = 96
"""Patches per edge: attention over more of them would take gigabytes."""
SMALLEST_DEVIATION = 1e-3
"""Least standard deviation of a channel, whose values lie between 0 and 1."""
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
    """True if the two layers of each MLP have each other's names, as in files of llama.cpp's first
    converter (``fc1`` is ``ffn_down`` there)."""
    class_last: bool = False
    """The class token's position is the last of the table."""
    layer_scale: bool = False
    """The file has the factors of what a layer adds as tensors of their own."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors of the file."""
        tower = dataclasses.replace(self.vision, num_hidden_layers=self.blocks)
        scales = scale_entries(tower) if self.layer_scale else ()
        entries = tower_entries(tower, self.swapped, self.class_last)
        return *entries, *scales, *projector_entries(self.projector)


_Activation: TypeAlias = Literal["gelu", "gelu_tanh"]
_SQUARE = ("mlp", "ldp", "ldpv2")
"""Projectors beside images that become one square."""
TILED: dict[str, tuple[Role, _Activation, dict[str, Any]]] = {
    "idefics3": (
        "idefics3",
        "gelu_tanh",
        {"class_token": False, "patch_bias": True, "pre_norm": False, "post_norm": True},
    ),
    "internvl": ("internvl", "gelu", {"patch_bias": True, "pre_norm": False}),
}
"""Projectors beside images in tiles: keys of their files, what ``use_gelu`` is in the official
tower, and differences of that tower from CLIP's."""


def read_encoder(file: GgufFile, out_size: int) -> Encoder:
    """Return what the metadata say; tensors are not compared. ``out_size``: of the projector.

    Raises:
        BundleError: not an image encoder, a key is missing, of the wrong kind or beyond what the
            spec can say.
    """
    if file.architecture != "clip":
        raise BundleError(f"{file.path}: not an image encoder (mmproj)")
    name = file.metadata.get("clip.projector_type", "mlp")
    if name not in (*_SQUARE, *TILED):
        known = ", ".join((*_SQUARE, *TILED))
        raise BundleError(f"{file.path}: projector {name!r:.60}, expected one of {known}")
    role, gelu, traits = TILED.get(name, ("encoder", "gelu", {}))
    check_keys(file, role)
    if not file.metadata.get("clip.has_vision_encoder", False):
        raise BundleError(f"{file.path}: clip.has_vision_encoder is not true: no image encoder")
    vision, blocks = _tower(file, gelu, traits)
    first = file.tensors.get("v.blk.0.ffn_down.weight")
    swapped = first is not None and first.shape == (vision.intermediate_size, vision.hidden_size)
    if role == "encoder":
        mean, std = _normalization(file)
        image = FixedImage(vision.image_size, vision.image_size, _aspect(file), mean, std)
        kind, grid = projector_kind(file, vision.grid), vision.grid
        out_grid = {"mlp": grid, "ldp": -(-grid // 2), "ldpv2": LDPV2_GRID}[kind]
        projector = ConnectorSpec(kind, vision.hidden_size, out_size, 2, grid, out_grid)
        return Encoder(image, vision, projector, blocks, swapped)
    if vision.num_hidden_layers != blocks:
        raise BundleError(
            f"{file.path}: {FEATURE_LAYER} is {vision.num_hidden_layers}, but llama.cpp runs all "
            f"{blocks} layers of the tower beside {name}"
        )
    if role == "idefics3":
        tiles: SquareImages = _tiles(file, vision.image_size)
        joined = _shuffled(file, vision, out_size, depth=1, norm=False, bias=False)
        return Encoder(tiles, vision, joined, blocks, swapped)
    scaled = "v.blk.0.ls1.weight" in file.tensors
    tiles = _aspect_tiles(file, vision.image_size)
    joined = _shuffled(file, vision, out_size, depth=2)
    return Encoder(tiles, vision, joined, blocks, swapped, not scaled, scaled)


def _tower(
    file: GgufFile, gelu: _Activation, traits: dict[str, Any]
) -> tuple[TransformerEncoder, int]:
    """Return the tower up to the layer whose features are used, and how many layers it has."""
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
    if not 1 <= size // patch <= MAX_GRID:
        raise BundleError(
            f"{file.path}: images of {size} pixels in patches of {patch}: expected 1 to {MAX_GRID} "
            f"patches per edge"
        )
    if hidden % heads:
        raise BundleError(
            f"{file.path}: embedding_length must be a multiple of attention.head_count: found "
            f"{hidden} and {heads}"
        )
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
        hidden_act=gelu if file.metadata.get("clip.use_gelu") else "quick_gelu",
        layer_norm_eps=_epsilon(file),
        **traits,
    )
    return vision, blocks


_Channels: TypeAlias = tuple[float, float, float]


def _normalization(file: GgufFile) -> tuple[_Channels, _Channels]:
    """Return mean and deviation of each channel."""
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
    return mean, std


def _tiles(file: GgufFile, size: int) -> Tiles:
    """Return the tiles of Idefics3, as many as the longest edge gives; one edge: no tiles."""
    longest = _positive(file, LONGEST_EDGE)
    if longest > MOST_TILES_PER_EDGE * size:
        raise BundleError(
            f"{file.path}: {LONGEST_EDGE} is {longest}, which is more than {MOST_TILES_PER_EDGE} "
            f"tiles of {size} pixels along an edge"
        )
    return Tiles(size, longest, *_normalization(file), max_tiles=0 if longest > size else 1)


def _aspect_tiles(file: GgufFile, size: int) -> AspectTiles:
    """Return the tiles of InternVL."""
    least, most = (
        _positive(file, key) if key in file.metadata else default
        for key, default in zip((LEAST_TILES, GREATEST_TILES), DEFAULT_TILES, strict=True)
    )
    if not least <= most <= MOST_TILES:
        raise BundleError(
            f"{file.path}: {LEAST_TILES} and {GREATEST_TILES} are {least} and {most}, expected a "
            f"range of tiles up to {MOST_TILES}"
        )
    return AspectTiles(size, least, most, *_normalization(file))


def _shuffled(
    file: GgufFile, vision: TransformerEncoder, out_size: int, depth: int, **parts: Any
) -> ConnectorSpec:
    """Return a connector that joins squares of patches row by row. ``parts``: fields of it."""
    factor, grid = _positive(file, SCALE_FACTOR), vision.grid
    if grid % factor:
        raise BundleError(
            f"{file.path}: the tower's patches per edge must be a multiple of {SCALE_FACTOR}: "
            f"found {grid} and {factor}"
        )
    return ConnectorSpec(
        "mlp_downsample",
        vision.hidden_size,
        out_size,
        depth,
        grid,
        grid // factor,
        factor=factor,
        **parts,
    )


def projector_kind(file: GgufFile, grid: int) -> Literal["mlp", "ldp", "ldpv2"]:
    """Return the projector's kind; files of the first converter do not say that it is an MLP.

    Raises:
        BundleError: it needs another grid of patches.
    """
    kind = file.metadata.get("clip.projector_type", "mlp")
    if kind == "mlp":
        return "mlp"
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
