"""Videos: frames that PyAV reads of a file, for a clip where a model takes some, else as images."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, require
from mobilevlm.input_spec import Tiled
from mobilevlm.media.clip import (
    USUAL_RATE,
    KnownClip,
    Sampled,
    clip_of,
    clip_places,
    spread_places,
    time_texts,
)
from mobilevlm.media.image_file import MAX_PIXELS, RoomFor
from mobilevlm.prompt import Clip
from mobilevlm.spec import ModelSpec

DEFAULT_FRAMES = 8
"""As VILA was trained (``num_video_frames``)."""
CONTAINERS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg",
    "flv", "asf", "m4v", "h264", "hevc", "ivf", "dv", "mxf", "gif", "apng",
)  # fmt: skip
"""FFmpeg's names of the formats that hold their own frames. Playlists and the like are none: they
open other files and addresses."""
_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
_FRAME_BYTES = 36
"""Most that a decoder, its threads and a frame as an image took for each pixel."""


@dataclass(frozen=True)
class Video:
    """A video file that was looked through."""

    path: Path
    total: int
    """Frames in it."""
    rate: float
    """Frames in a second."""


def open_video(path: str | os.PathLike[str]) -> Video:
    """Look through a video.

    Raises:
        ImageError: the file is missing, damaged, or no video.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    with _Opened(path) as stream:
        total = int(stream.frames)
        rate = float(stream.average_rate or stream.guessed_rate or USUAL_RATE)
        if total <= 0:  # the file does not say
            total = sum(packet.size > 0 for packet in stream.container.demux(stream))
    if total <= 0:
        raise ImageError(f"{shown(path)}: no frames in it: is it a video?")
    return Video(path, total, rate)


def sample_frames(video: Video, known: KnownClip | None, count: int | None = None) -> Sampled:
    """Choose the frames that a model takes of a video: ``count``, else its own number. ``known``:
    how it takes clips; without, they go from the first to the last at equal distances, at the
    places of VILA's loader (llava/utils/media.py)."""
    if known is None:
        places = spread_places(video.total, DEFAULT_FRAMES if count is None else count)
    else:
        _, clip, step = known
        places = clip_places(video.total, video.rate, clip, step, count)
    return Sampled(places, video.total, video.rate)


def blank_clip(video: Video, spec: ModelSpec, count: int | None = None) -> Clip:
    """Return what stands for a video in a prompt before its frames are there: empty bytes in the
    places of images."""
    known = clip_of(spec.image) if spec.has_images else None
    sampled = sample_frames(video, known, count)
    if known is None:
        return Clip((b"",) * len(sampled.places))
    _, clip, step = known
    if not clip.tells_times:
        return Clip((b"",))
    return Clip(tuple(time_texts(sampled, step, [b""] * -(-len(sampled.places) // step))))


def frame_tiles(spec: ModelSpec) -> int | None:
    """Return the tiles of a frame at most: one, since official video processors split no frame
    (SmolVLM, InternVL); none where the model splits no image, or llama.cpp alone decides."""
    return 1 if spec.has_images and isinstance(spec.image.preparation, Tiled) else None


def decode_frames(
    video: Video, places: Sequence[int], room_for: RoomFor | None = None
) -> Iterator[Image.Image]:
    """Yield the frames one by one, RGB and upright; those between are decoded and dropped.
    ``room_for``: memory that decoding may take; a video that needs more is refused.

    Raises:
        ImageError: the file is damaged, or its frames are too large.
    """
    wanted, found = set(places), 0
    with _Opened(video.path) as stream:
        _check_size(video.path, stream.width, stream.height, room_for)
        # Frames may be larger than the file says at its beginning.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.thread_type = "AUTO"
        for index, frame in enumerate(stream.container.decode(stream)):
            if index in wanted:
                _check_size(video.path, frame.width, frame.height, room_for)
                yield frame.to_image().rotate(frame.rotation, expand=True)
                found += 1
                if found == len(wanted):
                    return
    if not found:
        raise ImageError(f"{shown(video.path)}: no frames in it: is it a video?")


class _Opened:
    """The first video stream of a file while it is open; what FFmpeg raises becomes one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            import av
        except ImportError:
            raise require("av", "video", f"reading {shown(self._path)}") from None
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):
                raise ImageError(f"{shown(self._path)}: not a regular file: give a video file")
            self._file = self._path.open("rb")
        except (OSError, ValueError):
            raise ImageError(f"{shown(self._path)}: no such video file") from None
        try:
            # A file object, since FFmpeg takes some paths for addresses and patterns.
            self._container = av.open(self._file, options=_OPTIONS)
            return self._container.streams.video[0]
        except Exception as error:  # a decoder of others' on a file of others'
            self._file.close()
            raise self._damaged(error) from None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._container.close()
        self._file.close()
        if isinstance(error, Exception) and not isinstance(error, ImageError):
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ImageError:
        return ImageError(
            f"{shown(self._path)}: not a video that PyAV reads, or damaged "
            f"({shown(error) or type(error).__name__})"
        )


def _check_size(path: Path, width: int, height: int, room_for: RoomFor | None) -> None:
    needed = float(_FRAME_BYTES * width * height)
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{shown(path)}: frames of {width} × {height} are more than {MAX_PIXELS} pixels: "
            f"scale it down first"
        )
    if room_for is not None and needed > (room := room_for(needed)).size:
        raise ImageError(
            f"{shown(path)}: decoding frames of {width} × {height} pixels takes "
            f"{needed / 1e6:.0f} MB, {max(room.size, 0) / 1e6:.0f} MB are left ({room.where}): "
            f"scale it down first, or raise the limit"
        )
