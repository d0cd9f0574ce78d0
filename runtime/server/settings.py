"""Settings that a person gives a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from mobilevlm.errors import MobileVLMError

MAX_BODY = 20_000_000
"""Bytes of a request's body"""
MAX_HELD = 10 * MAX_BODY
"""Bytes of the bodies of all requests that are there"""
BODY_SECONDS = 60.0
"""Time that a body may take to arrive"""


@dataclass(frozen=True)
class Settings:
    """How a server listens and whom it answers.

    Raises:
        MobileVLMError: it would answer everybody on a network, and nobody said so.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    """0: one that is free"""
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    """Everybody is answered, whatever the address"""
    cors: tuple[str, ...] = ()
    """Origins whose pages may ask; "*": all"""
    allow_urls: bool = False
    """Images may be http(s) addresses, which the server fetches"""
    parallel: int = 4
    """Answers that are made at the same time"""
    queue: int = 64
    """Requests that may wait beside them"""
    drain_seconds: int = 30
    """Time that answers have to end after SIGTERM"""

    def __post_init__(self) -> None:
        if self.api_keys and self.no_auth:
            raise MobileVLMError("--api-key and --no-auth do not go together: give one")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise MobileVLMError("--api-key: expected letters, digits and signs of ASCII")
        if not (self.is_local or self.api_keys or self.no_auth):
            raise MobileVLMError(
                f"--host {self.host}: others on the network could ask: give --api-key KEY, or "
                f"--no-auth if everybody may"
            )

    @property
    def is_local(self) -> bool:
        """True if only programs on this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
