"""State of the system prompt in a file of the bundle: buffers with a row for each slot, one behind
the other, then those of windows and those of a fixed size; little-endian."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError
from mobilevlm.runtime.engines import CacheType, Segment
from mobilevlm.state_buffers import first_slot, fixed_shape, slot_buffers, window_rows


def write_segment(path: Path, segment: Segment) -> None:
    """Write a segment that begins with the sequence."""
    with path.open("wb") as file:
        for part in (segment.data, segment.window, segment.fixed):
            if part is not None:
                file.write(part.astype(part.dtype.newbyteorder("<")).tobytes())


def map_segment(path: Path, spec: DecoderSpec, count: int, cache: CacheType) -> Segment:
    """Return the segment of ``count`` tokens in a file, mapped. ``cache``: what keys and values are
    stored in.

    Raises:
        BundleError: the file has not the size that the spec asks for.
    """
    buffers, fixed = slot_buffers(spec), fixed_shape(spec)
    whole = [buffer for buffer in buffers if buffer.kind == "kv"]
    windows = [buffer for buffer in buffers if buffer.kind == "sliding"]
    reach = count - first_slot(window_rows(spec), count)
    shape = (len(whole), *whole[0].sized(count)[1:]) if whole else (0,)
    window_shape = (len(windows), *windows[0].sized(reach)[1:]) if windows else (0,)
    size, window_size = (
        np.dtype(cache).itemsize * math.prod(sizes) for sizes in (shape, window_shape)
    )
    expected = size + window_size + np.dtype(np.float32).itemsize * math.prod(fixed)
    if not 0 < count < spec.context_length or path.stat().st_size != expected:
        raise BundleError(
            f"{path}: {path.stat().st_size} bytes, {count} tokens of this model take {expected}: "
            f"export the bundle again"
        )
    data = np.memmap(path, cache, "r", shape=shape) if whole else np.empty(0, np.float32)
    positions = np.arange(1, count + 1) if spec.rope_sections else None
    window = past = None
    if windows:
        stored = np.fromfile(path, cache, math.prod(window_shape), offset=size)
        window = stored.reshape(window_shape)
    if any(fixed):
        past = np.fromfile(path, "<f4", offset=size + window_size).astype(np.float32)
        past = past.reshape(fixed)
    return Segment(0, count, data, positions, past, window)
