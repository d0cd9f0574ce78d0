"""Images as the arrays that an encoder takes, and the pieces that stand for them in a prompt: one
pure function for each kind of preparation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from mobilevlm.errors import ImageError, MobileVLMError
from mobilevlm.image import ImageInput, RoomFor, read_pixels
from mobilevlm.input_spec import (
    AnyResolution,
    AspectTiles,
    DynamicImage,
    FixedImage,
    InputSpec,
    LibraryImage,
    Mel,
    Tiled,
    Tiles,
)
from mobilevlm.media.any_resolution import (
    any_resolution_pieces,
    greatest_pieces,
    is_assembly_of,
    is_square,
    least_pieces,
    most_tiles,
    prepare_any_resolution,
)
from mobilevlm.media.aspect_tiles import aspect_pieces, prepare_aspect_tiles
from mobilevlm.media.dynamic_image import dynamic_pieces, prepare_dynamic
from mobilevlm.media.tiles import prepare_tiles, tile_pieces, tile_shapes
from mobilevlm.prompt import Piece, Prepared, Run, count_positions, count_rows

_LARGE = 1 << 20
"""Edge of an image that every preparation makes smaller."""


def prepare(
    source: ImageInput, spec: InputSpec, room_for: RoomFor | None = None, images: int = 1
) -> Prepared:
    """Return an image as a model takes it; what is prepared already as it is.

    ``room_for``: memory that this may take, as of :func:`mobilevlm.image.read_pixels`; ``images``:
    of the prompt that it stands in.

    Raises:
        ImageError: it is prepared for another model or for a prompt with another number of images,
            missing, damaged, not an image, too large, or of a shape that the model does not take.
    """
    if isinstance(source, Prepared):
        _check_prepared(source, spec, images)
        return source
    if isinstance(spec.preparation, AnyResolution):
        return prepare_any_resolution(source, spec.preparation, spec, room_for, images)
    if isinstance(spec.preparation, Tiles):
        return prepare_tiles(source, spec.preparation, spec, room_for)
    if isinstance(spec.preparation, AspectTiles):
        return prepare_aspect_tiles(source, spec.preparation, spec, room_for)
    if isinstance(spec.preparation, DynamicImage):
        return prepare_dynamic(source, spec.preparation, spec, room_for)
    if isinstance(spec.preparation, FixedImage):
        pixels = read_pixels(source, spec.preparation, room_for)
        return Prepared("image", ({"pixels": pixels},), fewest_pieces(spec))
    raise _no_images(spec.preparation)


def with_max_tiles(spec: InputSpec, most: int) -> InputSpec:
    """Return an input whose images are split into at most ``most`` tiles, besides the whole made
    small; 1: not at all. More than the checkpoint's own number changes nothing.

    Raises:
        MobileVLMError: its images are not split.
    """
    preparation = spec.preparation
    if isinstance(preparation, LibraryImage):
        raise MobileVLMError(
            f"max_tiles is {most}, but llama.cpp alone decides how it splits images of this model: "
            f"leave it out"
        )
    if not isinstance(preparation, Tiled):
        raise MobileVLMError(
            f"max_tiles is {most}, but this model does not split images into tiles "
            f"({preparation.kind}): leave it out"
        )
    fewest = min(most, preparation.max_tiles or most)
    limited: Tiled = replace(preparation, max_tiles=fewest)
    if isinstance(limited, AspectTiles):
        limited = replace(limited, min_tiles=min(limited.min_tiles, fewest))
    return replace(spec, preparation=limited)


def _check_prepared(image: Prepared, spec: InputSpec, images: int) -> None:
    """Refuse an image that was prepared for an encoder of another size, or for a prompt in which
    images are prepared in another way.

    Raises:
        ImageError: its squares or their rows are others.
    """
    if isinstance(spec.preparation, DynamicImage):
        return
    size, assembly = spec.square.size, image.assembly
    rows = len(image.arrays) * spec.connector.num_tokens
    is_known = assembly is None
    if isinstance(spec.preparation, AnyResolution):
        is_known = assembly is not None and is_assembly_of(spec.preparation, assembly, spec)
    if assembly is not None:
        rows = assembly.rows
        is_known = is_known and assembly.runs == len(image.arrays)
    squares = [arrays["pixels"].shape for arrays in image.arrays if "pixels" in arrays]
    is_known = is_known and squares == [(size, size, 3)] * len(image.arrays)
    if not is_known or count_rows(image.pieces) != rows:
        raise ImageError("an image that was prepared for another model: prepare it with this one")
    is_one = isinstance(spec.preparation, AnyResolution) and is_square(spec.preparation, images)
    if is_one and len(image.arrays) > 1:
        raise ImageError(
            f"an image in tiles, which this model does not take in a prompt with {images} images: "
            f"prepare it with images={images}"
        )


def pieces_of(source: ImageInput, spec: InputSpec, images: int = 1) -> tuple[Piece, ...]:
    """Return the pieces of an image of a prompt with so many; it is not read where all images have
    the same."""
    if isinstance(spec.preparation, FixedImage):
        return fewest_pieces(spec)
    return prepare(source, spec, images=images).pieces


def fewest_pieces(spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of the image that takes the fewest positions."""
    return _extremes(spec)[0]


def most_pieces(spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of the image that takes the most positions."""
    return _extremes(spec)[1]


def most_runs(spec: InputSpec) -> int:
    """Return the most runs of the encoder that an image takes."""
    if isinstance(spec.preparation, AnyResolution):
        return 1 + most_tiles(spec.preparation)
    if isinstance(spec.preparation, Tiled):
        return count_rows(most_pieces(spec)) // spec.connector.num_tokens
    return 1


@lru_cache(maxsize=8)
def _extremes(spec: InputSpec) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return the pieces of the images that take the fewest and the most positions."""
    if isinstance(spec.preparation, LibraryImage):
        return (Run(spec.preparation.fewest_rows),), (Run(spec.preparation.most_rows),)
    if isinstance(spec.preparation, AnyResolution):
        return least_pieces(spec), greatest_pieces(spec.preparation, spec)
    shapes: Iterable[tuple[int, int]] = ((1, 1), (_LARGE, _LARGE))
    if isinstance(spec.preparation, Tiles):
        shapes = tile_shapes(spec.preparation)
    elif isinstance(spec.preparation, AspectTiles):
        shapes = ((spec.preparation.min_tiles, 1), (spec.preparation.max_tiles * _LARGE, _LARGE))
    found = [_pieces(shape, spec) for shape in shapes]
    return min(found, key=count_positions), max(found, key=count_positions)


def _pieces(size: tuple[int, int], spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of an image of this width and height."""
    if isinstance(spec.preparation, AnyResolution):
        return any_resolution_pieces(size, spec.preparation, spec)
    if isinstance(spec.preparation, Tiles):
        return tile_pieces(size, spec.preparation, spec)
    if isinstance(spec.preparation, AspectTiles):
        return aspect_pieces(size, spec.preparation, spec)
    if isinstance(spec.preparation, DynamicImage):
        return dynamic_pieces(size, spec.preparation, spec)
    if isinstance(spec.preparation, FixedImage):
        layout = spec.layout
        return (*layout.begin_ids, Run(spec.connector.num_tokens), *layout.end_ids)
    raise _no_images(spec.preparation)


def _no_images(preparation: LibraryImage | Mel) -> ImageError:
    if isinstance(preparation, LibraryImage):
        return ImageError("llama.cpp prepares the images of this model: use VLM.prepare_image")
    return ImageError(f"an input prepared as {preparation.kind!r} takes no images: give it sound")
