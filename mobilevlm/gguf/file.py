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
from mobilevlm.gguf.split import with_parts
from mobilevlm.regular_file import LFS_POINTER, LFS_REMEDY

MAGIC = b"GGUF"
VERSIONS = (2, 3)
OLD_MAGICS = (b"ggml", b"lmgg", b"tjgg", b"fmgg", b"algg")
"""Magic numbers of llama.cpp's formats before GGUF, in the file's byte order."""
MAX_ENTRIES = 1 << 16
"""More metadata keys or tensors than any model has."""
MAX_ITEMS = 1 << 21
"""Array items of the whole file. A vocabulary of 262,144 tokens with merges has 1.4 million."""
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

_REMOVED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
"""Types of older files; llama.cpp has removed them."""
_NEW_TYPES = {40: " (NVFP4)", 41: " (Q1_0)"}
"""Types that exist and are not read here."""
_MAX_NEW_TYPE = 127
"""A higher number is damage rather than a type to come."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
            10: "<Q", 11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_KINDS = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool",
          8: "string", 10: "u64", 11: "i64", 12: "f64"}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """Type, shape and location of a tensor in the file."""

    name: str
    type: str
    """As ggml names it: ``F16``, ``Q4_0`` …"""
    shape: tuple[int, ...]
    """Outermost first, as in numpy; GGUF stores it the other way round."""
    offset: int
    """From the beginning of the file."""
    size: int
    """Bytes."""
    path: Path
    """The file, or the part of a split one."""

    @property
    def row_size(self) -> int:
        """Bytes of one row (along the last dimension)."""
        return self.size // math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """Header of a GGUF file."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    kinds: dict[str, str]
    """Type of each value: ``u32``, ``string``, ``array of i32`` …"""
    parts: tuple[Path, ...]
    """All files of it: several of a split one."""
    header_size: int
    """Bytes before the padding that the tensors begin after."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.parts)

    @property
    def architecture(self) -> str:
        """``llama``, ``clip`` … (empty where the file does not say)."""
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header; of a split file, the headers of all its parts.

    Raises:
        BundleError: no such file, not a whole GGUF file, one of another time, or a part of a split
            one that is not the first, or whose others are missing.
    """
    return with_parts(read_one(path), read_one)


def read_one(path: Path) -> GgufFile:
    """Read and check the header of one file, which may be a part.

    Raises:
        BundleError: no such file, not a whole GGUF file, or one of another time.
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
        self._items = 0
        """Array items so far."""

    def read(self) -> GgufFile:
        self._check_magic()
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._of_another_version(version)
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors > MAX_ENTRIES or num_keys > MAX_ENTRIES:
            raise self._damaged(f"it claims {num_tensors} tensors and {num_keys} keys")
        metadata: dict[str, Any] = {}
        kinds: dict[str, str] = {}
        for _ in range(num_keys):
            key = self._text()
            if not key or key in metadata:
                raise self._damaged(f"key {key[:60]!r} is empty or stands twice")
            kinds[key], metadata[key] = self._value(self._number("<I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        tensors = self._placed(infos, metadata)
        return GgufFile(self._path, version, metadata, tensors, kinds, (self._path,), self._at)

    def _check_magic(self) -> None:
        if self._content[: len(LFS_POINTER)] == LFS_POINTER:
            raise BundleError(f"{self._path}: {LFS_REMEDY}")
        magic = self._bytes(4)
        if magic in OLD_MAGICS:
            raise BundleError(
                f"{self._path}: older than GGUF (format {magic[::-1].decode()!r} of 2023): convert "
                f"the model again with llama.cpp's convert_hf_to_gguf.py"
            )
        if magic != MAGIC:
            raise self._damaged("it does not begin with 'GGUF'")

    def _of_another_version(self, version: int) -> BundleError:
        known = " and ".join(map(str, VERSIONS))
        if version == 1:
            return BundleError(
                f"{self._path}: GGUF version 1 (2023), older than {known}, which are read: convert "
                f"the model again with llama.cpp's convert_hf_to_gguf.py"
            )
        if version & 0xFFFF == 0 and version >> 24 in VERSIONS:
            return BundleError(
                f"{self._path}: a big-endian GGUF file: take the little-endian one, or convert it "
                f"with gguf-py's gguf_convert_endian.py"
            )
        if 3 < version < 100:
            return BundleError(
                f"{self._path}: GGUF version {version}, newer than {known}, which are read: update "
                f"mobilevlm, or take a file of version 3"
            )
        return self._damaged(f"version {version} is not known")

    def _value(self, kind: int) -> tuple[str, Any]:
        """Return the name of a value's type, and the value."""
        if kind in _SCALARS:
            return _KINDS[kind], self._number(_SCALARS[kind])
        if kind == _STRING:
            return "string", self._text()
        if kind != _ARRAY:
            raise self._damaged(f"a value of type {kind}, which is not known")
        item, count = self._number("<I"), self._number("<Q")
        if item not in _KINDS:
            raise self._damaged(f"an array of type {item}, which is not known")
        self._items += count
        if self._items > MAX_ITEMS:
            raise self._damaged(f"its arrays have more than {MAX_ITEMS} items")
        label = f"array of {_KINDS[item]}"
        if item == _STRING:
            self._check(count * 8)
            return label, self._texts(count)
        code = _SCALARS[item][1]
        size = struct.calcsize(_SCALARS[item])
        return label, list(struct.unpack(f"<{count}{code}", self._bytes(count * size)))

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
                raise self._of_another_type(name, kind)
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
            tensors[name] = GgufTensor(name, label, shape, start + offset, size, self._path)
        return tensors

    def _of_another_type(self, name: str, kind: int) -> BundleError:
        where = f"{self._path}: tensor {name[:60]!r}"
        if kind in _REMOVED_TYPES:
            return BundleError(
                f"{where} is of type {kind} ({_REMOVED_TYPES[kind]}), older than this version "
                f"reads and removed from llama.cpp: take the file in Q4_0, or convert it again"
            )
        if max(TENSOR_TYPES) < kind <= _MAX_NEW_TYPE:
            return BundleError(
                f"{where} is of type {kind}{_NEW_TYPES.get(kind, '')}, newer than this version "
                f"reads: take the file in another type (Q4_0, Q4_K_M, Q8_0 …), or update mobilevlm"
            )
        return self._damaged(f"tensor {name[:60]!r} has type {kind}, which is not known")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _text(self) -> str:
        # Pieces of a vocabulary may be broken characters; they stay as they are.
        return self._bytes(self._number("<Q")).decode("utf-8", "surrogateescape")

    def _texts(self, count: int) -> list[str]:
        """Return as many texts; a vocabulary is most of the work of reading a header."""
        content, at, end = self._content, self._at, len(self._content)
        length_at, found = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = at + 8
            if start > end:
                self._check(end)
            [length] = length_at(content, at)
            at = start + length
            if at > end:
                self._check(end)
            found.append(content[start:at].decode("utf-8", "surrogateescape"))
        self._at = at
        return found

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
