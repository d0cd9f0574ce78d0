"""Copies of an image encoder's file that say something else: which layer's features are used, or
that images are not split.

mtmd leaves out the last layer of a file that does not say (files of llama.cpp's first converter,
which had left one out already), so it is given a copy that does.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mobilevlm.errors import BundleError, FileWarning
from mobilevlm.gguf.encoder import FEATURE_LAYER, LONGEST_EDGE
from mobilevlm.gguf.file import DEFAULT_ALIGNMENT, GgufFile

_COUNTS_END = 24
"""Bytes of magic, version and the numbers of tensors and keys."""
_UINT32, _INT32, _ARRAY = 4, 5, 9


@contextmanager
def with_feature_layer(header: GgufFile, layers: int) -> Iterator[Path]:
    """Yield a file to open: this one, or a copy in the system's temporary folder, for as long as
    the context lasts. ``layers``: how many are run.

    Raises:
        BundleError: the copy cannot be written.
    """
    if FEATURE_LAYER in header.metadata:
        yield header.path
        return
    warnings.warn(
        f"{header.path}: it does not say which layer's features are used: all {layers} layers are "
        f"run, which llama.cpp alone would not do; the file is copied at each start, since the "
        f"copy must say so (key {FEATURE_LAYER})",
        FileWarning,
        stacklevel=2,
    )
    with _copied(header, FEATURE_LAYER, lambda path: _write(header, layers, path)) as path:
        yield path


@contextmanager
def without_splitting(header: GgufFile, size: int) -> Iterator[Path]:
    """Yield a copy of a file that says how far images are split, which says that they are not. It
    is given tiles of this size, ready made: mtmd would split them again.

    Raises:
        BundleError: the copy cannot be written.
    """
    with _copied(header, LONGEST_EDGE, lambda path: _write_edge(header, size, path)) as path:
        yield path


@contextmanager
def _copied(header: GgufFile, key: str, write: Callable[[Path], None]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mobilevlm-") as folder:
        path = Path(folder, "mmproj.gguf")
        try:
            write(path)
        except OSError as error:
            raise BundleError(
                f"{header.path}: a copy with the key {key} cannot be written to {folder}: {error}: "
                f"set TMPDIR to a folder with room for it"
            ) from None
        yield path


def _write_edge(header: GgufFile, size: int, path: Path) -> None:
    name = LONGEST_EDGE.encode()
    entry = struct.pack("<Q", len(name)) + name + struct.pack("<I", _UINT32)
    shutil.copyfile(header.path, path)
    with path.open("r+b") as copy:
        at = copy.read(header.header_size).index(entry) + len(entry)
        copy.seek(at)
        copy.write(struct.pack("<I", size))


def _write(header: GgufFile, layers: int, path: Path) -> None:
    key = FEATURE_LAYER.encode()
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQi", _ARRAY, _INT32, 1, layers)
    alignment = header.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    start = -(-header.header_size // alignment) * alignment
    with header.path.open("rb") as source, path.open("wb") as target:
        counts = source.read(_COUNTS_END)
        [keys] = struct.unpack("<Q", counts[-8:])
        target.write(counts[:-8] + struct.pack("<Q", keys + 1) + entry)
        target.write(source.read(header.header_size - _COUNTS_END))
        target.write(bytes(-target.tell() % alignment))
        source.seek(start)
        shutil.copyfileobj(source, target, 1 << 20)
