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
    """Frames, rows and columns, for positions of several axes; 1, 1, 1 where rows have the
    positions of a text."""


Token: TypeAlias = "int | Mark"
Piece: TypeAlias = "int | Run"


@dataclass(frozen=True)
class Rows:
    """Rows for the decoder: output of an encoder, or a part of a prompt."""

    embeds: NDArray[np.float32]
    """(rows, hidden_size)"""
    deep: tuple[NDArray[np.float32], ...] = ()
    """(rows, hidden_size) each, added after the decoder's ``deep_layers``; zeros when not given"""
    positions: NDArray[np.int64] | None = None
    """(axes, rows), those of a text when not given"""

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, span: slice) -> Rows:
        return Rows(
            self.embeds[span],
            tuple(rows[span] for rows in self.deep),
            None if self.positions is None else self.positions[:, span],
        )

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + sum(rows.nbytes for rows in self.deep)


@dataclass(frozen=True)
class Assembly:
    """Way from the rows of several runs of an encoder to those of an image (LLaVA-NeXT): first the
    visual tokens of the first run, then those of the others put together as one grid, each row of
    the grid before the newline (mobilevlm/assembly.py)."""

    side: int
    """Visual tokens along each edge of a tile."""
    tiles: tuple[int, int]
    """Rows and columns of tiles; 0, 0: the first run alone, and one newline."""
    margins: tuple[int, int] = (0, 0)
    """Rows above and below, and columns on the left and right, of the grid that only padding
    made: they are left out."""
    size: tuple[int, int] = (0, 0)
    """Rows and columns that the rest is brought to."""

    @property
    def runs(self) -> int:
        """Runs of the encoder."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def rows(self) -> int:
        """Positions in the prompt."""
        newlines = 1 if self.runs == 1 else self.size[0]
        return self.side**2 + self.size[0] * self.size[1] + newlines


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image, or another input, as a model takes it (``VLM.prepare_image``)."""

    kind: str
    arrays: tuple[Arrays, ...]
    """Inputs of each run of the encoder."""
    pieces: tuple[Piece, ...]
    """Ids and runs in its place in the prompt."""
    assembly: Assembly | None = None
    """How the rows of the encoder's runs become those of the image; one behind the other when none
    is given."""

    @cached_property
    def digest(self) -> bytes:
        """Digest of all that its rows and their positions depend on."""
        hasher = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for piece in self.pieces:
            if isinstance(piece, Run):
                hasher.update(f"{piece.grid} ".encode())
        if self.assembly is not None:
            hasher.update(repr(self.assembly).encode())
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


def grid_positions(pieces: Iterable[Piece], axes: int) -> NDArray[np.int64]:
    """Return the positions of a prompt ``(axes, length)``. A token, and a run, begins one after the
    largest number so far, on all axes; the rows of a run count its grid's last ``axes`` sizes from
    there (M-RoPE, Qwen2-VL, section 2.1)."""
    start, found = 0, [np.empty((axes, 0), np.int64)]
    for piece in pieces:
        if isinstance(piece, int) or piece.grid == (1, 1, 1):
            count = 1 if isinstance(piece, int) else piece.rows
            placed = np.tile(np.arange(count), (axes, 1))
        else:
            places = np.indices(piece.grid).reshape(len(piece.grid), -1)
            assert places.shape[1] == piece.rows, f"{piece.rows} rows, a grid of {piece.grid}"
            placed = places[len(piece.grid) - axes :]
        found.append(placed + start)
        start += int(placed.max()) + 1
    return np.concatenate(found, axis=1)


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
