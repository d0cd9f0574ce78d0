"""Inputs of a model beside text, as frozen dataclasses: how each is prepared, encoded, brought into
the decoder's space, and placed in a prompt. Part of the ModelSpec (spec.py), with its rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, TypeAlias

from mobilevlm.audio_encoder import ConformerEncoder, SoundEncoder, WhisperEncoder
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.image_encoder import ImageEncoder, NativeEncoder, TransformerEncoder

Resampling: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]
FreeResampling: TypeAlias = Literal["bilinear", "bicubic", "lanczos", "torch_bilinear"]
"""Filters of Pillow; ``torch_bilinear``: of torch for uint8 (media/torch_bilinear.py)."""
IMAGE_TOKEN_ID = -200
"""Marks an image in a list of input ids, as the reference code of LLaVA and MobileVLM does."""
MOST_TILES = 64
"""Tiles that the grid of an image may have."""
MOST_PATCHES = 1 << 16
"""Patches that an encoder of images of any shape takes in one run."""
MOST_FRAMES = 1 << 16
"""Frames of a clip."""
USUAL_EDGE = 448
"""Pixels of an image of no special size, where a model takes any."""
MOST_TILES_PER_EDGE = 8
"""Tiles along the longer edge of an image that becomes as many as its shape gives."""


@dataclass(frozen=True)
class FixedImage:
    """Preparation of an image as one square of uint8 pixels ``(size, size, 3)``."""

    size: int
    """Edge of the square that the tower takes, in pixels."""
    shortest_edge: int
    """The shorter edge is resized to this before the centre crop; of ``fit``, to this at least."""
    aspect: Literal["pad", "crop", "resize", "fit"]
    """``pad``: first pad to a square with the mean colour; ``crop``: centre crop cuts the rest;
    ``resize``: straight to the square, whatever the shape; ``fit``: resize the longer edge to the
    square's, then pad with the mean colour."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resampling = "bicubic"
    kind: Literal["fixed_image"] = "fixed_image"

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """The mean colour as the reference code rounds it: ``int(mean * 255)``."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


@dataclass(frozen=True)
class Tiles:
    """Preparation of an image as a grid of square tiles and itself made small, each uint8 pixels
    ``(size, size, 3)`` of one run of the encoder (media/tiles.py)."""

    size: int
    """Edge of a tile, in pixels."""
    longest_edge: int
    """The longer edge is resized to this, then both to multiples of a tile."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    thumbnail: Literal["none", "first", "last"] = "last"
    """Place of the image made small as a tile, where it has several."""
    resample: Resampling = "lanczos"
    max_tiles: int = 0
    """Tiles of an image at most, beside itself made small; 0: as many as ``longest_edge`` gives.
    An image that is not split is made a square, whatever its shape."""
    kind: Literal["tiles"] = "tiles"

    @property
    def most_per_edge(self) -> int:
        """Tiles along the longer edge."""
        return -(-self.longest_edge // self.size)


MOST_GRIDS = 1000
"""Grids that an image's is chosen from."""


@dataclass(frozen=True)
class AnyResolution:
    """Preparation of an image as itself made small, then a grid of square tiles, each uint8 pixels
    ``(size, size, 3)`` of one run of the encoder. The visual tokens of the tiles are put together
    as one grid (LLaVA-NeXT; media/any_resolution.py, mobilevlm/assembly.py)."""

    size: int
    """Edge of a tile, in pixels."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of tiles that an image may become; of equally good ones the first."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    most_tiles: int = 0
    """A grid with clearly more visual tokens than this many tiles have is made smaller
    (``anyres_max_9``); 0: none is."""
    several: Literal["tiles", "square"] = "tiles"
    """Preparation of each image of a prompt with several. ``square``: padded to a square with the
    mean colour, one tile (LLaVA-OneVision)."""
    max_tiles: int = 0
    """Tiles of a grid, at most, 0: as the grids have. An image that no grid is left for becomes one
    tile as in ``square``, and by 1 each does."""
    rounding: bool = True
    """Edges of what an image covers of a grid are rounded to 7 digits before they are cut to whole
    numbers, as the hub's code does and LLaVA's own does not."""
    kind: Literal["any_resolution"] = "any_resolution"


@dataclass(frozen=True)
class AspectTiles:
    """Preparation of an image as the grid of square tiles whose shape is nearest to its own, and
    itself made small after them, each uint8 pixels ``(size, size, 3)`` of one run of the encoder
    (media/aspect_tiles.py)."""

    size: int
    """Edge of a tile, in pixels."""
    min_tiles: int
    max_tiles: int
    """Tiles of the grid; the image made small comes on top."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    thumbnail: bool = True
    """The image made small follows, where it has several tiles."""
    kind: Literal["aspect_tiles"] = "aspect_tiles"


SquareImages: TypeAlias = FixedImage | Tiles | AspectTiles | AnyResolution
"""Preparations for encoders that take squares of one size."""


@dataclass(frozen=True)
class ClipSpec:
    """Frames of a video, their size and their times (Qwen2-VL, section 2.1)."""

    min_pixels: int
    max_pixels: int
    """Pixels of a frame at least."""
    total_pixels: int = 0
    """Pixels of all frames together at most; ``min_pixels`` is of all together then. 0: each frame
    is resized by itself."""
    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    sampling: Literal["parts", "ends"] = "ends"
    """Places of the frames: ``ends``: the first, the last, and those between at equal distances;
    ``parts``: the first of each of equal parts, as many as fill whole time steps."""
    positions_per_second: float = 0.0
    """Positions of a second (Qwen2.5-VL); 0: each time step has the next one."""
    tells_times: bool = False
    """Each time step is an image of its own, behind a text with its seconds (Qwen3-VL)."""


@dataclass(frozen=True)
class DynamicImage:
    """Preparation of an image near its own size, as uint8 pixels ``(height, width, 3)`` whose edges
    are multiples of ``factor`` (media/dynamic_image.py)."""

    patch_size: int
    merge_size: int
    """Patches along each edge of the square that becomes one visual token."""
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: FreeResampling = "bicubic"
    least_edge: bool = False
    """An edge is ``factor`` pixels at least before the pixels are counted (LFM2-VL)."""
    fill_edge: int = 0
    """Pixels of an edge at most, where every image is brought to ``max_pixels`` in its own shape,
    both edges rounded down (Gemma 4); 0: images stay near their own size."""
    clip: ClipSpec | None = None
    """How videos become clips; none: their frames are images."""
    kind: Literal["dynamic_image"] = "dynamic_image"

    @property
    def factor(self) -> int:
        """Pixels along each edge of what becomes one visual token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class DynamicTiles:
    """Preparation of an image near its own size; of a larger one as the grid of square tiles whose
    shape is nearest to its own, and itself near its own size behind them. Each is uint8 pixels
    ``(height, width, 3)`` of one run of the encoder (media/dynamic_tiles.py)."""

    size: int
    """Edge of a tile, in pixels."""
    min_tiles: int
    max_tiles: int
    """Tiles of the grid; 1: no image is split."""
    whole: DynamicImage
    split_pixels: int
    """Images with more pixels, their edges rounded to multiples of ``whole.factor``, are split."""
    thumbnail: bool = True
    """The image made small follows its tiles."""
    kind: Literal["dynamic_tiles"] = "dynamic_tiles"

    @property
    def mean(self) -> tuple[float, float, float]:
        """As of the whole."""
        return self.whole.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """As of the whole."""
        return self.whole.std


Tiled: TypeAlias = Tiles | AspectTiles | AnyResolution | DynamicTiles
"""Preparations that split an image, each with a field ``max_tiles``."""
PixelImages: TypeAlias = SquareImages | DynamicImage | DynamicTiles
"""Preparations for encoders that take pixels."""


@dataclass(frozen=True)
class Mel:
    """Preparation of sound as log-mel spectrograms float32 ``(bins, frames)``, one for each run of
    the encoder (mobilevlm/audio.py)."""

    bins: int
    sampling_rate: int = 16_000
    """Samples in a second."""
    window: int = 400
    """Samples that a frame is made of."""
    hop: int = 160
    """Samples from one frame to the next."""
    frames: int = 3000
    """Frames of a window of the encoder; not read where ``windows`` is ``any``."""
    fft: int = 400
    """Samples of a Fourier transform, ``window`` of them in its middle."""
    scale: Literal["slaney", "htk"] = "slaney"
    """Mel scale; filters of ``slaney`` have equal area, those of ``htk`` equal height."""
    windows: Literal["first", "all", "any"] = "all"
    """``first``: of a longer sound only what one window takes is heard (Qwen2-Audio); ``all``: a
    run for each window, the last filled with silence (Voxtral); ``any``: one run of any length
    (Granite Speech)."""
    joined: int = 1
    """Neighbouring frames that are given as one; a rest is dropped."""
    kind: Literal["mel"] = "mel"

    @property
    def window_samples(self) -> int:
        """Samples of a window of the encoder."""
        return self.frames * self.hop


@dataclass(frozen=True)
class LibraryImage:
    """Preparation of an image by llama.cpp, which alone knows the sizes, tiles and marks of a pair
    of GGUF files (runtime/engines/llama/pair_images.py)."""

    projector: str
    """llama.cpp's name of the connector."""
    fewest_rows: int
    """Positions that every image takes."""
    most_rows: int
    """Positions of a photo, those of marks included."""
    kind: Literal["llama.cpp"] = "llama.cpp"


Encoder: TypeAlias = ImageEncoder | WhisperEncoder | ConformerEncoder
"""An encoder of images or of sound."""


@dataclass(frozen=True)
class LayoutSpec:
    """Ids around the visual tokens of an image, in the prompt and in official code."""

    end_ids: tuple[int, ...] = ()
    """Follow each image."""
    placeholder_ids: tuple[int, ...] = (IMAGE_TOKEN_ID,)
    """Ids of the official code for an image, visual tokens and ``end_ids``; not read where there is
    a ``row_id``."""
    row_id: int | None = None
    """Id of the official code for each visual token of an image."""
    video_row_id: int | None = None
    """Id of the official code for each visual token of a clip; ``row_id`` when none is given."""
    begin_ids: tuple[int, ...] = ()
    """Before each image."""
    tile_ids: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Ids before each tile, by row and column; without any, tiles are not marked."""
    row_end_ids: tuple[int, ...] = ()
    """Ids between two rows of tiles."""
    between_ids: tuple[int, ...] = ()
    """Ids between the tiles and the image made small."""
    thumbnail_ids: tuple[int, ...] = ()
    """Ids before the image made small, or before an image that is one tile."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All that may stand in a prompt."""
        tiles = chain.from_iterable(self.tile_ids)
        others = (
            self.begin_ids,
            self.end_ids,
            self.row_end_ids,
            self.between_ids,
            self.thumbnail_ids,
        )
        return tuple(chain(*others, *tiles))


@dataclass(frozen=True)
class InputSpec:
    """One kind of input beside text: prepared, encoded, and brought into the decoder's space."""

    preparation: PixelImages | LibraryImage | Mel
    encoder: Encoder = field(metadata={"formerly_kind": "transformer"})
    connector: ConnectorSpec
    layout: LayoutSpec = LayoutSpec()

    @property
    def transformer(self) -> TransformerEncoder:
        """The encoder of a model that has a vision transformer.

        Raises:
            MobileVLMError: it is of another kind.
        """
        if isinstance(self.encoder, TransformerEncoder):
            return self.encoder
        if isinstance(self.encoder, SoundEncoder):
            raise MobileVLMError("this needs an image encoder, and this model takes sound")
        raise MobileVLMError(
            f"this needs a vision transformer, and the image encoder is {self.encoder.kind!r}: use "
            f"--format onnx"
        )

    @property
    def square(self) -> SquareImages:
        """The preparation of an encoder that takes squares of one size.

        Raises:
            MobileVLMError: it takes images of other shapes.
        """
        if isinstance(self.preparation, SquareImages):
            return self.preparation
        raise MobileVLMError(
            f"this needs images of one size, and those of this model are prepared as "
            f"{self.preparation.kind!r}: use --format onnx"
        )

    @property
    def pixels(self) -> PixelImages:
        """The preparation of an encoder that takes pixels.

        Raises:
            MobileVLMError: it takes something else.
        """
        if isinstance(self.preparation, PixelImages):
            return self.preparation
        raise MobileVLMError(
            f"this needs images as pixels, and an input of this model is prepared as "
            f"{self.preparation.kind!r}"
        )

    @property
    def mel(self) -> Mel:
        """The preparation of sound.

        Raises:
            MobileVLMError: it is another input.
        """
        if isinstance(self.preparation, Mel):
            return self.preparation
        raise MobileVLMError(
            f"this needs sound, and an input of this model is prepared as {self.preparation.kind!r}"
        )

    @property
    def edge(self) -> int | None:
        """Edge of the squares that the encoder takes, in pixels; none where shapes vary."""
        return self.preparation.size if isinstance(self.preparation, SquareImages) else None

    @property
    def num_features(self) -> int | None:
        """Features of a run of the encoder; none where shapes vary."""
        if self.edge is None or isinstance(self.encoder, (NativeEncoder, SoundEncoder)):
            return None
        return self.encoder.num_features

    @property
    def usual_edge(self) -> int:
        """Edge of a square image that is one run of the encoder, in pixels; one of no special size
        where it may be much larger."""
        if isinstance(self.preparation, LibraryImage):
            return self.transformer.image_size
        image = self.pixels
        if isinstance(image, DynamicImage):
            pixels = min(max(USUAL_EDGE**2, image.min_pixels), image.max_pixels)
            return max(math.isqrt(pixels) // image.factor, 1) * image.factor
        return image.size
