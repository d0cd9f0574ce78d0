"""State of a sequence: how far it is filled, and how far it can go back."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import SessionError
from mobilevlm.state_buffers import KEPT_ROWS, KEPT_STATES, LONGEST_RUN, StateBuffer, first_slot

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

    def place(self, slots: int, placed: NDArray[np.int32]) -> None:
        """Note the positions of rows after so many slots, where the order of rows is that of one
        axis. ``placed``: its numbers in the second last row, and those after each row in the last.
        """
        self._next[slots] = placed[-2, 0]
        self._next[slots + 1 : slots + 1 + placed.shape[1]] = placed[-1]

    def save(self, start: int, end: int) -> NDArray[np.int64]:
        """Return a copy of those after the slots from ``start`` to ``end``."""
        return self._next[start + 1 : end + 1].copy()

    def restore(self, start: int, saved: NDArray[np.int64]) -> None:
        """Put back what :meth:`save` gave."""
        self._next[start + 1 : start + 1 + len(saved)] = saved


class WindowBuffers:
    """Keys and values of sliding layers ``(1, heads, rows, head_dim)``: the last slots of a
    sequence, in buffers that do not grow.

    Slot s lies in row ``s - first``, and ``first`` follows from where a run ends, whatever came
    before: so the same sequence is computed with the same arithmetic, to the bit. Rows that no
    window reaches any more may be of another sequence.
    """

    def __init__(self, buffers: Mapping[str, NDArray[Any]], window: int) -> None:
        self.buffers, self._window = buffers, window
        self._rows = next(iter(buffers.values())).shape[2]
        self.first = 0
        """Slot of the first row"""
        self._known = 0
        """First slot whose row is there"""

    def place(self, slots: int, length: int) -> None:
        """Make room for a run of so many rows behind so many slots."""
        assert length <= LONGEST_RUN or slots + length <= self._rows, f"a run of {length} rows"
        self._move(first_slot(self._rows, slots + length), slots)

    def _move(self, first: int, slots: int) -> None:
        """Bring the rows before ``slots`` to where they are with another first row."""
        start = max(self._known, first)
        if first != self.first and start < slots:
            for buffer in self.buffers.values():
                moved = buffer[:, :, start - self.first : slots - self.first].copy()
                buffer[:, :, start - first : slots - first] = moved
        self.first, self._known = first, start

    def reachable(self, slots: int) -> int:
        """Return the last slot up to this one that can be gone back to."""
        return slots if self._known <= max(0, slots - self._window + 1) else 0

    def go_back(self, slots: int) -> None:
        """Return to a slot that can be reached."""
        if slots == 0:
            self.first = self._known = 0

    def save(self, start: int, end: int) -> NDArray[Any]:
        """Return a copy of the rows that are there from ``start`` to ``end`` ``(buffers, heads,
        rows, head_dim)``."""
        part = slice(max(start, self._known) - self.first, end - self.first)
        return np.stack([buffer[0, :, part] for buffer in self.buffers.values()])

    def restore(self, end: int, start: int, saved: NDArray[Any]) -> None:
        """Put back what :meth:`save` gave before slot ``end``; before ``start`` stands what stood
        there."""
        begin = end - saved.shape[2]
        self._move(first_slot(self._rows, end), start)
        for buffer, rows in zip(self.buffers.values(), saved, strict=True):
            buffer[0, :, begin - self.first : end - self.first] = rows
        if begin > start:  # no window reaches what stood before
            self._known = begin


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

    def append(self, end: int, inputs: Sequence[NDArray[np.float32]]) -> None:
        """Add the inputs of a run that ends after so many slots. ``inputs``: of each layer ``(1,
        kernel - 1 + length, width)``, those before the run first."""
        length = inputs[0].shape[1] - self._rows
        kept = min(length, self._kept)
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


class RecurrentState:
    """States that hold all of a sequence's past, one behind the other in one array. A run reads
    them and makes those of its last row.

    Going back needs a copy: there is one of each of the last ``KEPT_STATES`` ends of pieces of a
    prompt. They are stored, not computed again, so going back is exact to the bit.
    """

    def __init__(self, buffers: Sequence[StateBuffer]) -> None:
        self._shapes = {buffer: buffer.sized(0) for buffer in buffers}
        size = sum(math.prod(shape) for shape in self._shapes.values())
        self._now, self._next = np.zeros(size, np.float32), np.empty(size, np.float32)
        self._slots = 0
        self._marks: OrderedDict[int, NDArray[np.float32]] = OrderedDict()

    def past(self) -> dict[str, NDArray[np.float32]]:
        """Return what the next run reads, by its names in the graph."""
        parts = self._parts(self._now)
        return {buffer.past: part for buffer, part in zip(self._shapes, parts, strict=True)}

    def present(self) -> dict[str, NDArray[np.float32]]:
        """Return where the next run writes, by its names in the graph."""
        parts = self._parts(self._next)
        return {buffer.present: part for buffer, part in zip(self._shapes, parts, strict=True)}

    def _parts(self, whole: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        start = 0
        for shape in self._shapes.values():
            end = start + math.prod(shape)
            yield whole[start:end].reshape(shape)
            start = end

    def append(self, end: int, inputs: Sequence[NDArray[np.float32]] = ()) -> None:
        """Take what a run has written that ends after so many slots."""
        self._now, self._next, self._slots = self._next, self._now, end

    def mark(self, slots: int) -> None:
        """Keep the state after so many slots, which is that of now."""
        self._marks[slots] = self._now.copy()
        self._marks.move_to_end(slots)
        if len(self._marks) > KEPT_STATES:
            self._marks.popitem(last=False)

    def reachable(self, slots: int) -> int:
        """Return the last slot up to this one that can be gone back to."""
        known = (*self._marks, self._slots)
        return max((place for place in known if place <= slots), default=0)

    def go_back(self, slots: int) -> None:
        """Return to a slot that can be reached."""
        if slots != self._slots:
            self._now[:] = self._marks.get(slots, 0)
        self._slots = slots
        for mark in [mark for mark in self._marks if mark > slots]:
            del self._marks[mark]

    def save(self) -> NDArray[np.float32]:
        """Return a copy of what the next run reads ``(numbers,)``."""
        return self._now.copy()

    def restore(self, slots: int, start: int, saved: NDArray[np.float32]) -> None:
        """Put back what :meth:`save` gave after so many slots; what came after ``start`` is of
        another sequence."""
        for mark in [mark for mark in self._marks if mark > start]:
            del self._marks[mark]
        self._now[:], self._slots = saved, slots
        self.mark(slots)
