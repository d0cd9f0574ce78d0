"""Answers for programs that run in an event loop (asyncio): the work is done in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Unpack

from mobilevlm.errors import MobileVLMError
from mobilevlm.messages import Message
from mobilevlm.runtime.answer.generation import Generation, TextStream
from mobilevlm.runtime.answer.options import AnswerOptions, shows_options
from mobilevlm.runtime.sequence.prompts import Images
from mobilevlm.runtime.vlm import VLM


class AsyncTextStream(AsyncIterator[str]):
    """Pieces of an answer as they are made; as :class:`TextStream`. A task that is cancelled while
    it waits for a piece cancels the answer, and waits for the token that is being made."""

    def __init__(self, open_stream: Callable[[], TextStream]) -> None:
        self._open = open_stream
        self._stream: TextStream | None = None
        self._closed = False
        self._turn = threading.Lock()
        """Held by the thread that is at a piece"""

    async def __anext__(self) -> str:
        """Return the next piece.

        Raises:
            MobileVLMError: as of :meth:`VLM.stream`, with the first piece.
        """
        try:
            piece = await asyncio.to_thread(self._next)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.shield(asyncio.to_thread(self._end))
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    @property
    def generation(self) -> Generation:
        """The finished answer; as of :class:`TextStream`."""
        return self._opened().generation

    async def finish(self) -> Generation:
        """Read the remaining pieces and return the finished answer."""
        async for _ in self:
            pass
        return self.generation

    def cancel(self) -> None:
        """Let the answer end at its next token."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        """Stop the work, and wait for the token that is being made."""
        self.cancel()
        await asyncio.to_thread(self._close)

    def _next(self) -> str | None:
        with self._turn:
            return next(self._opened(), None)

    def _end(self) -> None:
        """Read a cancelled answer to its end, which leaves its session."""
        with self._turn, suppress(MobileVLMError):
            if self._stream is not None:
                self._stream.finish()

    def _close(self) -> None:
        with self._turn:
            if self._stream is not None:
                self._stream.close()

    def _opened(self) -> TextStream:
        if self._stream is None:
            self._stream = self._open()
            if self._closed:
                self._stream.cancel()
        return self._stream


class AsyncVLM:
    """A loaded model whose answers are awaited. ``vlm`` is the model itself, for everything else;
    leaving an ``async with`` block closes it."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm

    @shows_options(AnswerOptions)
    def stream(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        **options: Unpack[AnswerOptions],
    ) -> AsyncTextStream:
        """Answer piece by piece; as :meth:`VLM.stream`."""
        return AsyncTextStream(lambda: self.vlm.stream(prompt, images, **options))

    @shows_options(AnswerOptions)
    async def generate(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        **options: Unpack[AnswerOptions],
    ) -> Generation:
        """Return the whole answer; as :meth:`VLM.generate`."""
        return await self.stream(prompt, images, **options).finish()

    async def __aenter__(self) -> AsyncVLM:
        return self

    async def __aexit__(self, *reason: object) -> None:
        await asyncio.to_thread(self.vlm.close)
