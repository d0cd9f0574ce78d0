"""Reading a checkpoint folder: JSON files and weights, one tensor at a time.

Weights come as safetensors (read without torch) or as PyTorch pickles (read by torch, weights
only, so that no code in them runs), see ``shards.py``. A damaged or incomplete folder gives one
line that names the file or key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import CheckpointError, FileWarning
from mobilevlm.shards import FLOATS, Float32, Shard, open_shard, refuse_pointer
from mobilevlm.whole_file import file_sha256

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
MAX_JSON_BYTES = 64 * 2**20
_SHARDS = {SAFETENSORS: "model-*-of-*.safetensors", PICKLE: "pytorch_model-*-of-*.bin"}
_INCOMPLETE = ("*.incomplete", ".cache/huggingface/download/**/*.incomplete")
REMAP_BYTES = 2**29
_NAME_BYTES = 255
"""Longest name that file systems take."""


def read_json(path: Path, required_for: str = "") -> dict[str, Any]:
    """A JSON object from a checkpoint folder.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        purpose = f" ({required_for})" if required_for else ""
        raise CheckpointError(f"{path}: the file is missing{purpose}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, not a config file")
    refuse_pointer(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error!s:.100}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


class TensorFiles:
    """The weights of one folder, opened lazily and read one tensor at a time. ``files``: these
    instead of the checkpoint's.

    Shards are mapped into memory; those in use are mapped anew after every ``REMAP_BYTES`` that
    were read, so that what was read does not stay resident.

    Raises:
        CheckpointError: no weight file, a shard is missing or damaged.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.files = _weight_files(folder) if files is None else list(files)
        self._shards = {path: open_shard(path) for path in self.files}
        self._touched: set[Path] = set()
        self._bytes_read = 0
        self._index = {name: path for path, shard in self._shards.items() for name in shard.names()}

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> str:
        """``f32``, ``f16``, ``bf16`` …"""
        return self._shard(name).dtype(name)

    def read(self, name: str) -> Float32:
        """The tensor as float32, in its stored shape."""
        return self._counted(name, self._shard(name).read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Some rows of a tensor as float32."""
        return self._counted(name, self._shard(name).read_rows(name, start, stop))

    def _counted(self, name: str, array: Float32) -> Float32:
        """Return what was just read."""
        self._touched.add(self._index[name])
        self._bytes_read += array.nbytes
        if self._bytes_read > REMAP_BYTES:
            self._shards.update({path: open_shard(path) for path in self._touched})
            self._touched.clear()
            self._bytes_read = 0
        return array

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        """The bytes of a tensor in llama.cpp's Q4_0: here none is."""
        return None

    @cached_property
    def sha256(self) -> str:
        """Digest of the contents of all weight files."""
        total = hashlib.sha256()
        for path in self.files:
            total.update(file_sha256(path).encode())
        return total.hexdigest()

    def _shard(self, name: str) -> Shard:
        if name not in self._index:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is missing from "
                f"{', '.join(path.name for path in self.files)}"
            )
        return self._shards[self._index[name]]


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of the first kind that is there: whole before shards, safetensors before
    pickles."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder")
    for single in (SAFETENSORS, PICKLE):
        whole, index = folder / single, folder / f"{single}.index.json"
        if whole.is_file():
            if index.is_file():
                _ignore(index, f"{single} is there as a whole")
            return [whole]
        if index.is_file():
            shards = _indexed_shards(index)
            missing = [path for path in shards if not path.is_file()]
            if not missing:
                return shards
            if len(missing) == len(shards) and single == SAFETENSORS and _has(folder, PICKLE):
                _ignore(index, f"none of its shards is there, but {PICKLE} is")
                continue
            raise CheckpointError(
                f"{missing[0]}: the shard is missing, {index.name} names it"
                f"{_more(len(missing) - 1)}{_unfinished(folder)}"
            )
        if shards := sorted(folder.glob(_SHARDS[single])):
            raise CheckpointError(
                f"{index}: the index of the shards is missing (there are {len(shards)}, the first "
                f"is {shards[0].name}): download it too{_unfinished(folder)}"
            )
    raise CheckpointError(
        f"{folder}: no weights: expected {SAFETENSORS} or {PICKLE}, or shards with {SAFETENSORS}"
        f".index.json or {PICKLE}.index.json{_unfinished(folder)}"
    )


def _has(folder: Path, single: str) -> bool:
    return any((folder / name).is_file() for name in (single, f"{single}.index.json"))


def _ignore(index: Path, reason: str) -> None:
    warnings.warn(f"{index}: not read: {reason}", FileWarning, stacklevel=2)


def _unfinished(folder: Path) -> str:
    """Return the hint that a download has not ended, where there are signs of one."""
    found = [path.name for pattern in _INCOMPLETE for path in sorted(folder.glob(pattern))]
    return f": {found[0]:.60} is of a download that has not ended: start it again" if found else ""


def _more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _indexed_shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: key 'weight_map' is missing or empty")
    names = sorted({str(value) for value in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise CheckpointError(
                f"{index}: shard name {name!r:.60} leaves the folder or is no weight file"
            )
        if len(os.fsencode(name)) > _NAME_BYTES:
            raise CheckpointError(f"{index}: shard name {name!r:.60} is too long for a file")
    return [index.parent / name for name in names]


class TensorSource(Protocol):
    """Source of tensors: the weight files of a folder, or a GGUF file."""

    folder: Path
    files: list[Path]

    def __contains__(self, name: object) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> Float32: ...
    def q4_0(self, name: str) -> NDArray[np.uint8] | None: ...
    @property
    def sha256(self) -> str: ...


class ListedTensors(TensorSource, Protocol):
    """A source that tells all names."""

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class RowRange:
    """Some rows of a stored tensor."""

    start: int
    stop: int
    total: int
    """Rows that the stored tensor has."""


@dataclass(frozen=True)
class TensorRef:
    """Location of a canonical tensor in a checkpoint, and how it differs from the stored one."""

    files: TensorSource
    name: str
    rows: RowRange | None = None
    """Rows of the stored tensor, if this one is a part of it."""
    outer: int = 0
    """Leading dimensions of one that are stored and not ours."""
    factor: float = 1.0
    """Factor of the stored ones."""
    added: float = 0.0
    """Number that is added to the stored ones: norms that multiply by ``1 + weight``."""
    transposed: bool = False
    """Rows of a stored matrix are our columns."""
    joined: tuple[int, ...] = ()
    """Order in which its dimensions after the first are stored, where they are stored as one."""
    order: tuple[int, ...] = ()
    """Stored rows in our order, where it is another."""
    scalar: bool = False
    """Our one number is stored without dimensions. An infinite one becomes the largest finite."""
    inner: int = 0
    """Dimensions of 1 behind the stored ones that are not ours: kernels of pointwise
    convolutions."""

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole stored tensor, given the shape of this one."""
        if self.scalar:
            return ()
        rows, *rest = shape[::-1] if self.transposed else shape
        if self.joined:
            rest = [math.prod(rest)]
        rows = rows if self.rows is None else self.rows.total
        return (*(1,) * self.outer, rows, *rest, *(1,) * self.inner)

    def cut(self, stored: Float32, shape: tuple[int, ...]) -> Float32:
        """This tensor, which has this shape, given the whole stored one."""
        if self.scalar:
            largest = np.finfo(np.float32).max
            return np.clip(stored, -largest, largest).reshape(shape)
        stored = stored.reshape(stored.shape[self.outer : stored.ndim - self.inner])
        part = stored if self.rows is None else stored[self.rows.start : self.rows.stop]
        part = part[list(self.order)] if self.order else part
        part = part.T if self.transposed else part
        if self.joined:
            part = part.reshape(shape[0], *(shape[axis] for axis in self.joined))
            part = part.transpose(0, *(self.joined.index(axis) + 1 for axis in range(1, part.ndim)))
        part = part * np.float32(self.factor) if self.factor != 1 else part
        return part + np.float32(self.added) if self.added else part


class Change(Protocol):
    """A function of one tensor that is applied when it is read."""

    def apply(self, array: Float32) -> Float32:
        """Return the changed tensor, of the same shape."""
        ...


@dataclass(frozen=True)
class Rescaling:
    """Factors of a tensor ``(rows, columns)`` or ``(rows,)``."""

    rows: Float32 | None = None
    columns: Float32 | None = None

    def apply(self, array: Float32) -> Float32:
        if self.columns is not None:
            array = array * self.columns
        if self.rows is not None:
            array = array * self.rows.reshape(-1, *[1] * (array.ndim - 1))
        return array


class Weights:
    """The tensors of a model under canonical names (the same for every family).

    ``vision.*`` or ``audio.*``, ``projector.*`` and ``decoder.*``; a family builds the map from the
    names in its checkpoint. A tensor is read when it is asked for and not kept.
    """

    def __init__(
        self,
        refs: dict[str, TensorRef],
        changes: Mapping[str, tuple[Change, ...]] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._refs, self._changes = refs, dict(changes or {})
        self.notes = notes
        """Lines for people about where tensors come from."""

    def __contains__(self, name: object) -> bool:
        return name in self._refs

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in the checkpoint."""
        return self._refs[name].name

    def changed(self, changes: Mapping[str, Change]) -> Weights:
        """The same tensors, each that ``changes`` names changed when it is read."""
        merged = dict(self._changes)
        for name, change in changes.items():
            merged[name] = (*merged.get(name, ()), change)
        return Weights(self._refs, merged, self.notes)

    def replaced(self, refs: Mapping[str, TensorRef]) -> Weights:
        """The same tensors, those that ``refs`` names from elsewhere, as they are there."""
        changes = {name: kept for name, kept in self._changes.items() if name not in refs}
        return Weights({**self._refs, **refs}, changes, self.notes)

    def first_rows(self, names: Iterable[str], rows: int, total: int) -> Weights:
        """The same tensors, of these only the first ``rows`` of ``total``."""
        cut = {name: replace(self._refs[name], rows=RowRange(0, rows, total)) for name in names}
        return Weights({**self._refs, **cut}, self._changes, self.notes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def read(self, name: str, shape: tuple[int, ...]) -> Float32:
        """The tensor ``name`` as float32 of the given shape.

        Raises:
            CheckpointError: it is missing, of another shape, not of floats, or not finite.
        """
        ref = self._checked(name, shape)
        array = _finite(ref, ref.cut(ref.files.read(ref.name), shape))
        for change in self._changes.get(name, ()):
            array = change.apply(array)
        return array

    def read_rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Float32:
        """Return some rows of the tensor ``name``; errors as of :meth:`read`. Of one that is not
        changed as it is read, the others are not read."""
        ref = self._refs[name]
        if ref != TensorRef(ref.files, ref.name) or not isinstance(ref.files, TensorFiles):
            return self.read(name, shape)[start:stop]
        if name in self._changes:
            return self.read(name, shape)[start:stop]
        self._checked(name, shape)
        return _finite(ref, ref.files.read_rows(ref.name, start, stop))

    def rows_at(self, name: str, shape: tuple[int, ...], ids: NDArray[np.int64]) -> Float32:
        """Return the rows with these numbers ``(…, columns)``; see :meth:`read_rows`."""
        wanted = ids.flatten().tolist()
        known = {index: self.read_rows(name, shape, index, index + 1) for index in set(wanted)}
        rows = [known[index] for index in wanted]
        return np.concatenate(rows).reshape(*ids.shape, *shape[1:])

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        ref = self._refs[name]
        self.check(name, shape)
        if (kind := ref.files.dtype(ref.name)) not in FLOATS:
            raise CheckpointError(
                f"{ref.files.folder}: tensor {ref.name!r} is stored as {kind}, expected floats: "
                f"give the checkpoint as it was before quantization"
            )
        return ref

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError where a tensor has another shape."""
        ref = self._refs[name]
        found = ref.files.shape(ref.name)
        if found != ref.stored_shape(shape):
            raise CheckpointError(
                f"{ref.files.folder}: tensor {ref.name!r} has shape {list(found)}, "
                f"expected {list(ref.stored_shape(shape))!s:.100} from config.json"
            )

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        """The bytes of a tensor that is stored in llama.cpp's Q4_0, else none."""
        ref = self._refs[name]
        changed = name in self._changes or ref.rows or ref.joined or ref.order
        return None if changed else ref.files.q4_0(ref.name)

    @property
    def stored_bytes(self) -> int:
        """Size of all weight files."""
        paths = {path for ref in self._refs.values() for path in ref.files.files}
        return sum(path.stat().st_size for path in paths)

    def size(self, name: str) -> int:
        """How many numbers the tensor holds."""
        ref = self._refs[name]
        rows, *rest = ref.files.shape(ref.name) or (1,)
        return math.prod(rest) * (ref.rows.stop - ref.rows.start if ref.rows else rows)

    def sha256(self, prefix: str) -> str:
        """Digest of everything the tensors under ``prefix`` depend on (whole files)."""
        digest = hashlib.sha256()
        for name in sorted(self._refs):
            if name.startswith(prefix):
                ref = self._refs[name]
                digest.update(f"{name} {ref.name} {ref.files.sha256}\n".encode())
        return digest.hexdigest()


def _finite(ref: TensorRef, array: Float32) -> Float32:
    with np.errstate(invalid="ignore"):  # infinities of both signs
        total = np.sum(array, dtype=np.float64)
    if not np.isfinite(total):
        raise CheckpointError(
            f"{ref.files.folder}: tensor {ref.name!r} holds values that are not finite"
        )
    return array


def check_presence(refs: Mapping[str, TensorRef]) -> None:
    """Name a missing tensor before any work begins.

    Raises:
        CheckpointError: the files lack some.
    """
    missing = [ref for ref in refs.values() if ref.name not in ref.files]
    if missing:
        raise CheckpointError(
            f"{missing[0].files.folder}: tensor {missing[0].name!r} is missing"
            f"{_more(len(missing) - 1)}: the weights do not fit config.json"
        )


def check_unread(
    refs: Mapping[str, TensorRef], files: ListedTensors, may_skip: Iterable[str]
) -> None:
    """Name tensors that nothing reads. ``may_skip``: regular expressions of those that a family
    knows to be without effect, from the beginning of a name.

    Raises:
        CheckpointError: there are others.
    """
    read = {ref.name for ref in refs.values() if ref.files is files}
    known = re.compile("|".join(f"(?:{pattern})" for pattern in may_skip) or "(?!)")
    unread = [name for name in files if name not in read and not known.match(name)]
    if not unread:
        return
    named = ", ".join(repr(name)[:90] for name in sorted(unread)[:2])
    remedy = "config.json describes a smaller or another model"
    if any("lora_" in name for name in unread):
        remedy = "these weights hold an adapter that is not merged: merge it first"
    raise CheckpointError(
        f"{files.folder}: nothing reads {len(unread)} of its tensors "
        f"({named}{', …' * (len(unread) > 2)}): {remedy}"
    )
