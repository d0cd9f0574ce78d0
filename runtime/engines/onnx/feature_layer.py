"""An image encoder that says which layer's features are used.

mtmd leaves out the last layer of a file that does not say (files of llama.cpp's first converter,
which had left one out already), so it is given a copy that does.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobilevlm.errors import BundleError, FileWarning
from mobilevlm.gguf.encoder import FEATURE_LAYER
from mobilevlm.gguf.file import DEFAULT_ALIGNMENT, GgufFile

_COUNTS_END = 24
"""Bytes of magic, version and the numbers of tensors and keys."""
_ARRAY, _INT32 = 9, 5


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
    with tempfile.TemporaryDirectory(prefix="mobilevlm-") as folder:
        path = Path(folder, "mmproj.gguf")
        try:
            _write(header, layers, path)
        except OSError as error:
            raise BundleError(
                f"{header.path}: a copy with the key {FEATURE_LAYER} cannot be written to "
                f"{folder}: {error}: set TMPDIR to a folder with room for it"
            ) from None
        yield path


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
