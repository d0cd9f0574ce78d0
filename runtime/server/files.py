"""Files of the page at ``/`` and of the description at ``/docs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

_PATHS = {
    "/": "index.html",
    "/docs": "docs.html",
    "/page.js": "page.js",
    "/docs.js": "docs.js",
    "/style.css": "style.css",
}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Nothing is loaded from elsewhere, and no other site shows the page in a frame."""


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    headers: Mapping[str, str]


def page_files() -> dict[str, PageFile]:
    """Return the files by their paths in addresses."""
    folder = files("mobilevlm.runtime.server").joinpath("page")
    return {
        path: PageFile(folder.joinpath(name).read_bytes(), _headers(name))
        for path, name in _PATHS.items()
    }


def _headers(name: str) -> dict[str, str]:
    return {
        "Content-Type": f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8",
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
