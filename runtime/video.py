"""A video as some of its frames, which go to a model as pictures (PyAV reads it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobilevlm.errors import ImageError, require

DEFAULT_FRAMES = 8
"""As VILA was trained (``num_video_frames``)."""


def sample_frames(path: Path, count: int = DEFAULT_FRAMES) -> list[Image.Image]:
    """``count`` frames from the first to the last at equal distances, RGB and upright; of a shorter
    video every frame.

    The places are those of VILA's loader (llava/utils/media.py). Frames between are decoded and
    dropped, so memory holds the chosen ones only.

    Raises:
        ImageError: the file is missing, damaged, or no video.
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise require("av", "video", f"reading {path}") from None
    if not path.is_file():
        raise ImageError(f"{path}: no such video file")
    try:
        total = _count_frames(av, path)
        places = np.round(np.linspace(0, total - 1, min(count, total))).astype(int).tolist()
        found = _frames_at(av, path, set(places))
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise ImageError(f"{path}: not a video that PyAV reads, or damaged ({error})") from None
    if not found:
        raise ImageError(f"{path}: no frames in it: is it a video?")
    return found


def _count_frames(av: Any, path: Path) -> int:
    """Frames of the first video stream; counted where the file does not say."""
    with path.open("rb") as content, av.open(content) as file:
        stream = file.streams.video[0]
        return int(stream.frames) or sum(packet.size > 0 for packet in file.demux(stream))


def _frames_at(av: Any, path: Path, places: set[int]) -> list[Image.Image]:
    found = []
    with path.open("rb") as content, av.open(content) as file:
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(file.decode(stream)):
            if index in places:
                found.append(frame.to_image().rotate(frame.rotation, expand=True))
                if len(found) == len(places):
                    break
    return found
