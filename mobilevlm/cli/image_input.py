"""Images and sounds as a command line names them: files, URIs, addresses, standard input, the
clipboard."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from mobilevlm.errors import ImageError

CLIPBOARD = "clipboard:"
F = TypeVar("F", bound=Callable[..., Any])

allow_urls_option = click.option(
    "--allow-urls",
    is_flag=True,
    help="Fetch images from http(s) addresses that are not of private networks (20 MB and 15 s for "
    "all together).",
)


def given_images(images: Sequence[str], allow_urls: bool, stdin: bool = False) -> list[Any]:
    """Return images as ``VLM.stream`` takes them: what is in no file becomes a ``data:`` URI.
    ``stdin``: "-" is what standard input has, as bytes.

    Raises:
        ImageError: an address without ``allow_urls`` or that cannot be fetched; no image in the
            clipboard or no way to read it.
        click.UsageError: standard input is empty.
    """
    addresses = [image for image in images if _is_address(image)]
    if addresses and not allow_urls:
        raise ImageError(f"{addresses[0]:.100}: nothing is fetched without --allow-urls")
    budget: Any = None
    if addresses:
        from mobilevlm.runtime.server.download import Budget

        budget = Budget()
    return [
        _from_stdin("--image", "image") if image == "-" and stdin else _given(image, budget)
        for image in images
    ]


def given_sounds(sounds: Sequence[str]) -> list[Any]:
    """Return sounds as ``VLM.stream`` takes them; "-" is what standard input has.

    Raises:
        click.UsageError: standard input is empty.
    """
    from mobilevlm.prompt import Sound  # brings numpy

    return [Sound(_from_stdin("--audio", "sound") if sound == "-" else sound) for sound in sounds]


def _given(image: str, budget: Any) -> str:
    if image == CLIPBOARD:
        return _from_clipboard()
    return _uri(_fetched(image, budget)) if _is_address(image) else image


def _is_address(image: str) -> bool:
    return image[:8].lower().startswith(("http://", "https://"))


def _uri(content: bytes) -> str:
    return f"data:;base64,{base64.b64encode(content).decode()}"


def _fetched(url: str, budget: Any) -> bytes:
    """Return the content at an address, within the limits of the server's ``--allow-urls``."""
    from mobilevlm.runtime.server.download import download
    from mobilevlm.runtime.server.errors import ApiError

    try:
        return download(url, "--image", budget=budget)
    except ApiError as error:
        raise ImageError(error.message) from None


def _from_clipboard() -> str:
    """Return the image in the clipboard, or the file that was copied there."""
    from PIL import ImageGrab

    remedy = "copy an image first, or give a file"
    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError) as error:  # no program for it, or no desktop
        told = " ".join(str(error).split())[:200]
        raise ImageError(f"{CLIPBOARD} cannot be read here ({told}): give a file") from None
    if found is None or found == []:
        raise ImageError(f"{CLIPBOARD} no image is in it: {remedy}")
    if isinstance(found, list):
        if len(found) > 1:
            raise ImageError(f"{CLIPBOARD} {len(found)} files are in it: copy one, or give files")
        return str(found[0])
    content = io.BytesIO()
    found.save(content, "PNG")
    return _uri(content.getvalue())


def _from_stdin(option: str, what: str) -> bytes:
    if not (content := sys.stdin.buffer.read()):
        raise click.UsageError(f"{option} -: standard input is empty: send one {what} file into it")
    return content
