"""Clients that do a server no good, for :mod:`server_load`: each goes on until it is stopped."""

from __future__ import annotations

import asyncio
import base64
import struct
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx

CHAT = "/v1/chat/completions"
PAUSE = 0.1
"""Seconds between two requests of a client, so that it is the server that is loaded"""
JSON = {"Content-Type": "application/json"}

Outcomes: TypeAlias = "Counter[str]"
Client: TypeAlias = Callable[[httpx.AsyncClient], Awaitable[str]]


async def slow_body(client: httpx.AsyncClient) -> str:
    """Send a byte of the body a second."""
    address = urlsplit(str(client.base_url))
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        lines = [
            f"POST {CHAT} HTTP/1.1", f"Host: {address.netloc}", "Content-Type: application/json",
            "Content-Length: 1000", "", "",
        ]  # fmt: skip
        writer.write("\r\n".join(lines).encode())
        answered = asyncio.ensure_future(reader.readline())
        while not (await asyncio.wait([answered], timeout=1))[0]:
            writer.write(b" ")
        return answered.result().split()[1].decode()
    finally:
        writer.close()


async def large_body(client: httpx.AsyncClient) -> str:
    """Send 100 MB."""

    async def parts() -> AsyncIterator[bytes]:
        yield b'{"messages": "'
        for _ in range(100):
            yield b"a" * 1_000_000

    headers = JSON | {"Content-Length": str(100_000_014)}
    return str((await client.post(CHAT, content=parts(), headers=headers)).status_code)


async def wrong_json(client: httpx.AsyncClient) -> str:
    """Send a body that is no JSON."""
    body = b'{"messages": [' * 10_000
    return str((await client.post(CHAT, content=body, headers=JSON)).status_code)


def _bomb() -> str:
    """Return a PNG file, in base64, whose header promises 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")).decode()


def _question(image: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": "What is it?"},
    ]}]}  # fmt: skip


async def bomb_image(client: httpx.AsyncClient) -> str:
    """Send an image that would need gigabytes."""
    return str((await client.post(CHAT, json=_question(_bomb()))).status_code)


async def gone_midway(client: httpx.AsyncClient) -> str:
    """Close the connection after the first event of a stream."""
    asked = {"prompt": "Hello", "max_tokens": 500, "stream": True}
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        async for _ in response.aiter_lines():
            break
    return "closed" if response.status_code == 200 else str(response.status_code)


EXPECTED: dict[Client, set[str]] = {
    slow_body: {"408"},
    large_body: {"413"},
    wrong_json: {"400"},
    bomb_image: {"400"},
    gone_midway: {"closed", "429"},
}
"""Outcomes of each that are the server's right answer"""


async def misbehave(address: str) -> dict[str, Outcomes]:
    """Let one client of each kind go on; when the task is cancelled, return what became of their
    requests, a wrong outcome with a mark."""
    outcomes: dict[str, Outcomes] = {one.__name__: Counter() for one in EXPECTED}

    async def repeat(one: Client) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            while True:
                try:
                    outcome = await one(client)
                except httpx.HTTPError as error:
                    outcome = type(error).__name__
                known = outcome in EXPECTED[one]
                outcomes[one.__name__][outcome if known else f"{outcome} (wrong)"] += 1
                await asyncio.sleep(PAUSE)

    with suppress(asyncio.CancelledError):
        await asyncio.gather(*map(repeat, EXPECTED))
    return outcomes
