"""Videos as clips: which frames, their size, and the time of each step. A step is as many frames as
a patch covers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import ImageError
from mobilevlm.image import ImageInput, RoomFor, filter_of, read_resized
from mobilevlm.image_encoder import NativeEncoder
from mobilevlm.input_spec import ClipSpec, DynamicImage, InputSpec
from mobilevlm.media.dynamic_image import fitted, resized
from mobilevlm.prompt import Clip, Prepared, Run

KnownClip: TypeAlias = tuple[DynamicImage, ClipSpec, int]
"""Preparation of images and of clips, and the frames of a step."""
USUAL_RATE = 24.0
"""Frames in a second of a video that does not say, as in the official code."""
_FLOOR = 1.05
"""Least pixels of a frame as a multiple of the least of all frames."""


@dataclass(frozen=True)
class Sampled:
    """Frames that are taken of a video."""

    places: tuple[int, ...]
    """Their numbers, from 0, in order."""
    total: int
    """Frames of the video."""
    rate: float = USUAL_RATE
    """Frames of the video in a second."""

    def seconds(self, frames: int) -> list[float]:
        """Return the time of each step of so many frames: the middle between its first and last
        frame. The last frame fills the last step."""
        places = [*self.places, *self.places[-1:] * (-len(self.places) % frames)]
        return [
            (places[step] + places[step + frames - 1]) / self.rate / 2
            for step in range(0, len(places), frames)
        ]


def clip_of(spec: InputSpec) -> KnownClip | None:
    """Return how a model takes clips; none where it takes the frames of a video as images."""
    image, encoder = spec.preparation, spec.encoder
    if isinstance(image, DynamicImage) and image.clip and isinstance(encoder, NativeEncoder):
        return image, image.clip, encoder.frames
    return None


def spread_places(total: int, count: int) -> tuple[int, ...]:
    """Return the first, the last, and those between at equal distances; of fewer frames each."""
    places = np.round(np.linspace(0, total - 1, min(count, total))).astype(int)
    return tuple(places.tolist())


def clip_places(
    total: int, rate: float, clip: ClipSpec, step: int, count: int | None = None
) -> tuple[int, ...]:
    """Return the numbers of the frames that are taken of a video (``sample_frames`` of the official
    video processors). ``step``: frames of a step; ``count``: in place of the model's own number."""
    wanted = total / rate * clip.frames_per_second
    if clip.sampling == "ends":
        own = min(max(int(wanted), clip.min_frames), clip.max_frames)
        return spread_places(total, own if count is None else count)
    if count is not None:
        whole = round(count / step) * step
    else:
        most = min(clip.max_frames, total) // step * step
        whole = int(min(max(wanted, clip.min_frames), most) // step) * step
    whole = min(max(whole, step), total)
    places = np.arange(whole) * (total / whole)
    return tuple(places.astype(np.float32).astype(int).tolist())  # torch has them in float32


def frame_size(
    size: tuple[int, int], frames: int, image: DynamicImage, clip: ClipSpec
) -> tuple[int, int]:
    """Return the width and height that each frame of a clip is resized to (``smart_resize`` of the
    official video processors).

    Raises:
        ImageError: they are too long.
    """
    least, most = clip.min_pixels, clip.max_pixels
    if not clip.total_pixels:
        return resized(size, replace(image, min_pixels=least, max_pixels=most))
    if min(size) < image.factor:
        scale = max(image.factor / edge for edge in size)
        size = (int(size[0] * scale), int(size[1] * scale))
    frames = max(frames, 2)
    each = max(min(most, clip.total_pixels // frames), int(least * _FLOOR))
    return fitted(size, image, (least, each * frames), frames, round(frames / 2) * 2)


def prepare_clip(
    frames: Iterable[ImageInput],
    sampled: Sampled,
    spec: InputSpec,
    room_for: RoomFor | None = None,
) -> Clip:
    """Return a video as the model takes it: each step is its frames beside each other, in pixels
    ``(height, width, 3 · frames)``. The last frame fills the last step.

    Raises:
        ImageError: as of :func:`mobilevlm.image.read_resized`; there is no frame, frames have
            several sizes, or the model takes no clips.
    """
    known = clip_of(spec)
    if known is None:
        raise ImageError("this model takes no clips: give the frames as images")
    image, clip, step = known

    def target(size: tuple[int, int]) -> tuple[int, int]:
        return frame_size(size, len(sampled.places), image, clip)

    edge = int(clip.max_pixels**0.5)
    read = [
        np.asarray(read_resized(frame, target, filter_of(image.resample), room_for, edge), np.uint8)
        for frame in frames
    ]
    if len({pixels.shape for pixels in read}) != 1:
        raise ImageError("a clip needs a frame or more, all of one size")
    sampled = replace(sampled, places=sampled.places[: len(read)])  # of a damaged file fewer
    read += read[-1:] * (-len(read) % step)
    steps = [np.concatenate(read[here : here + step], 2) for here in range(0, len(read), step)]
    rows, columns = (edge // image.factor for edge in steps[0].shape[:2])
    if not clip.tells_times:
        per_step = step / (len(sampled.places) / sampled.total * sampled.rate)
        pace = clip.positions_per_second * per_step
        times = tuple(int(number * pace) for number in range(len(steps))) if pace else ()
        run = Run(len(steps) * rows * columns, (len(steps), rows, columns), times, True)
        return Clip((_prepared(steps, run, spec),))
    run = Run(rows * columns, (1, rows, columns), from_video=True)
    images = [_prepared([pixels], run, spec) for pixels in steps]
    return Clip(tuple(time_texts(sampled, step, images)))


def time_texts(
    sampled: Sampled, step: int, images: Sequence[ImageInput]
) -> Iterable[str | ImageInput]:
    """Yield the images of steps, each behind the text that tells its time."""
    for seconds, image in zip(sampled.seconds(step), images, strict=True):
        yield f"<{seconds:.1f} seconds>"
        yield image


def _prepared(steps: Sequence[NDArray[np.uint8]], run: Run, spec: InputSpec) -> Prepared:
    arrays = tuple({"pixels": pixels} for pixels in steps)
    return Prepared("image", arrays, (*spec.layout.begin_ids, run, *spec.layout.end_ids))
