"""Image files: which formats are read, what is checked before pixels are decoded, and damage.

Formats are those that hold pixels only. What Pillow also opens but would start another program
(PostScript), open other files, or draw (WMF) is refused. A header is enough to refuse an image for
its size or for the memory that decoding would take.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from PIL import Image, ImageFile

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, ImageWarning
from mobilevlm.regular_file import LFS_POINTER, LFS_REMEDY

FORMATS = (
    "PNG", "JPEG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000", "QOI",
    "ICO", "DDS", "SGI", "PCX", "TGA",
)  # fmt: skip
"""Pillow's names; HEIF where the package pillow-heif is installed."""
MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (Pillow's own default, but a program that turns
Pillow's limit off does not turn off ours)."""
_BESIDE = {
    "PNG": 0, "BMP": 0, "DIB": 0, "PPM": 0, "TIFF": 8, "WEBP": 16, "AVIF": 14, "HEIF": 14,
    "JPEG2000": 24,
}  # fmt: skip
"""Bytes that a decoder takes for each pixel besides the image itself, measured with Pillow 13."""
_BESIDE_OTHERS = 4
_OTHER_KINDS = (
    (b"%!", "PostScript"), (b"\xc5\xd0\xd3\xc6", "PostScript"), (b"%PDF", "PDF"),
    (b"\xd7\xcd\xc6\x9a", "WMF"), (b"<svg", "SVG"), (b"<?xml", "XML"), (b"8BPS", "Photoshop"),
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_END = b"\xff\xd9"
_FILLING = bytes(range(1, 255)) * 16
"""Bytes in which JPEG data has no mark."""


@dataclass(frozen=True)
class Room:
    """Memory that an image may take."""

    size: float
    """Bytes."""
    where: str
    """For a person: what sets the limit."""


RoomFor: TypeAlias = Callable[[float], Room]
"""Gives the memory that there is for an image which needs so many bytes; it may free some first."""


def read_image(
    file: IO[bytes], name: str, room_for: RoomFor | None, edge: int | None
) -> Image.Image:
    """Decode the first frame of an image file, as it is stored.

    ``edge``: the shortest edge that is needed. Where ``room_for`` demands it, a JPEG is decoded at
    a half, a quarter or an eighth of its size, but not smaller than that, and a warning says so.

    Raises:
        ImageError: it is no image, damaged, or too large.
    """
    image = _open(file, name)
    check_size(image, name)
    needed = _needed(image, _stored_pixels(image, file))
    if edge is not None:  # resized rows of the whole
        needed += storage_bytes("RGB") * edge * max(image.size)
    asked = image.size
    if room_for is not None and needed > (room := room_for(needed)).size:
        asked = _decode_smaller(image, name, room, edge, needed)
    kind = str(image.format)
    try:
        image.load()
    except Exception as error:  # a decoder of others' on a file of others'
        failure = _damaged(name, kind, error)
        del image  # it is as large as the next one
        mended = _without_end(file, asked, name) if kind in ("JPEG", "MPO") else None
        if mended is None:
            raise failure from None
        return mended
    return image


def check_size(image: Image.Image, name: str) -> None:
    """Raise if an image has no pixels or more than are allowed."""
    most = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    _check_pixels(image.size, most, name)


def _check_pixels(size: tuple[int, int], most: int, name: str) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: image of {width} × {height} pixels: it is empty")
    if width * height > most:
        raise ImageError(
            f"{name}: {width} × {height} is more than {most} pixels: scale it down first"
        )


def storage_bytes(mode: str) -> int:
    """Return the bytes of a pixel in Pillow's memory."""
    return {"1": 1, "L": 1, "P": 1}.get(mode, 2 if mode.startswith("I;16") else 4)


def _open(file: IO[bytes], name: str) -> ImageFile.ImageFile:
    """Read the header. Not by ``Image.open``, which warns of sizes that we refuse."""
    start = file.read(32)
    _check_kind(start, name)
    failure: tuple[str, Exception] | None = None
    for kind in FORMATS:
        if kind not in Image.OPEN:
            Image.init()
        if kind not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[kind]
        if not _accepted(accept, start[:16], kind, name):
            continue
        if kind == "WEBP":
            _check_canvas(start, name)  # its decoder allocates the canvas when it is made
        file.seek(0)
        try:
            return factory(file, "")
        except Exception as error:  # a decoder of others' on a file of others'
            if accept is not None:
                failure = failure or (kind, error)
    if failure is not None:
        raise _damaged(name, *failure)
    raise ImageError(
        f"{name}: not an image in a format that is read (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF …)"
    )


def _accepted(accept: Any, start: bytes, kind: str, name: str) -> bool:
    """Return whether a file begins as those of a format do."""
    try:
        found = accept is None or accept(start)
    except Exception:  # a few of Pillow's read beyond the end of a short file
        return False
    if isinstance(found, str):
        raise ImageError(
            f"{name}: the Pillow that is installed does not read {kind}: "
            f"pip install --upgrade pillow, or convert it to PNG"
        )
    return bool(found)


def _check_kind(start: bytes, name: str) -> None:
    """Raise for known files that are not images of pixels, or need another package."""
    if start.startswith(LFS_POINTER):
        raise ImageError(f"{name}: {LFS_REMEDY}")
    for prefix, kind in _OTHER_KINDS:
        if start.startswith(prefix):
            raise ImageError(f"{name}: {kind} is not a raster image: convert it to PNG first")
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
        try:
            import pillow_heif  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            if b"avif" in start[8:]:
                return
            raise ImageError(
                f"{name}: a HEIC image, which needs the package pillow-heif: "
                f"pip install pillow-heif, or convert it to JPEG"
            ) from None
        pillow_heif.register_heif_opener()


def _check_canvas(start: bytes, name: str) -> None:
    """Check the size in a WebP file's header."""
    size = None
    if start[12:16] == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", start, 26)
        size = width & 0x3FFF, height & 0x3FFF
    elif start[12:16] == b"VP8X" and len(start) >= 30:
        size = (
            int.from_bytes(start[24:27], "little") + 1,
            int.from_bytes(start[27:30], "little") + 1,
        )
    elif start[12:16] == b"VP8L" and len(start) >= 25:
        bits = int.from_bytes(start[21:25], "little")
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if size is not None and all(size):
        _check_pixels(size, min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS), name)


def _stored_pixels(image: ImageFile.ImageFile, file: IO[bytes]) -> int:
    """Return the pixels that the decoder will make, which may be more than the image's."""
    pixels = image.width * image.height
    if image.format == "TIFF":
        tile = [_first(image.tag_v2.get(tag)) for tag in (322, 323)]  # type: ignore[attr-defined]
        return max(pixels, tile[0] * tile[1])
    if image.format == "ICO":
        return max([pixels, *_icon_pixels(file)])
    return pixels


def _first(value: Any) -> int:
    number = value[0] if isinstance(value, tuple) and value else value
    return int(number) if isinstance(number, (int, float)) and number == number else 0


def _icon_pixels(file: IO[bytes]) -> list[int]:
    """Return the pixels of each PNG in an icon file; the directory may say otherwise."""
    file.seek(0)
    head = file.read(6)
    entries = [file.read(16) for _ in range(int.from_bytes(head[4:6], "little"))]
    found = []
    for entry in entries:
        if len(entry) == 16:
            file.seek(int.from_bytes(entry[12:16], "little"))
            start = file.read(24)
            if start[:4] == b"\x89PNG" and len(start) == 24:
                width, height = struct.unpack_from(">II", start, 16)
                found.append(width * height)
    return found


def _needed(image: ImageFile.ImageFile, pixels: int) -> float:
    """Return the bytes that decoding takes at its peak."""
    beside = _BESIDE.get(str(image.format), _BESIDE_OTHERS)
    if image.format in ("JPEG", "MPO"):  # coefficients of the whole image
        beside = 2 * len(image.getbands()) if image.info.get("progressive") else 0
    return float(pixels * (storage_bytes(image.mode) + beside))


def _decode_smaller(
    image: ImageFile.ImageFile, name: str, room: Room, edge: int | None, needed: float
) -> tuple[int, int]:
    """Have a JPEG decoded at a fraction of its size that fits, and return the size that was asked
    for; raise where there is none."""
    width, height = image.size
    if image.format in ("JPEG", "MPO") and edge is not None:
        whole = width * height
        kept = whole * storage_bytes(image.mode)
        for scale in (2, 4, 8):
            size = width // scale, height // scale
            if min(size) < edge:
                break
            if needed - kept + kept / scale**2 <= room.size:
                image.draft(None, size)
                warnings.warn(
                    f"{name}: {width} × {height} pixels take {needed / 1e6:.0f} MB, "
                    f"{room.size / 1e6:.0f} MB are left ({room.where}): read at 1/{scale} of its "
                    f"size, which changes its pixels a little",
                    ImageWarning,
                    stacklevel=2,
                )
                return size
    raise ImageError(
        f"{name}: decoding {width} × {height} pixels takes {needed / 1e6:.0f} MB, "
        f"{max(room.size, 0) / 1e6:.0f} MB are left ({room.where}): scale it down first, or raise "
        f"the limit"
    )


def _without_end(file: IO[bytes], asked: tuple[int, int], name: str) -> ImageFile.ImageFile | None:
    """Decode a JPEG that lacks nothing but its end mark; none if pixels are missing too.

    Pixels that are missing are made of whatever follows the data, so the image is decoded with
    two things behind it and compared.
    """
    file.seek(0)
    content = file.read()
    digests: set[bytes] = set()
    mended: ImageFile.ImageFile | None = None
    for filling in (_FILLING, b""):
        try:
            mended = _open(io.BytesIO(content + filling + _END), name)
            mended.draft(None, asked)
            mended.load()
        except Exception:  # a decoder of others' on a file of others'
            return None
        digests.add(_digest(mended))
    if len(digests) > 1:
        return None
    warnings.warn(f"{name}: a JPEG without its end mark", ImageWarning, stacklevel=2)
    return mended


def _digest(image: Image.Image) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    for top in range(0, image.height, 64):
        strip = image.crop((0, top, image.width, min(top + 64, image.height)))
        hasher.update(strip.tobytes())
    return hasher.digest()


def _damaged(name: str, kind: str, error: Exception) -> ImageError:
    told = shown(error) or type(error).__name__
    return ImageError(f"{name}: damaged {kind} image ({told})")
