"""Who may ask, checked before anything of a request is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.datastructures import Headers
from starlette.responses import Response

from mobilevlm.runtime.server.answers import json_bytes
from mobilevlm.runtime.server.errors import ApiError, api_error
from mobilevlm.runtime.server.metrics import Metrics
from mobilevlm.runtime.server.settings import Settings

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

SECURED = ("/v1/", "/metrics")
"""Beginnings of paths that want a key, where there are keys"""
_NOTHING_SENT = 499
"""Status of a request whose client went away"""


def error_response(error: ApiError) -> Any:
    """Return the answer to a request that went wrong."""
    return Response(json_bytes(error.body()), error.status, dict(error.headers), "application/json")


class Guard:
    """Refuses requests without a key, and those that a web page sent here by a name of its own;
    counts the others. ``routes``: paths that are counted by their names."""

    def __init__(
        self, app: Application, settings: Settings, metrics: Metrics, routes: frozenset[str]
    ) -> None:
        self._app, self._settings = app, settings
        self._metrics, self._routes = metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _NOTHING_SENT

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        error = self._refused(scope)
        try:
            if error is None:
                await self._app(scope, receive, noted)
            else:
                await error_response(error)(scope, receive, noted)
        except Exception as bug:
            if status == _NOTHING_SENT:
                await error_response(api_error(bug))(scope, receive, noted)
            raise  # into the log
        finally:
            path = scope["path"]
            self._metrics.count_request(path if path in self._routes else "other", status)

    def _refused(self, scope: Scope) -> ApiError | None:
        headers, settings = Headers(scope=scope), self._settings
        guarded = settings.is_local and not settings.api_keys and not settings.no_auth
        if guarded and not _is_local_name(headers.get("host", "")):
            return ApiError(
                403,
                "the Host header is not of this machine: ask by 127.0.0.1 or localhost (the "
                "server's --api-key or --no-auth allows other names)",
                code="host_not_allowed",
            )
        if settings.api_keys and scope["path"].startswith(SECURED):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._is_key(key.strip()):
                return ApiError(
                    401,
                    "no valid API key: send the header 'Authorization: Bearer KEY' with the key "
                    "that the server was started with",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None

    def _is_key(self, key: str) -> bool:
        found = [
            hmac.compare_digest(key.encode("utf-8", "replace"), known.encode())
            for known in self._settings.api_keys
        ]
        return any(found)


def _is_local_name(host: str) -> bool:
    """Return whether a Host header names this machine. A web page whose name was made to lead here
    (DNS rebinding) sends its own name."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Bodies:
    """Reads bodies of requests. ``limit``: bytes of one; ``limit_of_all``: of those that are held
    at the same time; ``seconds``: for one to arrive."""

    def __init__(self, limit: int, limit_of_all: int, seconds: float) -> None:
        self._limit, self._limit_of_all, self._seconds = limit, limit_of_all, seconds
        self._lock = threading.Lock()
        self.held = 0
        """Bytes of the bodies that are there, and of the images that were fetched for them"""

    def too_large(self) -> ApiError:
        """Return the error of a body beyond the limit."""
        return ApiError(
            413,
            f"the body is larger than {self._limit / 1e6:g} MB: send smaller images",
            code="request_too_large",
        )

    def hold(self, more: int) -> None:
        """Count bytes as held until :meth:`free`; threads of downloads do so too.

        Raises:
            ApiError: all others leave no room for them; the request may be sent again later.
        """
        with self._lock:
            if self.held + more > self._limit_of_all:
                raise ApiError(
                    429,
                    "the server holds too many large requests now: try again later",
                    code="queue_full",
                    kind="rate_limit_error",
                    headers={"Retry-After": "2"},
                )
            self.held += more

    def free(self, count: int) -> None:
        """Count bytes as gone."""
        with self._lock:
            self.held -= count

    async def read(self, headers: Headers, receive: Receive, content: bytearray) -> None:
        """Read a body into ``content``, which counts as held until :meth:`release`.

        Raises:
            ApiError: too large, or all are.
            TimeoutError: it did not arrive in time.
            ConnectionError: the client went away.
        """
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told) > self._limit:
            await self._discard(receive)
            raise self.too_large()
        end = time.monotonic() + self._seconds
        more = True
        while more:
            message = await _received(receive, end)
            part, more = message.get("body", b""), message.get("more_body", False)
            if len(content) + len(part) > self._limit:
                await self._discard(receive)
                raise self.too_large()
            self.hold(len(part))
            content += part

    def release(self, content: bytearray) -> None:
        """Count a body as gone."""
        self.free(len(content))

    async def _discard(self, receive: Receive) -> None:
        """Read on for a moment: a client that is still sending might not see the answer."""
        end = time.monotonic() + 2.0
        try:
            while (await _received(receive, end)).get("more_body", False):
                pass
        except (TimeoutError, ConnectionError):
            return


async def _received(receive: Receive, end: float) -> MutableMapping[str, Any]:
    async with asyncio.timeout(max(end - time.monotonic(), 0)):
        message = await receive()
    if message["type"] == "http.disconnect":
        raise ConnectionError("the client went away")
    return message
