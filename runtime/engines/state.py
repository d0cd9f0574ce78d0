"""State of a sequence: how far it is filled, and how far it can go back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import SessionError
from mobilevlm.state_buffers import StateBuffer

KEPT_ROWS = 96
"""Last slots that a sequence with short convolutions can go back to: more than a draft has."""
KEPT_MARKS = 32
"""Ends of a prompt's pieces that a sequence with short convolutions can go back to."""


class SlotState:
    """Slots of one sequence, filled one after the other. Going back is exact to any of them: keys
    and values depend on nothing behind them, and what is appended overwrites them."""

    def __init__(self) -> None:
        self._slots = 0

    @property
    def slots(self) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        return self._slots

    @property
    def position(self) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        return self._slots

    def advance(self, count: int) -> None:
        """Count rows that were appended."""
        self._slots += count

    def resume(self, slots: int) -> None:
        """Let the sequence end after so many rows, which have been put there."""
        self._slots = slots

    def reachable(self, slots: int) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        return min(slots, self._slots)

    def rewind(self, slots: int) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        if not 0 <= slots <= self._slots:
            raise SessionError(f"a sequence of {self._slots} rows cannot go back to {slots}")
        if self.reachable(slots) != slots:
            raise SessionError(
                f"this sequence of {self._slots} rows no longer has its state after {slots}: go "
                f"back to {self.reachable(slots)} and compute the rest again"
            )
        self._go_back(slots)
        self._slots = slots

    def _go_back(self, slots: int) -> None:
        """Do what else it takes; nothing where rows are overwritten in place."""


class NextPositions:
    """Position of the next token after each slot, for positions of several axes: one more than the
    largest number so far."""

    def __init__(self, context_length: int) -> None:
        self._next = np.zeros(context_length + 1, np.int64)

    def after(self, slots: int) -> int:
        """Return the position of the token after so many slots."""
        return int(self._next[slots])

    def append(self, slots: int, positions: NDArray[np.int64]) -> None:
        """Note positions ``(axes, length)`` of the rows after so many slots."""
        largest = np.maximum.accumulate(positions.max(axis=0) + 1)
        self._next[slots + 1 : slots + 1 + len(largest)] = np.maximum(largest, self._next[slots])

    def save(self, start: int, end: int) -> NDArray[np.int64]:
        """Return a copy of those after the slots from ``start`` to ``end``."""
        return self._next[start + 1 : end + 1].copy()

    def restore(self, start: int, saved: NDArray[np.int64]) -> None:
        """Put back what :meth:`save` gave."""
        self._next[start + 1 : start + 1 + len(saved)] = saved


class ConvolutionState:
    """Inputs of a sequence's short convolutions. A run reads the last ``kernel - 1`` of each layer.

    Going back needs those before the slot: they are kept for the last ``KEPT_ROWS`` slots, and for
    ``KEPT_MARKS`` ends of pieces of a prompt. They are stored, not computed again, so going back is
    exact to the bit.
    """

    def __init__(self, buffers: Sequence[StateBuffer]) -> None:
        _, self._rows, width = buffers[0].sized(0)
        self.past = np.zeros((len(buffers), 1, self._rows, width), np.float32)
        """Inputs that the next run reads, by layer"""
        self._kept = KEPT_ROWS + self._rows
        self._recent = np.zeros((len(buffers), self._kept, width), np.float32)
        self._first = -self._rows
        """Slot of the oldest row in ``_recent``, where slot s lies at s modulo its length; rows
        before the sequence are zeros"""
        self._marks: OrderedDict[int, NDArray[np.float32]] = OrderedDict()

    def append(self, slots: int, inputs: Sequence[NDArray[np.float32]]) -> None:
        """Add the inputs of a run after so many slots. ``inputs``: of each layer ``(1, kernel - 1 +
        length, width)``, those before the run first."""
        length = inputs[0].shape[1] - self._rows
        kept = min(length, self._kept)
        end = slots + length
        places = np.arange(end - kept, end) % self._kept
        for layer, rows in enumerate(inputs):
            self._recent[layer, places] = rows[0, rows.shape[1] - kept :]
            self.past[layer] = rows[:, length:]
        self._first = max(self._first, end - self._kept)

    def mark(self, slots: int) -> None:
        """Keep the state after so many slots, which is that of now."""
        self._marks[slots] = self.past.copy()
        self._marks.move_to_end(slots)
        if len(self._marks) > KEPT_MARKS:
            self._marks.popitem(last=False)

    def reachable(self, slots: int) -> int:
        """Return the last slot up to this one that can be gone back to."""
        if slots - self._rows >= self._first:
            return slots
        return max((mark for mark in self._marks if mark <= slots), default=0)

    def go_back(self, slots: int) -> None:
        """Return to a slot that can be reached."""
        if slots - self._rows >= self._first:
            self.past[:, 0] = self._recent[:, np.arange(slots - self._rows, slots) % self._kept]
        else:
            self._begin(slots, self._marks.get(slots, np.zeros_like(self.past)))
        for mark in [mark for mark in self._marks if mark > slots]:
            del self._marks[mark]

    def save(self) -> NDArray[np.float32]:
        """Return a copy of what the next run reads ``(layers, 1, kernel - 1, width)``."""
        return self.past.copy()

    def restore(self, slots: int, start: int, saved: NDArray[np.float32]) -> None:
        """Put back what :meth:`save` gave after so many slots; what came after ``start`` is of
        another sequence."""
        for mark in [mark for mark in self._marks if mark > start]:
            del self._marks[mark]
        self._begin(slots, saved)
        self.mark(slots)

    def _begin(self, slots: int, past: NDArray[np.float32]) -> None:
        """Let the rows that are kept begin with those before a slot."""
        self.past[:] = past
        self._first = slots - self._rows
        self._recent[:, np.arange(self._first, slots) % self._kept] = past[:, 0]
