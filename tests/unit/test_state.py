"""The state of a sequence: where it can go back to, and what it refuses."""

from __future__ import annotations

import pytest

from mobilevlm.errors import SessionError
from mobilevlm.runtime.engines.state import SlotState

pytestmark = pytest.mark.pure


def test_a_state_goes_back_to_any_slot_and_never_forward() -> None:
    state = SlotState()
    state.advance(5)
    assert (state.slots, state.position, state.reachable(3), state.reachable(9)) == (5, 5, 3, 5)
    state.rewind(3)
    assert (state.slots, state.position) == (3, 3)
    for slots in (4, -1):
        with pytest.raises(SessionError, match=f"a sequence of 3 rows cannot go back to {slots}"):
            state.rewind(slots)
    assert state.slots == 3
