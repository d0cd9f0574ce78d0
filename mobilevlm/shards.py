"""Weight files, each opened for reading one tensor at a time: safetensors, and PyTorch pickles.

A file is checked against its own size first, so that a short header cannot ask for memory that the
file does not fill.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import CheckpointError, require
from mobilevlm.regular_file import LFS_POINTER, LFS_REMEDY

Float32 = NDArray[np.float32]

FLOATS = frozenset({"f64", "f32", "f16", "bf16"})
_TORCH_DTYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PIECE = 1 << 22
"""Numbers of a stored tensor that are converted at a time."""
_PREFIX = 8
"""Bytes of the length that a safetensors file begins with."""
_MAX_HEADER = 100 * 10**6
"""Bytes that the safetensors library takes of a header."""
_MAX_MEMBER = 1 << 26
"""Bytes of a member that torch reads as a whole: the pickle and marks beside the storages."""


class Shard(Protocol):
    """One open weight file."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> Float32: ...
    def read_rows(self, name: str, start: int, stop: int) -> Float32: ...


def open_shard(path: Path) -> Shard:
    """Open a weight file by its suffix.

    Raises:
        CheckpointError: it is damaged, truncated, or larger inside than on the disk.
        MissingExtraError: a package that reads it is not installed.
    """
    refuse_pointer(path)
    return _SafetensorsShard(path) if path.suffix == ".safetensors" else _PickleShard(path)


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError where a file is what Git LFS leaves in place of a large one, or cannot
    be read at all."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if begin == LFS_POINTER:
        raise CheckpointError(f"{path}: {LFS_REMEDY}")


class _SafetensorsShard:
    def __init__(self, path: Path) -> None:
        try:
            import ml_dtypes  # noqa: F401  (teaches numpy the type bfloat16)
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise require("safetensors", "export", f"reading {path}") from None
        _check_length(path)
        try:
            self._file: Any = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        self._path, self._errors = path, (SafetensorError, ValueError, TypeError, AttributeError)

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return str(self._file.get_slice(name).get_dtype()).lower()

    def read(self, name: str) -> Float32:
        stored = self._file.get_slice(name)
        shape = tuple(stored.get_shape())
        rows = max(1, _PIECE // max(1, math.prod(shape[1:])))
        try:
            if not shape or shape[0] <= rows:
                whole: Float32 = self._file.get_tensor(name).astype(np.float32)
                return whole
            array = np.empty(shape, np.float32)
            for start in range(0, shape[0], rows):  # no copy of all of it in the stored type
                stop = min(start + rows, shape[0])
                array[start:stop] = stored[start:stop]
        except self._errors as error:  # numpy has no such type
            raise _damaged(self._path, error) from None
        return array

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        try:
            rows: Float32 = self._file.get_slice(name)[start:stop].astype(np.float32)
        except self._errors as error:
            raise _damaged(self._path, error) from None
        return rows


def _check_length(path: Path) -> None:
    """Raise CheckpointError where a safetensors file is shorter than its header says. What else is
    wrong with a header is left to the library."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        if not 0 < length <= min(size, _MAX_HEADER):
            return
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:1] != "_"]
            expected = _PREFIX + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return
    if size < expected:
        raise CheckpointError(
            f"{path}: damaged or truncated weight file (it has {size} of {str(expected)[:20]} "
            f"bytes): download it again"
        )


class _PickleShard:
    """A file of torch.save. Storages of archives are mapped; those of files from before PyTorch 1.6
    are read as a whole."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError:
            raise require("torch", "reference", f"reading {path}") from None
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_members(path)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except Exception as error:  # torch raises its own kinds for each sort of damage
            raise _damaged(path, error) from None
        if not isinstance(tensors, dict):
            raise CheckpointError(
                f"{path}: expected a dictionary of tensors, found {type(tensors).__name__}"
            )
        self._path = path
        self._tensors = {
            name: value
            for name, value in tensors.items()
            if isinstance(name, str) and isinstance(value, torch.Tensor)
        }
        for name, tensor in self._tensors.items():
            if not _is_stored(tensor, path.stat().st_size):
                raise _damaged(path, ValueError(f"tensor {name!r:.80} is larger than the file"))

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        kind = str(self._tensors[name].dtype).removeprefix("torch.")
        return _TORCH_DTYPES.get(kind, kind)

    def read(self, name: str) -> Float32:
        try:
            array: Float32 = self._tensors[name].detach().float().numpy()
        except (RuntimeError, TypeError) as error:  # of a kind that is not plain numbers
            raise _damaged(self._path, error) from None
        return array

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        try:
            rows: Float32 = self._tensors[name][start:stop].detach().float().numpy()
        except (RuntimeError, TypeError) as error:
            raise _damaged(self._path, error) from None
        return rows


def _check_members(path: Path) -> None:
    """Raise CheckpointError where an archive holds compressed members (torch writes none), whose
    size in memory would not be that in the file, or huge ones that are no mapped storages."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise _damaged(path, error) from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path}: member {member.filename!r:.60} of the archive is compressed "
                f"({member.compress_size} bytes for {member.file_size}), which torch.save never "
                f"does: get the file from its source"
            )
        is_storage = PurePosixPath(member.filename).parts[1:2] == ("data",)
        if member.file_size > _MAX_MEMBER and not is_storage:
            raise CheckpointError(
                f"{path}: member {member.filename!r:.60} of the archive has {member.file_size} "
                f"bytes, expected at most {_MAX_MEMBER}: get the file from its source"
            )
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise _damaged(path, ValueError("the members of the archive overlap"))


def _is_stored(tensor: Any, size: int) -> bool:
    """Return whether a tensor's numbers are all in the file: it is dense, and no number counts
    twice."""
    import torch

    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    needed = tensor.numel() * tensor.element_size()
    return bool(needed <= tensor.untyped_storage().nbytes() and needed <= size)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    lines = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(
        f"{path}: damaged or truncated weight file ({lines:.120}): download it again"
    )
