"""Downloads of images by the server: addresses that are asked, and limits of time and size."""

# ruff: noqa: E402  (some packages may be missing)

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

for _name in ("starlette", "prometheus_client", "httpx"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: pip install '.[dev]'")

import httpx

from mobilevlm.runtime.server import app, download
from mobilevlm.runtime.server.errors import ApiError
from mobilevlm.runtime.server.guard import Bodies
from mobilevlm.runtime.server.models import Loading, Models
from mobilevlm.runtime.server.settings import Settings

PUBLIC = ("8.8.8.8", "2606:4700:4700::1111", "64:ff9b::8.8.8.8")
PRIVATE = (
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fc00::1", "fe80::1%eth0",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "ff02::1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b::10.1.2.3", "64:ff9b:1::808:808", "::127.0.0.1", "::10.0.0.1",
    "fec0::1",
)  # fmt: skip

SLOW = ("/slow", "/trickle", "/headers")


class Elsewhere(BaseHTTPRequestHandler):
    """A server of images: /N leads on to /N-1, and /0 is the image."""

    def do_GET(self) -> None:
        kind = self.path.strip("/")
        if kind.isdigit() and int(kind):
            self._moved(f"/{int(kind) - 1}")
        elif kind == "inside":
            assert isinstance(self.server, ThreadingHTTPServer)
            self._moved(f"http://127.0.0.2:{self.server.server_port}/0")
        elif kind == "file":
            self._moved("file:///etc/passwd")
        elif kind == "0":
            self._send(b"image", 5)
        elif kind == "large":
            self._send(b"", download.MAX_BYTES + 1)
        elif kind == "endless":
            self._send(b"", None)
            for _ in range(download.MAX_BYTES // 1_000_000 + 2):
                self.wfile.write(bytes(1_000_000))
        elif kind == "slow":
            self._send(b"a", 10)
            time.sleep(2)
        elif kind == "pause":
            time.sleep(0.4)
            self._send(b"image", 5)
        elif kind == "trickle":
            self._send(b"", 1000)
            self._trickle()
        elif kind == "headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            self._trickle()
        elif kind == "half":
            self._send(bytes(download.MAX_BYTES // 2 + 1), None)
        elif kind == "wrong":
            self._moved("http://[not-an-address/")
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _trickle(self) -> None:
        for _ in range(50):
            try:
                self.wfile.write(b"a")
            except OSError:
                return
            time.sleep(0.1)

    def _moved(self, where: str) -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.end_headers()

    def _send(self, content: bytes, length: int | None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_only_addresses_of_the_public_internet_are_asked() -> None:
    assert all(map(download.is_public, PUBLIC))
    assert [address for address in PRIVATE if download.is_public(address)] == []


@pytest.mark.parametrize("path", ["/0", "/3"])
def test_an_image_is_fetched_over_redirects(elsewhere: str, path: str) -> None:
    assert download.download(elsewhere + path, "image", lambda _: True) == b"image"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/4", "more than 3 redirects"),
        ("/inside", "an address of a private network"),
        ("/file", "expected http:// or https://"),
        ("/large", "more than 20 MB"),
        ("/endless", "more than 20 MB"),
        ("/nowhere", "its server answers 404"),
        ("/slow", "it took more than"),
        ("/trickle", "it took more than"),
        ("/headers", "it took more than"),
        ("/wrong", "cannot be fetched"),
    ],
)
def test_an_image_beyond_the_limits_is_not_fetched(
    elsewhere: str, monkeypatch: pytest.MonkeyPatch, path: str, told: str
) -> None:
    monkeypatch.setattr(download, "MAX_SECONDS", 0.5 if path in SLOW else 15.0)
    start = time.monotonic()
    with pytest.raises(ApiError) as caught:
        download.download(elsewhere + path, "image", {"127.0.0.1"}.__contains__)
    assert caught.value.status == 400 and told in caught.value.message
    assert caught.value.message.startswith("image: ")
    assert time.monotonic() - start < (1.5 if path in SLOW else 10)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/", "http://localhost:1/", "http://[::1]/x", "http://0/", "http://2130706433/",
        "http://user:word@8.8.8.8/", "https:///x", "http://8.8.8.8:99999/", "http://\x00/",
    ],
)  # fmt: skip
def test_an_address_of_this_machine_is_never_asked(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        download.download(url, "image")
    assert any(
        told in caught.value.message
        for told in ("cannot be fetched", "private network", "are not sent", "and a host")
    )


def test_the_addresses_of_a_name_are_tried_in_order_until_one_answers(
    elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(elsewhere.rpartition(":")[2])
    tried: list[str] = []
    connect = socket.create_connection

    def named(host: str, *_: object, **__: object) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        found = ("127.0.0.9", "127.0.0.1", "127.0.0.5") if host == "name" else (host,)
        return [(*kind, (address, port)) for address in found]

    def noted(address: tuple[str, int], *rest: Any) -> socket.socket:
        tried.append(address[0])
        return connect(address, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", named)
    monkeypatch.setattr(socket, "create_connection", noted)
    assert download.download(f"http://name:{port}/0", "image", lambda _: True) == b"image"
    assert tried == ["127.0.0.9", "127.0.0.1"]
    with pytest.raises(ApiError, match="private network"):
        download.download(f"http://name:{port}/0", "image", lambda each: each != "127.0.0.5")


def test_the_images_of_a_request_share_its_bytes(elsewhere: str) -> None:
    bodies = Bodies(10, 10 * download.MAX_BYTES, 5.0)
    budget = download.Budget(bodies.hold, bodies.free)
    found = download.download(f"{elsewhere}/half", "image", lambda _: True, budget)
    assert bodies.held == len(found) == download.MAX_BYTES // 2 + 1
    with pytest.raises(ApiError) as caught:
        download.download(f"{elsewhere}/half", "image", lambda _: True, budget)
    assert "more than 20 MB in this request" in caught.value.message
    budget.close()
    assert bodies.held == 0
    with pytest.raises(ApiError, match="went away"):  # what still runs ends, and holds nothing
        download.download(f"{elsewhere}/0", "image", lambda _: True, budget)
    assert bodies.held == 0


def test_downloads_that_all_requests_leave_no_room_for_may_come_later(elsewhere: str) -> None:
    bodies = Bodies(10, 4, 5.0)
    budget = download.Budget(bodies.hold, bodies.free)
    with pytest.raises(ApiError) as caught:
        download.download(f"{elsewhere}/0", "image", lambda _: True, budget)
    assert caught.value.status == 429 and caught.value.headers["Retry-After"]


async def asked(urls: list[str]) -> httpx.Response:
    """The answer of a server that fetches images, from anywhere, to a request with these."""
    models = Models({"nano": Path("nano")}, Loading())
    served = app.make_app(Settings(allow_urls=True), models, lambda _: True)
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"messages": [{"role": "user", "content": parts}]}
    transport = httpx.ASGITransport(served)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.post("/v1/chat/completions", json=body)


def test_a_name_that_is_looked_up_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(download, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: goes_on.wait(20) and [])
    start = time.monotonic()
    found = asyncio.run(asked(["http://name.example/"] * 3))
    seconds = time.monotonic() - start
    goes_on.set()
    assert found.status_code == 400 and "it took more than" in found.json()["error"]["message"]
    assert seconds < 2


def test_slow_images_of_a_request_share_its_time(
    elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_SECONDS", 1.0)
    start = time.monotonic()
    found = asyncio.run(asked([f"{elsewhere}/pause"] * 8))
    assert found.status_code == 400 and "it took more than" in found.json()["error"]["message"]
    assert time.monotonic() - start < 2.5


def test_too_many_addresses_are_refused_before_any_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_for: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *each, **_: asked_for.append(each))
    found = asyncio.run(asked(["http://name.example/"] * 17))
    assert found.status_code == 400 and asked_for == []
    assert "more than 16 addresses in a request" in found.json()["error"]["message"]
