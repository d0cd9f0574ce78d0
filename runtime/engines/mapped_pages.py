"""Resident pages of mapped weight files: given back when a session has read what it needs.

onnxruntime maps a file's weights and copies most of them in its kernels' order. What it read stays
resident though nothing reads it again.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

_DONTNEED = 4
"""MADV_DONTNEED of Linux"""
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) *(.*)")
_SMAPS = Path("/proc/self/smaps")


@cache
def unmapping(path: Path) -> threading.Lock:
    """To be held while a session is opened on a file: it unmaps what it has packed. Whoever gives
    pages back waits, since an address that was found may be something else's by the time it is
    used."""
    return threading.Lock()


def give_back(path: Path) -> int:
    """Takes a mapped file's pages out of this process; the next access brings them back from the
    system's cache. Mappings that were written to are left alone. Returns the bytes of address space
    that it concerned (0 where the system has no such thing)."""
    if not _SMAPS.is_file() or not path.is_file():
        return 0
    inode, total = path.stat().st_ino, 0
    try:
        advise = ctypes.CDLL(None).madvise
        with unmapping(path):
            for start, end in list(_untouched(inode, path.name)):
                if advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED) == 0:
                    total += end - start
    except (OSError, AttributeError):
        return 0
    return total


def trim_heap() -> None:
    """Gives back what the C library keeps of freed memory (glibc; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def small_pages(mapped: NDArray[Any]) -> None:
    """Of a mapped file (``numpy.memmap``) that single rows are read of: a touch brings in the pages
    around it, not as much as the system's cache has in one piece, which may be 2 MB."""
    try:
        mapped._mmap.madvise(mmap.MADV_NOHUGEPAGE)  # type: ignore[attr-defined]
    except (OSError, AttributeError):  # a system without, where it means nothing
        return


def _untouched(inode: int, name: str) -> Iterator[tuple[int, int]]:
    """Spans of the file's mappings that hold no page of their own."""
    span = None
    for line in _SMAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        header = _HEADER.fullmatch(line)
        if header is not None:
            ours = int(header[3]) == inode and header[4].endswith(name)
            span = (int(header[1], 16), int(header[2], 16)) if ours else None
        elif span is not None and line.startswith("Anonymous:"):
            if int(line.split()[1]) == 0:
                yield span
            span = None
