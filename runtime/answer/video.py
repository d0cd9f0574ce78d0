"""A video as some of its frames, which go to a model as images (PyAV reads it)."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, require
from mobilevlm.input_spec import Tiled
from mobilevlm.media.image_file import MAX_PIXELS, RoomFor
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
    """A video file that was looked through, and the frames that are to be taken of it."""

    path: Path
    places: tuple[int, ...]
    """Their numbers, from 0."""


def open_video(path: Path, count: int = DEFAULT_FRAMES) -> Video:
    """Choose ``count`` frames from the first to the last at equal distances; of a shorter video
    every frame. The places are those of VILA's loader (llava/utils/media.py).

    Raises:
        ImageError: the file is missing, damaged, or no video.
        MissingExtraError: PyAV is not installed.
    """
    with _Opened(path) as stream:
        total = int(stream.frames)
        if total <= 0:  # the file does not say
            total = sum(packet.size > 0 for packet in stream.container.demux(stream))
    if total <= 0:
        raise ImageError(f"{shown(path)}: no frames in it: is it a video?")
    places = np.round(np.linspace(0, total - 1, min(count, total))).astype(int)
    return Video(path, tuple(places.tolist()))


def frame_tiles(spec: ModelSpec) -> int | None:
    """Return the tiles of a frame at most: one, since official video processors split no frame
    (SmolVLM, InternVL); none where the model splits no image, or llama.cpp alone decides."""
    return 1 if isinstance(spec.image.preparation, Tiled) else None


def decode_frames(video: Video, room_for: RoomFor | None = None) -> Iterator[Image.Image]:
    """Yield the frames one by one, RGB and upright; those between are decoded and dropped.
    ``room_for``: memory that decoding may take; a video that needs more is refused.

    Raises:
        ImageError: the file is damaged, or its frames are too large.
    """
    places, found = set(video.places), 0
    with _Opened(video.path) as stream:
        _check_size(video.path, stream.width, stream.height, room_for)
        # Frames may be larger than the file says at its beginning.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.thread_type = "AUTO"
        for index, frame in enumerate(stream.container.decode(stream)):
            if index in places:
                _check_size(video.path, frame.width, frame.height, room_for)
                yield frame.to_image().rotate(frame.rotation, expand=True)
                found += 1
                if found == len(places):
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
