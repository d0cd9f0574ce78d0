"""A sequence in llama.cpp alone: the prompt goes in as token ids and rows of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mobilevlm.prompt import Prepared, Rows, Run
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.sequence.cache import PositionKey
from mobilevlm.runtime.sequence.session import Fill, Prompt, RunSpan, Session

if TYPE_CHECKING:
    from mobilevlm.runtime.engines.llama.pair_decoder import PairDecoder


class PairSession(Session):
    """As :class:`Session`. A run of an image's rows is computed or reused as a whole: its rows may
    see each other and share positions."""

    _decoder: PairDecoder

    @property
    def can_draft(self) -> bool:
        """See :class:`Session`."""
        return self._decoder.goes_back

    def _runner(self, prompt: Prompt, note: Fill, start: int = 0) -> RunSpan:
        """See :class:`Session`."""
        images = self._encode(prompt.keys[start:], prompt, note)

        def run(here: int, there: int, wanted: int, answer: bool) -> Float32:
            return self._append(prompt, images, (here, there), wanted)

        return run

    def _extend(self, tokens: Sequence[int]) -> Float32:
        logits = self._decoder.append(self._state, tokens, len(tokens))
        self._keys += tokens
        return logits

    def _common_prefix(self, keys: Sequence[PositionKey]) -> int:
        """How much of the present sequence may stay: whole runs, and one position less than all."""
        count = super()._common_prefix(keys)
        while 0 < count < len(keys) and _goes_on(keys[count - 1], keys[count]):
            count -= 1
        return count

    def _append(
        self, prompt: Prompt, images: dict[bytes, Rows], span: tuple[int, int], count: int
    ) -> Float32:
        """Append a span of a prompt; logits of its last ``count`` positions."""
        logits, left = [], span[1] - span[0]
        for part in _parts(prompt, *span):
            length = len(part) if isinstance(part, list) else part[2].rows
            left -= length
            wanted = min(max(count - left, 0), length)
            if isinstance(part, list):
                logits.append(self._decoder.append(self._state, part, wanted))
            else:
                image, number, run, first = part
                rows = images[image.digest].embeds[first : first + run.rows]
                placed = self._decoder.placed(rows, image.arrays[0], number, first)
                logits.append(self._decoder.append_rows(self._state, placed, wanted))
        return np.concatenate(logits)


def _goes_on(before: PositionKey, after: PositionKey) -> bool:
    """Return whether two neighbours are rows of one image."""
    return (
        isinstance(before, tuple)
        and isinstance(after, tuple)
        and (before[0], before[1] - 1) == after
    )


def _parts(
    prompt: Prompt, start: int, end: int
) -> Iterator[list[int] | tuple[Prepared, int, Run, int]]:
    """Split positions of a prompt into ids and runs; of a run tell its image, its number there, and
    the image's rows before it. No run is cut."""
    places = iter(
        (image, number, run, before)
        for image in prompt.images
        for number, (run, before) in enumerate(_runs(image))
    )
    position, ids = 0, list[int]()
    for piece in prompt.pieces:
        here, position = position, position + (piece.rows if isinstance(piece, Run) else 1)
        place = next(places) if isinstance(piece, Run) else None
        if not start <= here < end:
            continue
        if isinstance(piece, int):
            ids.append(piece)
            continue
        if ids:
            yield ids
            ids = []
        assert place is not None
        yield place
    if ids:
        yield ids


def _runs(image: Prepared) -> Iterator[tuple[Run, int]]:
    """Yield the runs of an image, and how many of its rows come before."""
    before = 0
    for piece in image.pieces:
        if isinstance(piece, Run):
            yield piece, before
            before += piece.rows
