"""The work for one client, watched: it stops when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeAlias, TypeVar

from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.answer.generation import Generation
from mobilevlm.runtime.server.answers import Shape, event
from mobilevlm.runtime.server.errors import ApiError, api_error
from mobilevlm.runtime.server.guard import Receive, Scope, Send
from mobilevlm.runtime.server.turns import Piece

T = TypeVar("T")
Work: TypeAlias = Callable[[Callable[[Piece], None]], Coroutine[Any, Any, T]]
"""Makes an answer, and gives each piece of its text to the function."""

HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


class GoneError(Exception):
    """The client went away; nobody reads an answer."""


class Job(Generic[T]):
    """Work that was begun. Whoever makes one closes it."""

    def __init__(self, work: Work[T], receive: Receive) -> None:
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._gone = False
        self._task = asyncio.create_task(work(self._pieces.put_nowait))
        self._task.add_done_callback(lambda _: self._pieces.put_nowait(None))
        self._watch = asyncio.create_task(self._watched(receive))

    async def piece(self) -> Piece | None:
        """Return the next piece; none when the work has ended, well or not."""
        return await self._pieces.get()

    async def finish(self) -> T:
        """Return the finished answer.

        Raises:
            GoneError: the client went away before.
        """
        try:
            return await self._task
        except asyncio.CancelledError:
            if self._gone:
                raise GoneError from None
            raise

    async def close(self) -> None:
        """Stop what has not ended."""
        for task in (self._watch, self._task):
            task.cancel()
        await asyncio.gather(self._watch, self._task, return_exceptions=True)

    async def _watched(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._task.done():
            self._gone = True
            self._task.cancel()


class EventStream:
    """A response of server-sent events. ``first``: the piece that was waited for, so that what is
    wrong with a prompt is told by the status."""

    def __init__(self, job: Job[Generation], shape: Shape, first: Piece | None) -> None:
        self._job, self._shape, self._first = job, shape, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer as it is made."""

        async def give(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            await give(self._shape.first())
            piece = self._first
            while piece is not None:
                await give(self._shape.piece(piece))
                piece = await self._job.piece()
            await self._end(give)
        finally:
            await self._job.close()

    async def _end(self, give: Callable[[bytes, bool], Awaitable[None]]) -> None:
        try:
            last = self._shape.last(await self._job.finish())
        except GoneError:
            return
        except Exception as error:
            await give(event(api_error(error).body()), False)
            if not isinstance(error, ApiError | MobileVLMError):
                raise  # into the log
            return
        await give(last, False)
