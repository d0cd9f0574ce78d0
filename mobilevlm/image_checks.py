"""Checks of what a manifest says about images in, their tower and a projector, as those of
:mod:`mobilevlm.bundle_checks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mobilevlm.audio_encoder import SoundEncoder
from mobilevlm.image_encoder import NativeEncoder
from mobilevlm.input_spec import (
    MOST_FRAMES,
    MOST_GRIDS,
    MOST_PATCHES,
    MOST_TILES,
    AnyResolution,
    AspectTiles,
    ClipSpec,
    DynamicImage,
    DynamicTiles,
    FixedImage,
    PixelImages,
    SquareImages,
    Tiles,
)
from mobilevlm.linear_groups import projector_groups, tower_groups
from mobilevlm.number_checks import (
    Check,
    check_heads,
    check_layers,
    check_positive,
    check_weights,
    check_whole,
    shortened,
    size_of,
)
from mobilevlm.state_buffers import LONGEST_RUN

if TYPE_CHECKING:
    from mobilevlm.connector_spec import ConnectorSpec
    from mobilevlm.image_encoder import ConvEncoder, ImageEncoder
    from mobilevlm.input_spec import LibraryImage, Mel
    from mobilevlm.spec import ModelSpec

MOST_PIXELS = 1 << 26
"""Bounds of an image near its own size"""
MOST_STAGES = 16
"""Stages of a convolutional encoder"""
MAX_ENLARGED = 8
"""How many times as large as the tower's input an image may be made before it is cropped"""


def check_image(spec: ModelSpec) -> Iterator[Check]:
    """Check how images are prepared."""
    image, encoder = spec.image.preparation, spec.image.encoder
    is_image = not isinstance(encoder, SoundEncoder)
    yield "vision.kind", encoder.kind, is_image, "an encoder of images"
    assert not isinstance(encoder, SoundEncoder)
    if isinstance(encoder, NativeEncoder):
        yield from _dynamic_image(image, encoder)
        return
    if isinstance(image, DynamicTiles):
        yield from _dynamic_tiles(image, spec)
        return
    if not isinstance(image, SquareImages):
        yield "image.kind", image.kind, False, "one of squares, which this encoder takes"
        return
    yield from check_whole("image", image, "size")
    edge = encoder.image_size
    yield "image.size", image.size, image.size == edge, f"the tower's {shortened(edge)}"
    if isinstance(image, AspectTiles):
        yield from check_whole("image", image, "min_tiles max_tiles")
        is_right = image.min_tiles <= image.max_tiles <= MOST_TILES
        yield "image.max_tiles", image.max_tiles, is_right, f"min_tiles to {MOST_TILES}"
    elif isinstance(image, AnyResolution):
        yield from _any_resolution(image)
    else:
        name = "shortest_edge" if isinstance(image, FixedImage) else "longest_edge"
        longest = getattr(image, name)
        yield from check_whole("image", image, name)
        most = MAX_ENLARGED * image.size
        yield f"image.{name}", longest, longest <= most, f"at most {shortened(most)}"
    projector, is_assembled = spec.image.connector, isinstance(image, AnyResolution)
    is_right = projector.newline == is_assembled and (projector.kind == "mlp" or not is_assembled)
    yield "projector.newline", projector.newline, is_right, "one of any_resolution and an MLP"
    if isinstance(image, Tiles) and spec.image.layout.tile_ids:
        marks, count = spec.image.layout.tile_ids, image.most_per_edge
        is_right = len(marks) >= count <= min(map(len, marks))
        yield "layout.tile_ids", len(marks), is_right, f"{count} rows and columns at least"
    yield from _colours(image)


def _colours(image: PixelImages) -> Iterator[Check]:
    for name, value in (("mean", image.mean), ("std", image.std)):
        is_right = all(0 <= item <= 1 for item in value) and (name == "mean" or min(value) > 0)
        yield f"image.{name}", value, is_right, "shares of the brightest value"


def _dynamic_image(
    image: PixelImages | LibraryImage | Mel, encoder: NativeEncoder
) -> Iterator[Check]:
    if not isinstance(image, DynamicImage):
        yield "image.kind", image.kind, False, "dynamic_image, which this encoder takes"
        return
    for name in ("patch_size", "merge_size"):
        value, expected = getattr(image, name), getattr(encoder, name)
        yield f"image.{name}", value, value == expected, f"the tower's {shortened(expected)}"
    yield from check_whole("image", image, "min_pixels max_pixels")
    least = max(image.min_pixels, image.factor**2)
    is_right = least <= image.max_pixels <= MOST_PIXELS
    yield "image.max_pixels", image.max_pixels, is_right, f"{shortened(least)} to {MOST_PIXELS}"
    yield from _colours(image)
    if image.clip is not None:
        yield from _clip(image.clip)


def _clip(clip: ClipSpec) -> Iterator[Check]:
    yield from check_whole("image.clip", clip, "min_pixels max_pixels min_frames max_frames")
    yield from check_whole("image.clip", clip, "total_pixels", 0)
    yield from check_positive("image.clip", clip, "frames_per_second")
    pace = clip.positions_per_second
    yield "image.clip.positions_per_second", pace, 0 <= pace < 1 << 16, "0 to 65535"
    most = clip.max_pixels
    yield "image.clip.max_pixels", most, most <= MOST_PIXELS, f"at most {MOST_PIXELS}"
    is_right = clip.min_pixels <= (clip.total_pixels or most)
    yield "image.clip.min_pixels", clip.min_pixels, is_right, "no more than there may be"
    is_right = clip.min_frames <= clip.max_frames <= MOST_FRAMES
    yield "image.clip.max_frames", clip.max_frames, is_right, f"min_frames to {MOST_FRAMES}"


def _dynamic_tiles(image: DynamicTiles, spec: ModelSpec) -> Iterator[Check]:
    """Check tiles for an encoder that resizes its positions."""
    encoder, connector, whole = spec.image.encoder, spec.image.connector, image.whole
    is_right = encoder.kind == "transformer" and encoder.resized_positions
    yield "image.kind", image.kind, is_right, "one of squares, which this encoder takes"
    yield from check_whole("image", image, "size min_tiles max_tiles split_pixels")
    yield from check_whole("image", whole, "patch_size merge_size min_pixels max_pixels")
    is_right = image.min_tiles <= image.max_tiles <= MOST_TILES
    yield "image.max_tiles", image.max_tiles, is_right, f"min_tiles to {MOST_TILES}"
    is_right = encoder.kind == "transformer" and whole.patch_size == encoder.patch_size
    yield "image.patch_size", whole.patch_size, is_right, "the encoder's"
    yield "image.merge_size", whole.merge_size, whole.merge_size == connector.factor, "the factor"
    least, most = whole.factor**2, MOST_PATCHES * whole.patch_size**2
    is_right = least <= whole.min_pixels <= whole.max_pixels <= most
    yield "image.max_pixels", whole.max_pixels, is_right, f"min_pixels to {most}"
    size = image.size
    is_right = size % whole.factor == 0 and size**2 <= most
    yield "image.size", size, is_right, f"a multiple of {shortened(whole.factor)}"
    marks, count = spec.image.layout.tile_ids, image.max_tiles
    is_right = not marks or (
        len(marks) >= count
        and all(len(row) >= count // number for number, row in enumerate(marks, 1))
    )
    yield "layout.tile_ids", len(marks), is_right, f"those of all grids of {count} tiles"
    yield from _colours(image)


def _any_resolution(image: AnyResolution) -> Iterator[Check]:
    yield from check_whole("image", image, "most_tiles max_tiles", 0)
    count = len(image.grids)
    yield "image.grids", count, 0 < count <= MOST_GRIDS, f"1 to {MOST_GRIDS}"
    is_right = all(
        min(grid) > 0 and grid[0] * grid[1] <= MOST_TILES for grid in image.grids[:MOST_GRIDS]
    )
    expected = f"rows and columns of up to {MOST_TILES} tiles"
    yield "image.grids", image.grids[:MOST_GRIDS], is_right, expected


def check_vision(vision: ImageEncoder, total: int) -> Iterator[Check]:
    """Check a vision tower. ``total``: bytes of the bundle's files."""
    if vision.kind == "conv":
        yield from _conv_encoder(vision, total)
        return
    if vision.kind == "native":
        yield from _native_encoder(vision, total)
        return
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
    )
    yield from check_whole("vision", vision, names)
    yield from check_positive("vision", vision, "layer_norm_eps")
    yield check_layers("vision.num_hidden_layers", vision.num_hidden_layers)
    yield check_heads("vision", vision)
    patch, edge = vision.patch_size, vision.image_size
    yield "vision.patch_size", patch, patch <= edge, f"at most the image's {shortened(edge)}"
    positions = vision.hidden_size * (vision.num_positions + 3 * patch**2)
    yield check_weights("vision", size_of(tower_groups(vision)) + positions, total)


def _native_encoder(vision: NativeEncoder, total: int) -> Iterator[Check]:
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size "
        "merge_size frames"
    )
    yield from check_whole("vision", vision, names)
    yield from check_whole("vision", vision, "position_grid axis_positions window", 0)
    yield from check_positive("vision", vision, "norm_eps rope_theta")
    layers = vision.num_hidden_layers
    yield check_layers("vision.num_hidden_layers", layers)
    hidden, unit = vision.hidden_size, 4 * vision.num_attention_heads
    yield "vision.hidden_size", hidden, hidden % unit == 0, f"a multiple of {shortened(unit)}"
    for name in ("full_layers", "deep_layers"):
        value = getattr(vision, name)
        is_right = list(value) == sorted(set(value)) and all(0 <= one < layers for one in value)
        yield f"vision.{name}", value, is_right, "layers, in order"
    weights = size_of(tower_groups(vision)) + hidden * vision.patch_values
    rows = vision.position_grid**2 + 2 * vision.axis_positions
    yield check_weights("vision", weights + hidden * rows, total)


def _conv_encoder(vision: ConvEncoder, total: int) -> Iterator[Check]:
    stages = len(vision.widths)
    yield "vision.widths", vision.widths, 1 <= stages <= MOST_STAGES, f"1 to {MOST_STAGES} stages"
    for name in ("widths", "depths", "mlp_ratios"):
        values = getattr(vision, name)
        is_right = len(values) == stages and all(1 <= value < 1 << 31 for value in values)
        yield f"vision.{name}", values, is_right, f"{stages} numbers"
    yield from check_whole("vision", vision, "image_size head_dim expansion squeeze_ratio")
    yield from check_positive("vision", vision, "layer_norm_eps")
    yield check_layers("vision.depths", sum(vision.depths))
    edge, stride = vision.image_size, vision.stride
    yield "vision.image_size", edge, edge % stride == 0, f"a multiple of {shortened(stride)}"
    attending = vision.attention_stages
    is_right = all(0 <= stage < stages for stage in attending)
    is_right = is_right and list(attending) == sorted(set(attending))
    yield "vision.attention_stages", attending, is_right, "stages, in order"
    for stage, (before, width) in enumerate(zip((1, *vision.widths), vision.widths, strict=False)):
        heads = vision.head_dim if stage in attending else 1
        is_right = width % before == 0 and width % heads == 0
        expected = f"multiples of {shortened(before)} and {shortened(heads)}"
        yield "vision.widths", width, is_right, expected
    yield "vision.squeeze_ratio", vision.squeeze_size, vision.squeeze_size > 0, "channels left over"
    yield check_weights("vision", size_of(tower_groups(vision)), total)


def check_projector(spec: ModelSpec, total: int) -> Iterator[Check]:
    """Check the projector of images or sounds. ``total``: bytes of the bundle's files."""
    assert spec.encoded is not None
    projector, vision = spec.encoded.connector, spec.encoded.encoder
    is_native = isinstance(vision, NativeEncoder)
    grid = 0 if isinstance(vision, (NativeEncoder, SoundEncoder)) else vision.grid
    yield from check_whole("projector", projector, "depth out_size factor")
    yield from check_whole("projector", projector, "inner_size", 0)
    yield check_layers("projector.depth", projector.depth)
    if isinstance(vision, NativeEncoder):
        squares, layers = vision.merge_size, len(vision.deep_layers)
        yield "projector.factor", projector.factor, projector.factor == squares, f"{squares}"
        yield "projector.deep", projector.deep, projector.deep == layers, f"{layers}"
        added = len(spec.decoder.deep_layers)
        yield "decoder.deep_layers", added, added == layers, f"{layers} of them"
    is_right = is_native == (projector.kind in ("merger", "pool"))
    behind = "merger or pool behind a native encoder, no other"
    yield "projector.kind", projector.kind, is_right, behind
    for name, value, expected in (
        ("in_size", projector.in_size, vision.hidden_size),
        ("grid", projector.grid, grid),
        ("out_size", projector.out_size, spec.decoder.hidden_size),
    ):
        yield f"projector.{name}", value, value == expected, str(expected)
    is_grid = 0 <= projector.out_grid <= projector.grid
    yield "projector.out_grid", projector.out_grid, is_grid, f"0 to {projector.grid}"
    if projector.kind == "mlp_downsample":
        squares = -(-projector.grid // projector.factor)
        fits = projector.out_grid == squares
        yield "projector.out_grid", projector.out_grid, fits, f"{squares}"
    has_queries = (projector.qformer is not None) == (projector.kind == "qformer")
    yield "projector.kind", projector.kind, has_queries, "that of its parts"
    yield from _qformer(projector, total)
    count = projector.num_tokens
    yield "the number of visual tokens", count, count > 0 or not grid, "1 or more"
    if spec.decoder.image_blocks and spec.decoder.sliding_layers:
        most = f"at most {LONGEST_RUN} that see each other"
        yield "the number of visual tokens", count, count <= LONGEST_RUN, most
    yield check_weights("projector", size_of(projector_groups(projector)), total)


def _qformer(projector: ConnectorSpec, total: int) -> Iterator[Check]:
    queries = projector.qformer
    if queries is None:
        return
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "cross_attention_frequency num_queries"
    )
    yield from check_whole("qformer", queries, names)
    yield from check_whole("qformer", queries, "vocab_size max_positions window", 0)
    yield from check_positive("qformer", queries, "layer_norm_eps")
    yield check_layers("qformer.num_hidden_layers", queries.num_hidden_layers)
    yield check_heads("qformer", queries)
    rows = queries.num_queries + queries.vocab_size + queries.max_positions
    yield check_weights("qformer", queries.hidden_size * rows, total)
