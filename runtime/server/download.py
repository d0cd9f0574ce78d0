"""Images from http(s) addresses, within limits of size, time and redirects, and never from an
address of this machine or its networks."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

from mobilevlm._version import __version__
from mobilevlm.console.terminal import shown
from mobilevlm.runtime.server.errors import ApiError

MAX_BYTES = 20_000_000
"""Bytes of all images of a request"""
MAX_SECONDS = 15.0
"""For all images of a request"""
MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_EMBEDDING = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
"""Addresses of NAT64 (RFC 6052) and the IPv4-compatible ones (RFC 4291) end with one of IPv4"""
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")

MayAsk: TypeAlias = Callable[[str], bool]
"""Tells whether an IP address may be asked."""


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet: not of this machine, of a private
    network, or of a cloud's metadata."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if not found.is_global or found.is_multicast:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return True
    inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
    if any(found in network for network in _EMBEDDING):
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    if found.is_site_local or found in _LOCAL_NAT64:
        return False
    return inner is None or is_public(str(inner))


class Budget:
    """The time and bytes that are left for the downloads of one request, which threads share.
    ``hold`` and ``free`` are told of the bytes that are there."""

    def __init__(
        self,
        hold: Callable[[int], None] = lambda _: None,
        free: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._hold, self._free = hold, free
        self._end = time.monotonic() + MAX_SECONDS
        self._lock = threading.Lock()
        self._taken = 0
        self._is_closed = False

    @property
    def seconds(self) -> float:
        """Time that is left.

        Raises:
            TimeoutError: there is none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"it took more than {MAX_SECONDS:.0f} s")
        return left

    def check(self, count: int) -> None:
        """Raise if so many bytes more are too many.

        Raises:
            ValueError: they are.
        """
        if self._taken + count > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES / 1e6:.0f} MB in this request")

    def take(self, count: int) -> None:
        """Count bytes that have arrived.

        Raises:
            ValueError: they are too many.
            ApiError: there is no room for them.
            ConnectionError: the request has ended.
        """
        with self._lock:
            if self._is_closed:
                raise ConnectionError("the client went away")
            self.check(count)
            self._hold(count)
            self._taken += count

    def close(self) -> None:
        """Count the bytes as gone; downloads that still run end at their next part."""
        with self._lock:
            self._is_closed = True
            self._free(self._taken)
            self._taken = 0


def download(
    url: str, place: str, may_ask: MayAsk = is_public, budget: Budget | None = None
) -> bytes:
    """Return the content at an address.

    Raises:
        ApiError: it cannot be fetched within the limits; ``place`` is in the message.
    """
    budget = budget or Budget()
    for _ in range(MAX_REDIRECTS + 1):
        try:
            found = _get(_parts(url, place), place, may_ask, budget)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise failed(place, url, _told(error, budget)) from None
    raise failed(place, url, f"more than {MAX_REDIRECTS} redirects")


def failed(place: str, url: str, reason: str) -> ApiError:
    """Return the error of an address that cannot be fetched."""
    return ApiError(400, f"{place}: {shown(url, 100)}: {reason}", place, "image_url_failed")


def _told(error: Exception, budget: Budget) -> str:
    try:
        _ = budget.seconds  # a socket that was shut down in time reports anything
    except TimeoutError as late:
        error = late
    return f"it cannot be fetched ({shown(error) or type(error).__name__})"


def _parts(url: str, place: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise failed(place, url, "expected http:// or https:// and a host")
    if parts.username is not None:
        raise failed(place, url, "a name and password in an address are not sent")
    return parts


def _get(parts: SplitResult, place: str, may_ask: MayAsk, budget: Budget) -> bytes | str:
    """Return the content, or where a redirect leads."""
    url = parts.geturl()
    # The address that was checked is the one that is asked: a name may have another one later.
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
    if not all(map(may_ask, addresses)):
        raise failed(place, url, "an address of a private network: nothing is fetched from there")
    raw = _connected(addresses, port, budget)
    if parts.scheme == "https":
        raw = ssl.create_default_context().wrap_socket(
            raw, server_hostname=host, do_handshake_on_connect=False
        )
    with raw, _ended_in_time(raw, budget):
        if isinstance(raw, ssl.SSLSocket):
            raw.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = raw
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        agent = f"mobilevlm/{__version__}"
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": agent})
        response = connection.getresponse()
        moved = response.getheader("Location")
        if response.status in _REDIRECTS and moved:
            return moved
        if response.status != 200:
            raise failed(place, url, f"its server answers {response.status}")
        budget.check(int(response.getheader("Content-Length") or 0))
        content = bytearray()
        while part := response.read1(1 << 16):
            budget.take(len(part))
            content += part
        _ = budget.seconds  # past the end of the time the content may be cut
        return bytes(content)


def _connected(addresses: Iterable[str], port: int, budget: Budget) -> socket.socket:
    """Return a connection to the first address that takes one."""
    last: OSError = OSError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), budget.seconds)
        except OSError as error:
            last = error
    raise last


@contextmanager
def _ended_in_time(raw: socket.socket, budget: Budget) -> Iterator[None]:
    """Shut a socket down at the end of the time: its own time limit is that of each read."""

    def end() -> None:
        try:
            socket.socket.shutdown(raw, socket.SHUT_RDWR)  # without a farewell of TLS
        except OSError:
            return  # closed already

    timer = threading.Timer(budget.seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
