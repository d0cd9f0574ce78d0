"""A server that runs until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import uvicorn

from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.server.app import make_app
from mobilevlm.runtime.server.models import Models
from mobilevlm.runtime.server.settings import Settings

_BACKLOG = 512


def serve(settings: Settings, models: Models, ready: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C. Then no new ones are taken, and those that are there
    have ``settings.drain_seconds`` to end. ``ready`` is told the address.

    Raises:
        MobileVLMError: a model cannot be used, or the address cannot be had.
    """
    models.check()
    listener = _listen(settings.host, settings.port)
    config = uvicorn.Config(
        make_app(settings, models),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        server.should_exit = True

    # While the model is loaded; uvicorn takes it over, and passes it on when it is done.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        asyncio.run(_run(server, listener, models, lambda: ready(_address(listener))))
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()


async def _run(
    server: uvicorn.Server, listener: socket.socket, models: Models, ready: Callable[[], None]
) -> None:
    async with models.use(models.names[0]):  # errors of loading come before the first request
        pass
    if server.should_exit:
        await models.close()
        return
    ready()
    await server.serve(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        [family, kind, number, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise MobileVLMError(f"--host {host}: no such address ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        told = error.strerror or error
        raise MobileVLMError(
            f"{host} port {port}: {told}: stop the other program, or give another --port"
        ) from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
