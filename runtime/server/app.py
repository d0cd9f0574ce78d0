"""The application: its routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mobilevlm._version import __version__
from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.server.answering import Service, answer, respond
from mobilevlm.runtime.server.answers import json_bytes
from mobilevlm.runtime.server.download import MayAsk, is_public
from mobilevlm.runtime.server.drawing import draw, read_drawing
from mobilevlm.runtime.server.errors import ApiError, api_error
from mobilevlm.runtime.server.files import page_files
from mobilevlm.runtime.server.guard import Bodies, Guard, error_response
from mobilevlm.runtime.server.metrics import CONTENT_TYPE, Metrics
from mobilevlm.runtime.server.models import Models
from mobilevlm.runtime.server.openapi import describe
from mobilevlm.runtime.server.requests import read_chat, read_completion
from mobilevlm.runtime.server.settings import BODY_SECONDS, MAX_BODY, MAX_HELD, Settings
from mobilevlm.runtime.server.turns import Turns

_DOWNLOADS = 8
"""At the same time"""


def make_app(settings: Settings, models: Models, may_ask: MayAsk = is_public) -> Any:
    """Return the application, for a server of ASGI. ``may_ask``: IP addresses that images may be
    fetched from."""
    turns = Turns(settings.parallel, settings.queue)
    service = Service(
        settings,
        models,
        turns,
        Metrics(turns.load, lambda: len(models.loaded)),
        Bodies(MAX_BODY, MAX_HELD, BODY_SECONDS),
        ThreadPoolExecutor(_DOWNLOADS, "downloads"),
        may_ask,
        int(time.time()),
    )
    routes = _routes(service)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        turns.close()
        service.downloads.shutdown(wait=False, cancel_futures=True)
        await models.close()

    handlers = {
        HTTPException: _no_route,
        ApiError: _failed,
        MobileVLMError: _failed,
        MemoryError: _failed,
    }
    middleware = _middleware(service, frozenset(route.path for route in routes))
    return Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers
    )


def _middleware(service: Service, routes: frozenset[str]) -> list[Any]:
    settings = service.settings
    guard = Middleware(Guard, settings=settings, metrics=service.metrics, routes=routes)
    if not settings.cors:
        return [guard]
    origins, names = list(settings.cors), ["Authorization", "Content-Type"]
    crossing = Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=names
    )
    return [crossing, guard]  # browsers ask for permission without a key


def _routes(service: Service) -> list[Any]:
    models, metrics = service.models, service.metrics
    read = partial(read_chat, allow_urls=service.settings.allow_urls)

    async def one_model(request: Request) -> Any:
        name = models.find(request.path_params["model"])
        return _json(_model(name, service.started, models.draws(name)))

    def list_models() -> Any:
        found = [_model(name, service.started, models.draws(name)) for name in models.names]
        return _json({"object": "list", "data": found})

    def health() -> Any:
        return _json({"status": "ok", "version": __version__, "loaded": sorted(models.loaded)})

    def figures() -> Any:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return [
        _post(service, "/v1/chat/completions", read, answer),
        _post(service, "/v1/completions", read_completion, answer),
        _post(service, "/v1/images/generations", read_drawing, draw),
        Route("/v1/embeddings", _no_embeddings, methods=["POST"]),
        _get("/v1/models", list_models),
        Route("/v1/models/{model:path}", one_model, methods=["GET"]),
        _get("/health", health),
        _get("/metrics", figures),
        _get("/openapi.json", lambda: _json(describe())),
        *(
            _get(path, partial(Response, file.content, 200, file.headers))
            for path, file in page_files().items()
        ),
    ]


def _get(path: str, answer: Callable[[], Any]) -> Any:
    async def endpoint(_: Request) -> Any:
        return answer()

    return Route(path, endpoint, methods=["GET"])


def _post(
    service: Service,
    path: str,
    read: Callable[[Any], Any],
    begin: Callable[[Service, Request, Any, float], Awaitable[Any]],
) -> Any:
    async def endpoint(request: Request) -> Any:
        return await respond(service, request, read, begin)

    return Route(path, endpoint, methods=["POST"])


def _model(name: str, created: int, draws: bool) -> dict[str, Any]:
    known = {"id": name, "object": "model", "created": created, "owned_by": "mobilevlm"}
    return {**known, "draws": draws}


def _json(value: Any) -> Any:
    return Response(json_bytes(value), media_type="application/json")


async def _no_embeddings(_: Request) -> Any:
    told = (
        "no embeddings here: visual tokens are input of a decoder, not vectors that were trained "
        "to be compared: use an embedding model, such as CLIP"
    )
    return error_response(ApiError(404, told, code="unsupported"))


async def _no_route(request: Request, error: HTTPException) -> Any:
    told = f"{request.method} {request.url.path:.100}: "
    told += "no such address" if error.status_code == 404 else str(error.detail)
    return error_response(ApiError(error.status_code, told, headers=error.headers or {}))


async def _failed(_: Request, error: Exception) -> Any:
    return error_response(api_error(error))
