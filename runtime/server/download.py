"""Images from http(s) addresses, within limits of size, time and redirects, and never from an
address of this machine or its networks."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from typing import TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

from mobilevlm._version import __version__
from mobilevlm.console.terminal import shown
from mobilevlm.runtime.server.errors import ApiError

MAX_BYTES = 20_000_000
MAX_SECONDS = 15.0
MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)

MayAsk: TypeAlias = Callable[[str], bool]
"""Tells whether an IP address may be asked."""


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet: not of this machine, of a private
    network, or of a cloud's metadata."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = None
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
    return found.is_global and not found.is_multicast and (inner is None or inner.is_global)


def download(url: str, place: str, may_ask: MayAsk = is_public) -> bytes:
    """Return the content at an address.

    Raises:
        ApiError: it cannot be fetched within the limits; ``place`` is in the message.
    """
    end = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        try:
            found = _get(_parts(url, place), place, may_ask, end)
        except (OSError, http.client.HTTPException, ValueError) as error:
            told = shown(error) or type(error).__name__
            raise _failed(place, url, f"it cannot be fetched ({told})") from None
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise _failed(place, url, f"more than {MAX_REDIRECTS} redirects")


def _parts(url: str, place: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _failed(place, url, "expected http:// or https:// and a host")
    if parts.username is not None:
        raise _failed(place, url, "a name and password in an address are not sent")
    return parts


def _get(parts: SplitResult, place: str, may_ask: MayAsk, end: float) -> bytes | str:
    """Return the content, or where a redirect leads."""
    url = parts.geturl()
    # The address that was checked is the one that is asked: a name may have another one later.
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = {
        str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    }
    if not all(map(may_ask, addresses)):
        raise _failed(place, url, "an address of a private network: nothing is fetched from there")
    connection = http.client.HTTPConnection(host, port, timeout=_left(end))
    raw = socket.create_connection((min(addresses), port), _left(end))
    try:
        if parts.scheme == "https":
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        connection.sock = raw
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        agent = f"mobilevlm/{__version__}"
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": agent})
        raw.settimeout(_left(end))
        response = connection.getresponse()
        moved = response.getheader("Location")
        if response.status in _REDIRECTS and moved:
            return moved
        if response.status != 200:
            raise _failed(place, url, f"its server answers {response.status}")
        if int(response.getheader("Content-Length") or 0) > MAX_BYTES:
            raise _too_large(place, url)
        content = bytearray()
        while part := response.read1(1 << 16):
            content += part
            if len(content) > MAX_BYTES:
                raise _too_large(place, url)
            raw.settimeout(_left(end))
        return bytes(content)
    finally:
        raw.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it took more than {MAX_SECONDS:.0f} s")
    return left


def _too_large(place: str, url: str) -> ApiError:
    return _failed(place, url, f"more than {MAX_BYTES / 1e6:.0f} MB")


def _failed(place: str, url: str, reason: str) -> ApiError:
    return ApiError(400, f"{place}: {shown(url, 100)}: {reason}", place, "image_url_failed")
