"""Every way to give an image or a sound, as one kind of binary file with a name for messages.

Only what is given is read: no network, no device, no pipe that never ends.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, MobileVLMError
from mobilevlm.prompt import Prepared

ImageInput: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | "
    "NDArray[np.uint8] | Prepared"
)
"""A path; a ``file://`` or ``data:`` URI; the bytes of an image file; a binary file object; a
Pillow image; uint8 pixels ``(height, width, 3)``; or what ``VLM.prepare_image`` returned."""
MAX_FILE_BYTES = 1 << 30
"""Most bytes that are read of a file object or held by a ``data:`` URI."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://|data:", re.IGNORECASE)


Failure: TypeAlias = "type[MobileVLMError]"


class ImageFile(io.BytesIO):
    """The content of an image file, with the name that messages give it."""

    def __init__(self, content: bytes = b"", name: str = "") -> None:
        super().__init__(content)
        self.name = name


@contextlib.contextmanager
def open_source(
    source: Any, what: str = "image", failure: Failure = ImageError
) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name of a file and the file, which can seek. ``what``: the word for it in messages
    of errors, which are of the class ``failure``.

    Raises:
        MobileVLMError: there is no such file, it cannot be read, or it is another kind of object.
    """
    if isinstance(source, str) and (scheme := _SCHEME.match(source)):
        if scheme[0].lower() == "data:":
            content = _data(source, what, failure)
            yield f"{shown(source, 40)} ({len(source)} characters)", io.BytesIO(content)
            return
        source = _local_path(source, scheme[1].lower(), what, failure)
    if isinstance(source, (str, PathLike)):
        with _open_path(Path(source), what, failure) as file:
            yield shown(source), file
    elif isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        yield f"{len(content)} bytes", io.BytesIO(content)
    elif hasattr(source, "read"):
        given = getattr(source, "name", None)
        name = shown(given) if isinstance(given, str) else f"{type(source).__name__} object"
        yield name, io.BytesIO(_read(source, name, what, failure))
    else:
        arrays = "a Pillow image or an array" if what == "image" else "or samples and their rate"
        raise failure(
            f"{what}: expected a path, a data URI, bytes, a binary file, {arrays}, found "
            f"{type(source).__name__}"
        )


def is_uri(source: str) -> bool:
    """Return whether a text is a URI, not the path of a file."""
    return _SCHEME.match(source) is not None


def _local_path(uri: str, scheme: str, what: str, failure: Failure) -> str:
    """Return the path of a ``file://`` URI."""
    if scheme in ("http", "https"):
        raise failure(
            f"{shown(uri)}: {what}s are not fetched from the network: download it and give the file"
        )
    parts = urllib.parse.urlsplit(uri)
    if scheme != "file" or parts.netloc not in ("", "localhost"):
        raise failure(f"{shown(uri)}: expected a path, a file:/// URI or a data: URI")
    return urllib.parse.unquote(parts.path)


def _data(uri: str, what: str, failure: Failure) -> bytes:
    """Return the content of a ``data:`` URI (RFC 2397)."""
    head, comma, body = uri.partition(",")
    name = f"{shown(uri, 40)} ({len(uri)} characters)"
    if not comma:
        kind = "image/png" if what == "image" else "audio/wav"
        raise failure(f"{name}: a data URI without content: expected data:{kind};base64,…")
    if not head.lower().rstrip().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    text = "".join(urllib.parse.unquote(body).split()).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise failure(f"{name}: damaged base64 ({shown(error)})") from None


def _open_path(path: Path, what: str, failure: Failure) -> IO[bytes]:
    """Open a regular file; a pipe or a device never."""
    try:
        # Opening a pipe that nobody writes to would wait.
        number = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise failure(f"{shown(path)}: no such {what} file") from None
    except OSError as error:
        raise failure(f"{shown(path)}: {error.strerror or error}") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        article = "an" if what == "image" else "a"
        raise failure(f"{shown(path)}: not a regular file: give {article} {what} file")
    return os.fdopen(number, "rb")


def _read(file: Any, name: str, what: str, failure: Failure) -> bytes:
    """Read a file object from its beginning, or a stream from where it is."""
    parts: list[bytes] = []
    left = MAX_FILE_BYTES
    try:
        if callable(getattr(file, "seekable", None)) and file.seekable():
            file.seek(0)
        while part := file.read(min(left + 1, 1 << 24)):
            if not isinstance(part, (bytes, bytearray)):
                raise failure(f"{name}: opened as text: open it in binary mode ('rb')")
            parts.append(bytes(part))
            left -= len(part)
            if left < 0:
                raise failure(f"{name}: more than {MAX_FILE_BYTES} bytes: give a smaller {what}")
    except (OSError, ValueError) as error:
        raise failure(f"{name}: cannot be read ({shown(error)})") from None
    return b"".join(parts)
