"""Images that are drawn for clients, in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mobilevlm.runtime.answer.drawing import Drawn
from mobilevlm.runtime.server.answering import Service
from mobilevlm.runtime.server.answers import json_bytes
from mobilevlm.runtime.server.errors import refuse
from mobilevlm.runtime.server.fields import IMAGES, read_fields
from mobilevlm.runtime.server.streams import Job
from mobilevlm.runtime.vlm import VLM

_OPTIONS = ("n", "guidance", "seed", "temperature")
"""Fields that are keywords of ``VLM.draw``, under their own names"""


@dataclass(frozen=True)
class AskedImages:
    """A request for images."""

    model: str | None
    prompt: str
    size: str
    options: dict[str, Any]
    """Keywords of ``VLM.draw``"""


@dataclass(frozen=True)
class Images:
    """Images of one request."""

    drawn: list[Drawn]
    prompt_tokens: int


def read_drawing(body: Any) -> AskedImages:
    """Return what the body of a request for images asks.

    Raises:
        ApiError: something in it is wrong or unknown.
    """
    found = read_fields(body, IMAGES)
    options = {name: found[name] for name in _OPTIONS if name in found}
    return AskedImages(found.get("model"), found["prompt"], found.get("size", "auto"), options)


async def draw(service: Service, request: Request, asked: AskedImages, start: float) -> Any:
    """Return the response to a request for images. ``start``: when it came."""
    name = service.models.find(asked.model)

    async def work(_: Callable[[Any], None]) -> Images:
        return await _make(service, asked, name, start)

    job = Job(work, request.receive)
    try:
        images = await job.finish()
    finally:
        await job.close()
    return Response(json_bytes(_body(images)), media_type="application/json")


async def _make(service: Service, asked: AskedImages, name: str, start: float) -> Images:
    turns = service.turns
    try:
        with turns.admitted():
            async with turns.slot(), service.models.use(name) as vlm:
                drawn = await turns.steps(lambda: _steps(vlm, asked))
                length = len(vlm.drawing_ids(asked.prompt))
    except asyncio.CancelledError:
        service.metrics.count_abandoned(name)
        raise
    service.metrics.count_drawing(name, len(drawn), time.monotonic() - start)
    return Images(drawn, length)


def _steps(vlm: VLM, asked: AskedImages) -> Generator[Drawn | None, None, None]:
    """Begin to draw. (In a thread.)

    Raises:
        ApiError: the size is not the model's own.
    """
    edge = vlm.spec.drawing.edge
    if asked.size not in ("auto", f"{edge}x{edge}"):
        raise refuse("size", f"{asked.size!r:.40}: this model draws {edge}x{edge} only")
    return vlm.draw_steps(asked.prompt, **asked.options)


def _body(images: Images) -> dict[str, Any]:
    codes = sum(len(drawn.codes) for drawn in images.drawn)
    edge = images.drawn[0].values.shape[0]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": _png(drawn)} for drawn in images.drawn],
        "size": f"{edge}x{edge}",
        "output_format": "png",
        "usage": {
            "input_tokens": images.prompt_tokens,
            "output_tokens": codes,
            "total_tokens": images.prompt_tokens + codes,
        },
    }


def _png(drawn: Drawn) -> str:
    written = io.BytesIO()
    drawn.image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()
