"""The way of a request to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mobilevlm.errors import AudioError, ImageError, MissingExtraError
from mobilevlm.preparation import most_runs
from mobilevlm.prompt import Prepared, Sound
from mobilevlm.runtime.answer.generation import Generation, TextStream
from mobilevlm.runtime.server.answers import json_bytes, new_shape
from mobilevlm.runtime.server.download import MAX_SECONDS, Budget, MayAsk, download, failed
from mobilevlm.runtime.server.errors import ApiError, refuse
from mobilevlm.runtime.server.guard import Bodies
from mobilevlm.runtime.server.images import ImageRef
from mobilevlm.runtime.server.metrics import Metrics
from mobilevlm.runtime.server.models import Models
from mobilevlm.runtime.server.requests import Asked, parse_json
from mobilevlm.runtime.server.settings import Settings
from mobilevlm.runtime.server.streams import EventStream, GoneError, Job
from mobilevlm.runtime.server.turns import Piece, Turns
from mobilevlm.runtime.vlm import VLM
from mobilevlm.tools import read_tools

T = TypeVar("T")
_CLOSED = 499
"""Status of an answer that nobody reads, as nginx counts it"""


@dataclass(frozen=True)
class Service:
    """The parts of a running server."""

    settings: Settings
    models: Models
    turns: Turns
    metrics: Metrics
    bodies: Bodies
    downloads: ThreadPoolExecutor
    may_ask: MayAsk
    """IP addresses that images may be fetched from"""
    started: int
    """Seconds since 1970"""


async def respond(
    service: Service,
    request: Request,
    read: Callable[[Any], T],
    begin: Callable[[Service, Request, T, float], Awaitable[Any]],
) -> Any:
    """Return the response to a request, whose body ``read`` understands and ``begin`` fulfils.

    Raises:
        ApiError, MobileVLMError: the request is wrong, or there is no room for it now.
    """
    start = time.monotonic()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites may send further types here without asking first.
        raise ApiError(415, "expected the header 'Content-Type: application/json'")
    content = bytearray()
    try:
        await service.bodies.read(request.headers, request.receive, content)
        asked = read(parse_json(bytes(content)))
        return await begin(service, request, asked, start)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", code="timeout") from None
    except (ConnectionError, ClientDisconnect, GoneError):
        return Response(status_code=_CLOSED)
    finally:
        service.bodies.release(content)


async def answer(service: Service, request: Request, asked: Asked, start: float) -> Any:
    """Return the response to a request for text. ``start``: when it came."""
    name = service.models.find(asked.model)

    async def work(give: Callable[[Piece], None]) -> Generation:
        return await _make(service, asked, name, give, start)

    shape = new_shape(name, asked.is_chat, asked.include_usage)
    job = Job(work, request.receive)
    try:
        if not asked.stream:
            answer = await job.finish()
            await job.close()
            return Response(json_bytes(shape.whole(answer)), media_type="application/json")
        first = await job.piece()
        if first is None:
            await job.finish()  # it raises what went wrong; an answer may be empty too
        return EventStream(job, shape, first)
    except BaseException:
        await job.close()
        raise


async def _make(
    service: Service, asked: Asked, name: str, give: Callable[[Piece], None], start: float
) -> Generation:
    """Make an answer: its turn, its model, its images, its text."""
    first: list[float] = []

    def noted(piece: Piece) -> None:
        if not first and (piece.text or piece.calls):
            first.append(time.monotonic() - start)
        give(piece)

    turns = service.turns
    try:
        budget = Budget(service.bodies.hold, service.bodies.free)
        with turns.admitted(), closing(budget):
            images = [await _fetched(service, image, budget) for image in asked.images]
            async with turns.slot(), service.models.use(name) as vlm:
                answer = await turns.answer(lambda: _stream(vlm, asked, images), noted)
    except asyncio.CancelledError:
        service.metrics.count_abandoned(name)
        raise
    seconds = time.monotonic() - start
    service.metrics.count_answer(name, answer, first[0] if first else seconds, seconds)
    return answer


async def _fetched(service: Service, image: ImageRef, budget: Budget) -> ImageRef:
    if not image.url:
        return image
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(budget.seconds):  # a thread that waits for a name goes on
            found = await loop.run_in_executor(
                service.downloads, download, image.url, image.place, service.may_ask, budget
            )
    except TimeoutError:
        told = f"it took more than {MAX_SECONDS:.0f} s"
        raise failed(image.place, image.url, told) from None
    return replace(image, content=found)


def _stream(vlm: VLM, asked: Asked, images: list[ImageRef]) -> TextStream:
    """Read a prompt and its images. (In a thread.)

    Raises:
        PromptError: it has no room for so many, which is found before any of them is decoded.
    """
    raw, special = asked.options.get("raw", False), asked.options.get("special_tokens", True)
    hidden = asked.options.get("tool_choice") == "none"
    tools = () if hidden else read_tools(asked.options.get("tools", ()))
    for image in images:
        if image.kind not in vlm.spec.shown:
            what = "images: leave them out" if image.kind == "image" else "sound: leave it out"
            raise refuse(image.place, f"this model takes no {what}")
    vlm.check_fits(asked.prompt, len(images), raw, special, tools=tools)
    prepared = [_prepared(vlm, image, len(images)) for image in images]
    most = asked.max_tokens or vlm.spec.decoder.context_length
    return vlm.stream(asked.prompt, prepared, max_new_tokens=most, **asked.options)


def _prepared(vlm: VLM, image: ImageRef, images: int) -> Prepared | Sound:
    if image.kind == "audio":
        try:
            return Sound(vlm.prepare_audio(image.content))
        except (AudioError, MissingExtraError) as error:
            raise refuse(image.place, str(error), "invalid_audio") from None
    splits = vlm.spec.has_images and most_runs(vlm.spec.image) > 1
    try:
        most = 1 if image.detail == "low" and splits else None
        return vlm.prepare_image(image.content, most, images)
    except ImageError as error:
        raise refuse(image.place, str(error), "invalid_image") from None
