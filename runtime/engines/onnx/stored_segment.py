"""State of the system prompt in a file of the bundle: buffers with a row for each slot, one behind
the other, then those of a fixed size; little-endian."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError
from mobilevlm.runtime.engines import CacheType, Segment
from mobilevlm.state_buffers import fixed_buffers, slot_buffers


def write_segment(path: Path, segment: Segment) -> None:
    """Write a segment that begins with the sequence."""
    with path.open("wb") as file:
        for part in (segment.data, segment.fixed):
            if part is not None:
                file.write(part.astype(part.dtype.newbyteorder("<")).tobytes())


def map_segment(path: Path, spec: DecoderSpec, count: int, cache: CacheType) -> Segment:
    """Return the segment of ``count`` tokens in a file, mapped. ``cache``: what keys and values are
    stored in.

    Raises:
        BundleError: the file has not the size that the spec asks for.
    """
    buffers, fixed = slot_buffers(spec), fixed_buffers(spec)
    shape = (len(buffers), *buffers[0].sized(count)[1:])
    fixed_shape = (len(fixed), *fixed[0].sized(count)) if fixed else (0,)
    size = np.dtype(cache).itemsize * math.prod(shape)
    expected = size + np.dtype(np.float32).itemsize * math.prod(fixed_shape)
    if not 0 < count < spec.context_length or path.stat().st_size != expected:
        raise BundleError(
            f"{path}: {path.stat().st_size} bytes, {count} tokens of this model take {expected}: "
            f"export the bundle again"
        )
    data = np.memmap(path, cache, "r", shape=shape)
    positions = np.arange(1, count + 1) if spec.rope_sections else None
    past = np.fromfile(path, "<f4", offset=size).astype(np.float32) if fixed else None
    return Segment(0, count, data, positions, None if past is None else past.reshape(fixed_shape))
