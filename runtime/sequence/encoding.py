"""Runs of an encoder over the parts of an image: one after the other, or several at the same time.

Each run computes what it computes alone, bit for bit. A batch would not: ONNX Runtime's 8-bit
products choose one scale for all rows that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from mobilevlm.assembly import assemble
from mobilevlm.prompt import Arrays, Prepared, Rows
from mobilevlm.runtime.engines import EncoderEngine


def encode_runs(vision: EncoderEngine, runs: Sequence[Arrays], at_once: int = 1) -> Iterator[Rows]:
    """Yield the rows of each run, of which ``at_once`` are computed at the same time."""
    count = min(at_once, len(runs))
    if count <= 1:
        yield from map(vision.encode, runs)
        return
    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(vision.encode, runs)


def encode_image(
    vision: EncoderEngine,
    image: Prepared,
    at_once: int = 1,
    check: Callable[[], None] = lambda: None,
) -> Rows:
    """Return the rows of an image. ``check`` is called before each run, which it may stop."""

    def checked() -> Iterator[Rows]:
        check()
        for rows in encode_runs(vision, image.arrays, at_once):
            yield rows
            check()

    rows = assemble(checked(), image.assembly)
    if image.reduction is None:
        return rows
    from mobilevlm.reduction import reduced  # for who asks for fewer

    return reduced(rows, image.reduction)
