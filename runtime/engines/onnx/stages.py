"""Weights of the ONNX stages: there as long as the model is, or one stage at a time for devices
that cannot hold both.

In turn, whichever stage is asked for is opened, and the other one closed before. Keys and values,
embedding rows and visual tokens belong to neither, so nothing but time is lost. A first question
opens each stage once, a question about a known image none; each new image opens both.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

from mobilevlm.runtime.engines import still_open
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Stage(Protocol[T_co]):
    """Sessions of a stage."""

    def open(self) -> AbstractContextManager[T_co]:
        """The sessions, for a run.

        Raises:
            MobileVLMError: the stage was closed.
        """

    def add(self, state: OnnxState) -> None:
        """Have a sequence let go of the sessions when these are closed."""

    def close(self) -> None:
        """Free the weights, for good."""


class OpenStage(Generic[T]):
    """A stage whose weights stay."""

    def __init__(self, sessions: T) -> None:
        self._sessions: T | None = sessions

    def open(self) -> AbstractContextManager[T]:
        """See :class:`Stage`."""
        return nullcontext(still_open(self._sessions))

    def add(self, state: OnnxState) -> None:
        """See :class:`Stage`. Sequences end before their model does."""
        still_open(self._sessions)

    def close(self) -> None:
        """See :class:`Stage`."""
        self._sessions = None


class Turns:
    """Stages of which one is open at a time, and one thread computes. ``reopen`` calls what opens
    a stage."""

    def __init__(self, reopen: Callable[[Callable[[], Any]], Any]) -> None:
        self.lock = threading.RLock()
        self.states: weakref.WeakSet[OnnxState] = weakref.WeakSet()
        self._reopen = reopen
        self._now: tuple[object, Any] | None = None
        """The stage that is open, and its sessions."""
        self.ended = False

    def sessions_of(self, stage: object, opened: Callable[[], T]) -> T:
        """Return a stage's sessions, after closing those of the other stage.

        Raises:
            MobileVLMError: the model was closed while this thread waited.
        """
        if self._now is None or self._now[0] is not stage:
            still_open(None if self.ended else self)
            self.free()
            self._now = stage, self._reopen(opened)
        sessions: T = self._now[1]
        return sessions

    def free(self) -> None:
        """Close the stage that is open."""
        for state in self.states:
            state.unbind()
        self._now = None


class StageInTurn(Generic[T]):
    """A stage that is closed when the other one of ``turns`` is asked for. ``opened`` opens it."""

    def __init__(self, turns: Turns, opened: Callable[[], T]) -> None:
        self._turns, self._opened = turns, opened

    @contextmanager
    def open(self) -> Iterator[T]:
        """See :class:`Stage`."""
        with self._turns.lock:
            yield self._turns.sessions_of(self, self._opened)

    def add(self, state: OnnxState) -> None:
        """See :class:`Stage`. Opens nothing."""
        with self._turns.lock:
            self._turns.states.add(state)

    def close(self) -> None:
        """See :class:`Stage`. The other stage is closed too."""
        with self._turns.lock:
            self._turns.ended = True
            self._turns.free()


def stage_of(opened: Callable[[], T], turns: Turns | None) -> Stage[T]:
    """Return a stage that is open now, or one that is opened in turn."""
    return OpenStage(opened()) if turns is None else StageInTurn(turns, opened)
