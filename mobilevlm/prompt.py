"""Prompts as a decoder meets them: token ids, and runs of rows that an encoder makes.

The number of rows of each image is known before it is encoded, so lengths, segment boundaries and
the context check need no encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import AudioError

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
    times: tuple[int, ...] = ()
    """Position of each frame after that of the first; 0, 1, 2 … when not given."""
    from_video: bool = False
    """True for frames of a clip, which official code marks with another id."""


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
    blocks: tuple[tuple[int, int], ...] = ()
    """First row of those that see each other, and the row behind their last, in order"""
    heard: bool | None = None
    """They belong to a prompt with sound, for decoders with a ``sound_rank``; none: as the rows
    before them"""
    ids: NDArray[np.int64] | None = None
    """Tokens (rows,), -1 for rows of an encoder, which decoders with inputs of their own for each
    layer look these up by"""

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, span: slice) -> Rows:
        return Rows(
            self.embeds[span],
            tuple(rows[span] for rows in self.deep),
            None if self.positions is None else self.positions[:, span],
            self._blocks_in(*span.indices(len(self))[:2]),
            self.heard,
            None if self.ids is None else self.ids[span],
        )

    def _blocks_in(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Return the blocks of a part, which has each as a whole or not at all."""
        inside = [(a - start, b - start) for a, b in self.blocks if start < b and a < end]
        assert all(a >= 0 and b <= end - start for a, b in inside), "a part of a block"
        return tuple(inside)

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


@dataclass(frozen=True)
class Reduction:
    """Way from the visual tokens of an image to fewer: means over a coarser grid
    (mobilevlm/reduction.py)."""

    grid: tuple[int, int]
    """Rows and columns of visual tokens before"""
    size: tuple[int, int]
    """Rows and columns that are left"""
    behind: int = 0
    """Rows behind the grid, which stay"""


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
    reduction: Reduction | None = None
    """How these become fewer, if they do."""

    @property
    def encoded_rows(self) -> int:
        """Rows before they are made fewer."""
        if self.reduction is None:
            return count_rows(self.pieces)
        down, across = self.reduction.grid
        return down * across + self.reduction.behind

    @cached_property
    def digest(self) -> bytes:
        """Digest of all that its rows and their positions depend on."""
        hasher = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for piece in self.pieces:
            if isinstance(piece, Run):
                hasher.update(f"{piece.grid} {piece.times or ''}".encode())
        if self.assembly is not None:
            hasher.update(repr(self.assembly).encode())
        if self.reduction is not None:
            hasher.update(repr(self.reduction).encode())
        for arrays in self.arrays:
            for name, array in arrays.items():
                hasher.update(f"{name} {array.dtype} {array.shape}".encode())
                hasher.update(np.ascontiguousarray(array).data)
        return hasher.digest()


@dataclass(frozen=True)
class Clip:
    """A video as a model takes it (``VLM.prepare_video``)."""

    parts: tuple[Any, ...]
    """Texts and images in its place in the prompt, in order."""

    @property
    def images(self) -> list[Any]:
        """Images among the parts."""
        return [part for part in self.parts if not isinstance(part, str)]


SoundInput: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | "
    "tuple[NDArray[Any], int] | Prepared"
)
"""A path; a ``file://`` or ``data:`` URI; the bytes of a sound file; a binary file object; samples
``(count,)`` or ``(count, channels)``, floats from -1 to 1 or integers of a WAV file, and how many
there are in a second; or what ``VLM.prepare_audio`` returned."""


@dataclass(frozen=True)
class Sound:
    """A sound of a prompt, which no model has taken yet."""

    source: SoundInput


def as_sound(source: SoundInput | Sound) -> Sound:
    """Return a sound of a prompt."""
    return source if isinstance(source, Sound) else Sound(source)


def with_sounds(shown: Sequence[Any], sounds: Sequence[SoundInput | Sound]) -> list[Any]:
    """Return what is shown in a prompt, and these sounds.

    Raises:
        AudioError: they are no list.
    """
    single = (str, bytes, bytearray, memoryview, PathLike, tuple)
    if isinstance(sounds, single) or not isinstance(sounds, Sequence):
        raise AudioError(
            f"audio: expected a list of sounds, found {type(sounds).__name__}: put a single one "
            f"into a list, leave the argument out for none"
        )
    return [*shown, *map(as_sound, sounds)]


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


def run_spans(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """Return the first position of each run in a prompt, and that behind its last."""
    spans, start = [], 0
    for piece in pieces:
        end = start + (piece.rows if isinstance(piece, Run) else 1)
        if isinstance(piece, Run):
            spans.append((start, end))
        start = end
    return spans


def visual_positions(pieces: Iterable[Piece]) -> NDArray[np.bool_]:
    """Return which positions of a prompt encoders fill ``(length,)``."""
    counts = [(piece.rows, True) if isinstance(piece, Run) else (1, False) for piece in pieces]
    return np.repeat([is_run for _, is_run in counts], [rows for rows, _ in counts])


def token_ids(pieces: Iterable[Piece]) -> NDArray[np.int64]:
    """Return the ids of a prompt ``(length,)``, -1 for rows that encoders fill."""
    parts = [[piece] if isinstance(piece, int) else [-1] * piece.rows for piece in pieces]
    return np.array([index for part in parts for index in part], np.int64)


def grid_positions(pieces: Iterable[Piece], axes: int) -> NDArray[np.int64]:
    """Return the positions of a prompt ``(axes, length)``: those of a text count up on all axes;
    the rows of a run count its grid's last ``axes`` sizes from its begin, and what follows goes on
    behind the longer of rows and columns, whatever frames count to (M-RoPE, Qwen2-VL, section
    2.1)."""
    start, found = 0, [np.empty((axes, 0), np.int64)]
    for piece in pieces:
        if isinstance(piece, int) or piece.grid == (1, 1, 1):
            count = taken = 1 if isinstance(piece, int) else piece.rows
            placed = np.tile(np.arange(count), (axes, 1))
        else:
            places = np.indices(piece.grid).reshape(len(piece.grid), -1)
            assert places.shape[1] == piece.rows, f"{piece.rows} rows, a grid of {piece.grid}"
            if piece.times:
                places[0] = np.asarray(piece.times)[places[0]]
            placed, taken = places[len(piece.grid) - axes :], max(piece.grid[1:])
        found.append(placed + start)
        start += taken
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
