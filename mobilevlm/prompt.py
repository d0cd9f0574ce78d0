"""Prompts as a decoder meets them: token ids, and runs of rows that an encoder makes.

The number of rows of each image is known before it is encoded, so lengths, segment boundaries and
the context check need no encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Named inputs of one run of an encoder, without a batch dimension: ``pixels``, ``mel`` …"""


@dataclass(frozen=True)
class Mark:
    """The place of an image, or of another input of this kind, in tokenized text."""

    kind: str = "image"


@dataclass(frozen=True)
class Run:
    """Neighbouring positions of a prompt that an encoder fills."""

    rows: int
    grid: tuple[int, int, int] = (1, 1, 1)
    """Frames, rows and columns, for positions of several axes."""


Token: TypeAlias = "int | Mark"
Piece: TypeAlias = "int | Run"


@dataclass(frozen=True)
class Rows:
    """Output of an encoder."""

    embeds: NDArray[np.float32]
    """(rows, hidden_size)"""
    positions: NDArray[np.int64] | None = None
    """(axes, rows), where a decoder has positions of several axes"""
    deep: tuple[NDArray[np.float32], ...] = ()
    """(rows, hidden_size) each, added after the first decoder layers"""

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + sum(rows.nbytes for rows in self.deep)


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several runs of an encoder as those of one."""
    if len(parts) == 1:
        return parts[0]
    given = [part.positions for part in parts if part.positions is not None]
    return Rows(
        np.concatenate([part.embeds for part in parts]),
        np.concatenate(given, axis=1) if given else None,
        tuple(np.concatenate(rows) for rows in zip(*(part.deep for part in parts), strict=True)),
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image, or another input, as a model takes it (``VLM.prepare_image``)."""

    kind: str
    arrays: tuple[Arrays, ...]
    """Inputs of each run of the encoder."""
    pieces: tuple[Piece, ...]
    """Ids and runs in its place in the prompt."""

    @cached_property
    def digest(self) -> bytes:
        """Digest of all that its rows depend on."""
        hasher = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for arrays in self.arrays:
            for name, array in arrays.items():
                hasher.update(f"{name} {array.dtype} {array.shape}".encode())
                hasher.update(np.ascontiguousarray(array).data)
        return hasher.digest()


def expand(tokens: Iterable[Token], images: Iterable[Sequence[Piece]]) -> list[Piece]:
    """Return a prompt: tokenized text with the pieces of each image in the place of its mark."""
    left = iter(images)
    return [
        piece for token in tokens for piece in (next(left) if isinstance(token, Mark) else (token,))
    ]


def count_rows(pieces: Iterable[Piece]) -> int:
    """Return how many positions encoders fill."""
    return sum(piece.rows for piece in pieces if isinstance(piece, Run))


def count_positions(pieces: Iterable[Piece]) -> int:
    """Return how many positions a prompt takes."""
    return sum(piece.rows if isinstance(piece, Run) else 1 for piece in pieces)


def visual_positions(pieces: Iterable[Piece]) -> NDArray[np.bool_]:
    """Return which positions of a prompt encoders fill ``(length,)``."""
    counts = [(piece.rows, True) if isinstance(piece, Run) else (1, False) for piece in pieces]
    return np.repeat([is_run for _, is_run in counts], [rows for rows, _ in counts])


def in_runs(pieces: Iterable[Piece]) -> Iterator[list[int] | Run]:
    """Split a prompt into runs and the ids between them."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
            continue
        if ids:
            yield ids
        ids = []
        yield piece
    if ids:
        yield ids
