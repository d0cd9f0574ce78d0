"""State of a sequence: how far it is filled, and how far it can go back."""

from __future__ import annotations

from mobilevlm.errors import SessionError


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
