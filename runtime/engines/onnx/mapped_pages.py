"""Pages that a process has of mapped files, and memory that the C library keeps."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from mobilevlm.errors import BundleError


def drop_pages(mapped: NDArray[Any]) -> None:
    """Takes the pages of a file mapped for reading (``numpy.memmap``) out of this process; the next
    access brings them back from the system's cache. Nothing where the system has no such thing."""
    _advise(mapped, "MADV_DONTNEED")


def check_whole(mapped: NDArray[Any]) -> None:
    """Check that a mapped file (``numpy.memmap``) still has all that was mapped. Reading what is no
    longer there would end the process (SIGBUS); between this check and the reading it still does.

    Raises:
        BundleError: the file was made shorter in place.
    """
    needed = mapped.offset + mapped.nbytes  # type: ignore[attr-defined]
    if mapped._mmap.size() < needed:  # type: ignore[attr-defined]
        raise BundleError(
            f"{mapped.filename}: the file became shorter while it was in use: put "  # type: ignore[attr-defined]
            f"it back and load the model again"
        )


def small_pages(mapped: NDArray[Any]) -> None:
    """Advise the system that single rows of a mapped file (``numpy.memmap``) are read: a touch then
    brings in the pages around it, not a whole piece of the system's cache, which may be 2 MB."""
    _advise(mapped, "MADV_NOHUGEPAGE")


def keep_apart(mapped: NDArray[Any], borders: Sequence[int]) -> None:
    """Divides a mapped file (``numpy.memmap``) at these bytes, so that a touch on one side brings
    in nothing of the other: Linux maps as much around it as its cache has in one piece, but not
    beyond pages that were advised otherwise."""
    pages = sorted({border // mmap.PAGESIZE * mmap.PAGESIZE for border in borders} - {len(mapped)})
    for start, end in list(pairwise([*pages, len(mapped)]))[::2]:
        _advise(mapped, "MADV_NOHUGEPAGE", start, end - start)


def trim_heap() -> None:
    """Gives back what the C library keeps of freed memory (glibc; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _advise(mapped: NDArray[Any], advice: str, *span: int) -> None:
    try:
        mapped._mmap.madvise(getattr(mmap, advice), *span)  # type: ignore[attr-defined]
    except (OSError, AttributeError):  # a system without
        return
