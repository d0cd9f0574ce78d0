"""Tensors of a base checkpoint with a change, added when a tensor is read.

The whole merged model is never in memory: a read takes one base tensor and adds to its rows in
blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevlm.checkpoint import TensorFiles
from mobilevlm.errors import CheckpointError
from mobilevlm.shards import FLOATS, Float32

_BLOCK_NUMBERS = 2**22
"""Numbers of a product that are computed at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor in weight files."""

    files: TensorFiles
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.files.shape(self.name)

    def read(self) -> Float32:
        return self.files.read(self.name)


class Addition(Protocol):
    """Update of one tensor, added when the adapter is merged."""

    @property
    def parts(self) -> tuple[Stored, ...]: ...
    @property
    def factor(self) -> float: ...
    def fits(self, shape: tuple[int, ...]) -> bool: ...
    def add_to(self, array: Float32) -> None: ...


@dataclass(frozen=True)
class _Factors:
    """Two matrices and a number, whose product is added."""

    a: Stored
    b: Stored
    factor: float

    @property
    def parts(self) -> tuple[Stored, ...]:
        return self.a, self.b


class Product(_Factors):
    """``factor · B · A`` of a Linear (A: ``(r, in)``, B: ``(out, r)``) or a convolution
    (A: ``(r, in, height, width)``, B: ``(out, r, 1, 1)``)."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        a, b = self.a.shape, self.b.shape
        pointwise = (*a[:1], *[1] * (len(a) - 2))
        return len(a) > 1 and shape == (*b[:1], *a[1:]) and b[1:] == pointwise

    def add_to(self, array: Float32) -> None:
        a, b = self.a.read(), self.b.read()
        _add_product(array, b.reshape(len(b), -1), a.reshape(len(a), -1), self.factor)


class TableProduct(_Factors):
    """``factor · (B · A)ᵀ`` of an embedding (A: ``(r, rows)``, B: ``(columns, r)``)."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        a, b = self.a.shape, self.b.shape
        return len(a) == len(b) == 2 and a[0] == b[1] and shape == (a[1], b[0])

    def add_to(self, array: Float32) -> None:
        _add_product(array, self.a.read().T, self.b.read().T, self.factor)


@dataclass(frozen=True)
class Sum:
    """``factor`` times a tensor; where it has fewer rows or columns, the first ones change."""

    part: Stored
    factor: float = 1.0
    may_be_smaller: bool = False

    @property
    def parts(self) -> tuple[Stored, ...]:
        return (self.part,)

    def fits(self, shape: tuple[int, ...]) -> bool:
        found = self.part.shape
        if not self.may_be_smaller:
            return shape == found
        return len(shape) == len(found) and all(map(int.__le__, found, shape))

    def add_to(self, array: Float32) -> None:
        added = self.part.read()
        place = array[tuple(slice(size) for size in added.shape)]
        np.add(place, np.float32(self.factor) * added, out=place)


def _add_product(array: Float32, left: Float32, right: Float32, factor: float) -> None:
    rows = array.reshape(len(array), -1)
    step = max(1, _BLOCK_NUMBERS // max(1, rows.shape[1]))
    with np.errstate(all="ignore"):  # values that are not finite are refused where this is read
        for start in range(0, len(rows), step):
            rows[start : start + step] += (left[start : start + step] @ right) * np.float32(factor)


class MergedFiles:
    """The tensors of two folders as one model's (a :class:`~mobilevlm.checkpoint.TensorSource`).

    ``tensors``: where each begins, by its name in the merged model. ``additions``: what is added.

    Raises:
        CheckpointError: an addition has no tensor, or one of another shape.
    """

    def __init__(
        self,
        adapter: Path,
        base: Path,
        tensors: Mapping[str, Stored],
        additions: Mapping[str, tuple[Addition, ...]],
    ) -> None:
        self.folder = Path(f"{adapter} + {base}")
        self._tensors, self._additions = dict(tensors), dict(additions)
        for name, added in additions.items():
            for addition in added:
                self._check(adapter, base, name, addition)
        self._sources = list(
            dict.fromkeys(
                part.files
                for name, stored in tensors.items()
                for part in (stored, *self._parts(name))
            )
        )
        self.files = [path for source in self._sources for path in source.files]

    def _check(self, adapter: Path, base: Path, name: str, addition: Addition) -> None:
        part = addition.parts[0]
        if name not in self._tensors:
            raise CheckpointError(
                f"{adapter}: {part.name!r} changes {name!r}, which the base {base} does not have: "
                f"it was trained on another model"
            )
        shape = self._tensors[name].shape
        if not addition.fits(shape):
            shapes = " and ".join(str(list(part.shape)) for part in addition.parts)
            raise CheckpointError(
                f"{adapter}: {part.name!r} has shape {shapes}, which does not fit {name!r} of "
                f"{list(shape)} in {base}: it was trained on another model"
            )

    def _parts(self, name: str) -> tuple[Stored, ...]:
        return tuple(part for added in self._additions.get(name, ()) for part in added.parts)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> str:
        """The stored type; of a merged tensor the first that is not of floats, if there is one."""
        stored = self._stored(name)
        kinds = [part.files.dtype(part.name) for part in (stored, *self._parts(name))]
        return next((kind for kind in kinds if kind not in FLOATS), kinds[0])

    def read(self, name: str) -> Float32:
        array = self._stored(name).read()
        if added := self._additions.get(name):
            if not (array.flags.owndata and array.flags.writeable and array.flags.c_contiguous):
                array = np.array(array, order="C")  # it may be a view of the file
            for addition in added:
                addition.add_to(array)
        return array

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        return None

    @cached_property
    def sha256(self) -> str:
        """Digest of all weight files, and of which tensors are added with which factors."""
        digest = hashlib.sha256()
        for files in self._sources:
            digest.update(files.sha256.encode())
        for name in sorted(self._additions):
            for addition in self._additions[name]:
                names = [part.name for part in addition.parts]
                digest.update(f"{name} {names} {addition.factor!r}\n".encode())
        return digest.hexdigest()

    def _stored(self, name: str) -> Stored:
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
        return self._tensors[name]
