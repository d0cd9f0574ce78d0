"""The header of a GGUF file: metadata, and where each tensor lies.

Every count, length and offset is checked against the size of the file before it is used, so that a
damaged file ends in one clear error, here and not inside a native library that would abort the
process. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.errors import BundleError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16
"""More metadata keys or tensors than any model has."""
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

# type id: name, values per block, bytes per block (ggml.h)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
            10: "<Q", 11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file."""

    name: str
    type: str
    """As ggml names it: ``F16``, ``Q4_0`` …"""
    shape: tuple[int, ...]
    """Outermost first, as in numpy; GGUF stores it the other way round."""
    offset: int
    """From the beginning of the file."""
    size: int
    """Bytes."""

    @property
    def row_size(self) -> int:
        """Bytes of one row (along the last dimension)."""
        return self.size // math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """What the header says."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """``llama``, ``clip`` … (empty where the file does not say)."""
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path) -> GgufFile:
    """Reads and checks the header.

    Raises:
        BundleError: no such file, or not a whole GGUF file.
    """
    if not path.is_file():
        raise BundleError(f"{path}: no such file")
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return _Header(path, content).read()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise BundleError(f"{path}: cannot be read: {error}") from None


class _Header:
    """A position in the file; each read checks that the bytes are there."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0

    def read(self) -> GgufFile:
        if self._bytes(4) != MAGIC:
            raise self._damaged("it does not begin with 'GGUF'")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._damaged(f"version {version} is not known")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors > MAX_ENTRIES or num_keys > MAX_ENTRIES:
            raise self._damaged(f"it claims {num_tensors} tensors and {num_keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text()
            if not key or key in metadata:
                raise self._damaged(f"key {key[:60]!r} is empty or stands twice")
            metadata[key] = self._value(self._number("<I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        return GgufFile(self._path, version, metadata, self._placed(infos, metadata))

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._damaged(f"a value of type {kind}, which is not known")
        item, count = self._number("<I"), self._number("<Q")
        if item == _STRING:
            self._check(count * 8)
            return [self._text() for _ in range(count)]
        if item not in _SCALARS:
            raise self._damaged(f"an array of type {item}, which is not known")
        code = _SCALARS[item][1]
        size = struct.calcsize(_SCALARS[item])
        return list(struct.unpack(f"<{count}{code}", self._bytes(count * size)))

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (outermost first), type and offset in the data."""
        name = self._text()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("<I"), self._number("<Q")

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> dict[str, GgufTensor]:
        """The tensors with their places, all inside the file."""
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r:.60}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if kind not in TENSOR_TYPES:
                raise self._damaged(f"tensor {name[:60]!r} has type {kind}, which is not known")
            label, per_block, block_size = TENSOR_TYPES[kind]
            count = math.prod(shape)
            if name in tensors or not count or shape[-1] % per_block or offset % alignment:
                raise self._damaged(
                    f"tensor {name[:60]!r}: shape {shape}, type {label}, offset {offset} cannot be"
                )
            size = count // per_block * block_size
            if start + offset + size > len(self._content):
                raise self._damaged(
                    f"tensor {name[:60]!r} ends at byte {start + offset + size}, the file has "
                    f"{len(self._content)}"
                )
            tensors[name] = GgufTensor(name, label, shape, start + offset, size)
        return tensors

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _text(self) -> str:
        # Pieces of a vocabulary may be broken characters; they stay as they are.
        return self._bytes(self._number("<Q")).decode("utf-8", "surrogateescape")

    def _bytes(self, count: int) -> bytes:
        self._check(count)
        start, self._at = self._at, self._at + count
        return self._content[start : self._at]

    def _check(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise self._damaged(f"it ends inside its header, at byte {len(self._content)}")

    def _damaged(self, what: str) -> BundleError:
        return BundleError(
            f"{self._path}: damaged or not a GGUF file: {what}: copy or export it again"
        )
