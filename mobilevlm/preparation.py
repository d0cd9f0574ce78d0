"""Images as the arrays that an encoder takes, and the pieces that stand for them in a prompt: one
pure function for each kind of preparation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from mobilevlm.audio_encoder import SoundEncoder, WhisperEncoder
from mobilevlm.errors import ImageError, MobileVLMError
from mobilevlm.image import ImageInput, RoomFor, read_pixels
from mobilevlm.image_encoder import NativeEncoder, TransformerEncoder
from mobilevlm.input_spec import (
    MOST_TILES,
    AnyResolution,
    AspectTiles,
    DynamicImage,
    DynamicTiles,
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
from mobilevlm.media.dynamic_image import (
    dynamic_pieces,
    filling_shapes,
    most_dynamic_pixels,
    prepare_dynamic,
)
from mobilevlm.media.dynamic_tiles import (
    dynamic_tile_pieces,
    dynamic_tile_shapes,
    prepare_dynamic_tiles,
)
from mobilevlm.media.tiles import prepare_tiles, tile_pieces, tile_shapes
from mobilevlm.prompt import Arrays, Piece, Prepared, Run, Sound, count_positions, count_rows

_OTHERS = "an image that was prepared for another model: prepare it with this one"
_LARGE = 1 << 20
"""Edge of an image that every preparation makes smaller."""


def prepare(
    source: ImageInput | Sound, spec: InputSpec, room_for: RoomFor | None = None, images: int = 1
) -> Prepared:
    """Return an image or a sound as a model takes it; what is prepared already as it is.

    ``room_for``: memory that this may take, as of :func:`mobilevlm.image.read_pixels`; ``images``:
    of the prompt that it stands in.

    Raises:
        ImageError: it is prepared for another model or for a prompt with another number of images,
            missing, damaged, not an image, too large, or of a shape that the model does not take.
        AudioError: as of :func:`mobilevlm.audio.prepare_sound`.
    """
    if isinstance(source, Sound):
        from mobilevlm.audio import prepare_sound  # for models that hear

        return prepare_sound(source.source, spec, room_for=room_for)
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
    if isinstance(spec.preparation, DynamicTiles):
        return prepare_dynamic_tiles(source, spec.preparation, spec, room_for)
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
    if isinstance(limited, (AspectTiles, DynamicTiles)):
        limited = replace(limited, min_tiles=min(limited.min_tiles, fewest))
    return replace(spec, preparation=limited)


def with_max_image_tokens(spec: InputSpec, most: int) -> InputSpec:
    """Return an input whose images become at most ``most`` visual tokens each: larger ones are made
    smaller. More than the checkpoint's own number changes nothing.

    Raises:
        MobileVLMError: its images are not encoded near their own size.
    """
    image = spec.preparation
    if not isinstance(image, DynamicImage):
        raise MobileVLMError(
            f"max_image_tokens is {most}, but this model does not encode images near their own "
            f"size ({image.kind}): leave it out"
        )
    pixels = min(image.max_pixels, most * image.factor**2)
    least = min(image.min_pixels, pixels)
    clip = image.clip
    if clip is not None:
        largest = min(clip.max_pixels, most * image.factor**2)
        clip = replace(clip, min_pixels=min(clip.min_pixels, largest), max_pixels=largest)
    limited = replace(image, min_pixels=least, max_pixels=pixels, clip=clip)
    return replace(spec, preparation=limited)


def with_image_tokens(spec: InputSpec, most: int) -> InputSpec:
    """Return an input whose images, in the tiles that it allows, take at most ``most`` visual
    tokens each; where one tile takes more, its rows are to be made fewer
    (:func:`mobilevlm.reduction.with_fewer_rows`).

    Raises:
        MobileVLMError: its visual tokens form no grid, have positions of several axes, or are fewer
            by ``max_image_tokens``.
    """
    preparation, reason = spec.preparation, ""
    if isinstance(preparation, DynamicImage):
        reason = "encodes images near their own size: use max_image_tokens instead"
    elif isinstance(preparation, LibraryImage):
        reason = "is run by llama.cpp alone, which makes no rows fewer: leave it out"
    elif isinstance(preparation, Mel):
        reason = "takes no images: leave it out"
    elif spec.connector.qformer is not None:
        reason = f"has {spec.connector.num_tokens} queries in place of a grid: leave it out"
    if not reason and count_rows(most_pieces(spec)) <= most:
        return spec
    if not reason and isinstance(preparation, Tiled):
        for tiles in range(preparation.max_tiles or MOST_TILES, 0, -1):
            limited = with_max_tiles(spec, tiles)
            if count_rows(most_pieces(limited)) <= most:
                return limited
        spec = limited
        if most_runs(spec) > 1:
            reason = "encodes an image of one tile in several runs: leave it out"
    if reason:
        raise MobileVLMError(f"image_tokens is {most}, but this model {reason}")
    if most <= spec.connector.newline:
        raise MobileVLMError(f"image_tokens is {most}, expected 2 or more (one ends the image)")
    return spec


def _check_prepared(image: Prepared, spec: InputSpec, images: int) -> None:
    """Refuse an image that was prepared for an encoder of another size, or for a prompt in which
    images are prepared in another way.

    Raises:
        ImageError: its squares or their rows are others.
    """
    if isinstance(spec.preparation, (DynamicImage, DynamicTiles)):
        frames = spec.encoder.frames if isinstance(spec.encoder, NativeEncoder) else 1
        _check_shapes(image, spec.preparation, (3, 3 * frames))
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
    if not is_known or image.encoded_rows != rows:
        raise ImageError(_OTHERS)
    is_one = isinstance(spec.preparation, AnyResolution) and is_square(spec.preparation, images)
    if is_one and len(image.arrays) > 1:
        raise ImageError(
            f"an image in tiles, which this model does not take in a prompt with {images} images: "
            f"prepare it with images={images}"
        )


def _check_shapes(
    image: Prepared, preparation: DynamicImage | DynamicTiles, channels: tuple[int, int]
) -> None:
    """Refuse an image that was prepared for an encoder with patches of another size.

    Raises:
        ImageError: its edges or its rows are others.
    """
    whole = preparation if isinstance(preparation, DynamicImage) else preparation.whole
    shapes = [arrays["pixels"].shape for arrays in image.arrays if "pixels" in arrays]
    is_known = len(shapes) == len(image.arrays) and all(
        len(shape) == 3
        and shape[2] in channels
        and not any(edge % whole.factor for edge in shape[:2])
        for shape in shapes
    )
    rows = sum(math.prod(shape[:2]) // whole.factor**2 for shape in shapes)
    if not is_known or image.assembly is not None or image.encoded_rows != rows:
        raise ImageError(_OTHERS)


def pieces_of(source: ImageInput | Sound, spec: InputSpec, images: int = 1) -> tuple[Piece, ...]:
    """Return the pieces of an image of a prompt with so many; it is not read where all images have
    the same."""
    if isinstance(spec.preparation, FixedImage):
        return fewest_pieces(spec)
    return prepare(source, spec, images=images).pieces


def fewest_pieces(spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of the image or sound that takes the fewest positions."""
    return _extremes(spec)[0]


def most_pieces(spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of the image that takes the most positions, of sounds of a window of the
    encoder."""
    return _extremes(spec)[1]


def most_runs(spec: InputSpec) -> int:
    """Return the most runs of the encoder that an image takes."""
    if isinstance(spec.preparation, AnyResolution):
        return 1 + most_tiles(spec.preparation)
    if isinstance(spec.preparation, DynamicTiles):
        most = spec.preparation.max_tiles
        return most + spec.preparation.thumbnail if most > 1 else 1
    if isinstance(spec.preparation, Tiled):
        return count_rows(most_pieces(spec)) // spec.connector.num_tokens
    return 1


def most_pixels(spec: InputSpec) -> int:
    """Return the most pixels that one run of the encoder takes."""
    preparation = spec.pixels
    if isinstance(preparation, DynamicTiles):
        return max(preparation.size**2, most_dynamic_pixels(preparation.whole))
    if isinstance(preparation, DynamicImage):
        return most_dynamic_pixels(preparation)
    return preparation.size**2


def most_positions(spec: InputSpec) -> int:
    """Return the most positions inside the encoder in one run."""
    if isinstance(spec.preparation, LibraryImage):
        return spec.transformer.num_positions  # its size is that of the longest run
    if isinstance(spec.preparation, Mel):
        from mobilevlm.audio import usual_samples

        encoder, frames = spec.encoder, usual_samples(spec) // spec.preparation.hop
        return encoder.positions if isinstance(encoder, WhisperEncoder) else frames
    return _positions(most_pixels(spec), spec)


def positions_of(arrays: Arrays, spec: InputSpec) -> int:
    """Return the positions inside the encoder in a run."""
    if "mel" in arrays:
        frames: int = arrays["mel"].shape[1]
        return frames // 2 if isinstance(spec.encoder, WhisperEncoder) else frames
    return _positions(math.prod(arrays["pixels"].shape[:2]), spec)


def _positions(pixels: int, spec: InputSpec) -> int:
    encoder = spec.encoder
    if isinstance(encoder, NativeEncoder):
        return pixels // encoder.patch_size**2
    assert not isinstance(encoder, SoundEncoder)
    if isinstance(encoder, TransformerEncoder) and spec.edge is None:
        return pixels // encoder.patch_size**2 + encoder.class_token
    return encoder.num_positions


@lru_cache(maxsize=8)
def _extremes(spec: InputSpec) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return the pieces of the images that take the fewest and the most positions."""
    if isinstance(spec.preparation, LibraryImage):
        return (Run(spec.preparation.fewest_rows),), (Run(spec.preparation.most_rows),)
    if isinstance(spec.preparation, Mel):
        from mobilevlm.audio import sound_pieces, usual_samples

        mel, most = spec.preparation, usual_samples(spec)
        counts = range(mel.hop, most, mel.hop)
        heard = (sound_pieces(count, spec) for count in counts)
        shortest = next((pieces for pieces in heard if count_rows(pieces)), ())
        return shortest, sound_pieces(most, spec)
    if isinstance(spec.preparation, AnyResolution):
        return least_pieces(spec), greatest_pieces(spec.preparation, spec)
    shapes: Iterable[tuple[int, int]] = ((1, 1), (_LARGE, _LARGE))
    if isinstance(spec.preparation, Tiles):
        shapes = tile_shapes(spec.preparation)
    elif isinstance(spec.preparation, AspectTiles):
        shapes = ((spec.preparation.min_tiles, 1), (spec.preparation.max_tiles * _LARGE, _LARGE))
    elif isinstance(spec.preparation, DynamicTiles):
        shapes = dynamic_tile_shapes(spec.preparation)
    elif isinstance(spec.preparation, DynamicImage) and spec.preparation.fill_edge:
        shapes = filling_shapes(spec.preparation)
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
    if isinstance(spec.preparation, DynamicTiles):
        return dynamic_tile_pieces(size, spec.preparation, spec)
    if isinstance(spec.preparation, FixedImage):
        layout = spec.layout
        return (*layout.begin_ids, Run(spec.connector.num_tokens), *layout.end_ids)
    raise _no_images(spec.preparation)


def _no_images(preparation: LibraryImage | Mel) -> ImageError:
    if isinstance(preparation, LibraryImage):
        return ImageError("llama.cpp prepares the images of this model: use VLM.prepare_image")
    return ImageError(f"an input prepared as {preparation.kind!r} takes no images: give it sound")
