"""Answers that are made at the same time: a bounded queue, and turns of one worker.

All models share the processor, so one thread computes. It works on each answer for a slice of time,
then on the next one: the first tokens of a new answer need not wait for the end of long ones, and a
long prefill is not slowed down by others. (Measured on 2 cores with nano: with a thread for each
answer, first tokens come 2 to 5 times later at 16 clients; at 4 clients it computes more tokens.)
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from mobilevlm.runtime.answer.generation import Generation, TextStream
from mobilevlm.runtime.answer.logprobs import TokenLogprob
from mobilevlm.runtime.answer.tool_calls import ToolCall
from mobilevlm.runtime.server.errors import BUSY_TYPE, ApiError

T = TypeVar("T")
SLICE = 0.02
"""Seconds that the worker goes on with an answer while others wait."""
_LONGEST_RETRY = 60


@dataclass(frozen=True)
class Piece:
    """Part of an answer."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Log probabilities of its tokens, if they were asked for"""
    calls: list[ToolCall] = field(default_factory=list)
    """Calls of tools behind it"""
    first_call: int = 0
    """Number of the first of these in the answer"""


@dataclass
class Load:
    """How much there is to do."""

    admitted: int = 0
    """Requests that wait, or whose answers are being made"""
    running: int = 0
    """Requests whose answers are being made"""
    mean_seconds: float = 1.0
    """For an answer, of late"""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self.admitted - self.running


class Turns:
    """The queue and the worker. ``parallel``: answers that are made at the same time; ``queue``:
    requests that may wait beside them."""

    def __init__(self, parallel: int, queue: int) -> None:
        self._parallel, self._queue = parallel, queue
        self._slots = asyncio.Semaphore(parallel)
        self._worker = ThreadPoolExecutor(1, "answers")
        self._reader = ThreadPoolExecutor(1, "prompts")
        self.load = Load()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request among those that are there.

        Raises:
            ApiError: too many wait already.
        """
        if self.load.admitted >= self._parallel + self._queue:
            raise self._busy()
        self.load.admitted += 1
        try:
            yield
        finally:
            self.load.admitted -= 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait until the answer of a request that was admitted may begin; the first come are the
        first served."""
        load = self.load
        async with self._slots:
            load.running += 1
            start = time.monotonic()
            try:
                yield
                load.mean_seconds += 0.2 * (time.monotonic() - start - load.mean_seconds)
            finally:
                load.running -= 1

    async def answer(
        self, begin: Callable[[], TextStream], give: Callable[[Piece], None]
    ) -> Generation:
        """Make an answer. ``begin`` reads the prompt, in a thread beside the worker's; ``give``
        gets each piece of text. When the task is cancelled, the work stops at the next token."""
        loop = asyncio.get_running_loop()
        begun = self._reader.submit(begin)
        waited = asyncio.wrap_future(begun)
        try:
            stream = await asyncio.shield(waited)
        except asyncio.CancelledError:
            if not begun.cancel():  # a thread is at it, with the model, which is held until then
                await asyncio.gather(waited, return_exceptions=True)
            raise
        try:
            known, called, ended = 0, 0, False
            while not ended:
                text, ended = await loop.run_in_executor(self._worker, _advance, stream)
                logprobs, calls = stream.logprobs[known:], stream.tool_calls[called:]
                if text or logprobs or calls:
                    give(Piece(text, logprobs, calls, called))
                known += len(logprobs)
                called += len(calls)
            return stream.generation
        finally:
            stream.cancel()
            # In the worker, which may be at this answer now; the slot is held until then.
            await asyncio.shield(loop.run_in_executor(self._worker, stream.close))

    async def steps(self, begin: Callable[[], Generator[T | None, None, None]]) -> list[T]:
        """Return what steps give that is not None. ``begin`` as of :meth:`answer`; when the task is
        cancelled, the work stops at the next step."""
        loop = asyncio.get_running_loop()
        waited = loop.run_in_executor(self._reader, begin)
        try:
            steps = await asyncio.shield(waited)
        except asyncio.CancelledError:
            await asyncio.gather(waited, return_exceptions=True)
            raise

        def some() -> tuple[list[T], bool]:
            return _some_steps(steps)

        try:
            found, ended = list[T](), False
            while not ended:
                more, ended = await loop.run_in_executor(self._worker, some)
                found += more
            return found
        finally:
            await asyncio.shield(loop.run_in_executor(self._worker, steps.close))

    def close(self) -> None:
        """End the threads."""
        for pool in (self._worker, self._reader):
            pool.shutdown(wait=True, cancel_futures=True)

    def _busy(self) -> ApiError:
        load = self.load
        seconds = math.ceil(load.mean_seconds * (load.waiting + 1) / self._parallel)
        return ApiError(
            429,
            f"{load.waiting} requests wait already: try again later (the server's --queue says how "
            f"many may)",
            code="queue_full",
            kind=BUSY_TYPE,
            headers={"Retry-After": str(min(max(seconds, 1), _LONGEST_RETRY))},
        )


def _some_steps(steps: Generator[T | None, None, None]) -> tuple[list[T], bool]:
    """Return what the steps of a slice of time give, and whether they have ended."""
    end, found = time.perf_counter() + SLICE, list[T]()
    for step in steps:
        if step is not None:
            found.append(step)
        if time.perf_counter() >= end:
            return found, False
    return found, True


def _advance(stream: TextStream) -> tuple[str, bool]:
    """Return the text of a slice of time, at least a token's, and whether the answer has ended."""
    end, pieces = time.perf_counter() + SLICE, []
    for piece in stream:
        pieces.append(piece)
        if time.perf_counter() >= end:
            return "".join(pieces), False
    return "".join(pieces), True
