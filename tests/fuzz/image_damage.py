"""Damage to image files that keeps to their structure: chunks, segments, boxes and tags."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

from fuzz.mutations import mutate_bytes

WORDS = (
    0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 1000, 8192, 20_000, 32_767, 65_535, 10**6, 2**31 - 1, 2**31,
    2**32 - 1,
)  # fmt: skip
"""Values of header fields: sizes, counts, offsets."""
Part = tuple[bytes, bytes]
"""Name and content of a chunk, segment or box."""


def damage(random: random.Random, kind: str, content: bytes) -> bytes:
    """Change a file of a format (its file name's ending) in one of several ways."""
    structured = _STRUCTURES.get(kind)
    choice = random.random()
    if choice < 0.55 and structured is not None:
        split, join = structured
        try:
            parts = split(content)
        except (struct.error, IndexError):
            return mutate_bytes(random, content)
        for _ in range(random.choice((1, 1, 2, 4))):
            parts = _damage_parts(random, parts)
        return join(parts)
    if choice < 0.75 or kind == "tif":
        return _damage_tags(random, content)
    if choice < 0.9:
        return _overwrite(random, content, 160)
    return mutate_bytes(random, content)


def _overwrite(random: random.Random, content: bytes, within: int) -> bytes:
    """Put numbers over fields at the beginning of the file, in either byte order."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        size = random.choice((1, 2, 4))
        at = random.randrange(max(min(within, len(data)) - size, 1))
        value = random.choice(WORDS) & (2 ** (8 * size) - 1)
        data[at : at + size] = value.to_bytes(size, random.choice(("little", "big")))
    return bytes(data)


def _damage_parts(random: random.Random, parts: list[Part]) -> list[Part]:
    parts = list(parts)
    if not parts:
        return parts
    at, kind = random.randrange(len(parts)), random.randrange(8)
    name, body = parts[at]
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(random.randrange(len(parts) + 1), parts[at])
    elif kind == 2:
        parts.insert(at, parts.pop(random.randrange(len(parts))))
    elif kind == 3:
        parts[at] = name, _overwrite(random, body, 32) if body else b"\0" * random.choice((1, 400))
    elif kind == 4:
        parts[at] = name, body[: random.randrange(len(body) + 1)]
    elif kind == 5:
        parts[at] = random.choice(parts)[0], body
    elif (kind == 6 and b"II*\0" in body) or b"MM\0*" in body:
        parts[at] = name, _damage_tags(random, body)
    else:
        parts[at] = name, mutate_bytes(random, body)
    return parts


def _damage_tags(random: random.Random, content: bytes) -> bytes:
    """Change entries of a directory of TIFF tags (of a TIFF file, or of EXIF in another one)."""
    data = bytearray(content)
    start, order = data.find(b"II*\0"), "<"
    if start < 0:
        start, order = data.find(b"MM\0*"), ">"
    if start < 0:
        return _overwrite(random, content, 160)
    try:
        (offset,) = struct.unpack_from(order + "I", data, start + 4)
        (count,) = struct.unpack_from(order + "H", data, start + offset)
        for _ in range(random.choice((1, 1, 2, 5))):
            entry = start + offset + 2 + 12 * random.randrange(max(count, 1))
            field, form, top = random.choice(
                ((0, "H", 65_536), (2, "H", 20), (4, "I", 2**32), (8, "I", 2**32), (8, "H", 65_536))
            )
            value = random.choice((*WORDS, 254, 257, 259, 262, 273, 274, 282, 317, 34_665))
            struct.pack_into(order + form, data, entry + field, value % top)
    except struct.error:
        return mutate_bytes(random, content)
    return bytes(data)


def _png_parts(data: bytes) -> list[Part]:
    parts, at = [], 8
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return parts


def _png_file(parts: list[Part]) -> bytes:
    """Write chunks with right lengths and checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def _riff_parts(data: bytes) -> list[Part]:
    parts, at = [], 12
    while at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        parts.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return parts


def _webp_file(parts: list[Part]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for name, body in parts
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _jpeg_parts(data: bytes) -> list[Part]:
    """Split into segments; what follows the head of a scan belongs to it."""
    parts, at = [], 2
    while at + 4 <= len(data):
        marker, (size,) = data[at : at + 2], struct.unpack_from(">H", data, at + 2)
        end = at + 2 + size
        if marker == b"\xff\xda":
            while end < len(data) - 1 and not (data[end] == 255 and data[end + 1] not in
                                               (0, *range(0xD0, 0xD8))):  # fmt: skip
                end += 1
        parts.append((marker, data[at + 4 : end]))
        at = end
    return parts


def _jpeg_file(parts: list[Part]) -> bytes:
    def length(name: bytes, body: bytes) -> int:
        return (2 + body[0] * 2 + 4 if body else 2) if name == b"\xff\xda" else len(body) + 2

    return (
        b"\xff\xd8"
        + b"".join(
            name + struct.pack(">H", min(length(name, body), 65_535)) + body for name, body in parts
        )
        + b"\xff\xd9"
    )


def _box_parts(data: bytes) -> list[Part]:
    """Split into boxes (AVIF, JPEG 2000), those in ``meta`` and its like apart."""
    parts, at = [], 0
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        end = at + size if size >= 8 else len(data)
        name = data[at + 4 : at + 8]
        parts.append((name, data[at + 8 : end]))
        at = end
    return parts


def _box_file(parts: list[Part]) -> bytes:
    return b"".join(struct.pack(">I", len(body) + 8) + name + body for name, body in parts)


_STRUCTURES: dict[str, tuple[Callable[[bytes], list[Part]], Callable[[list[Part]], bytes]]] = {
    "png": (_png_parts, _png_file),
    "webp": (_riff_parts, _webp_file),
    "jpg": (_jpeg_parts, _jpeg_file),
    "avif": (_box_parts, _box_file),
    "jp2": (_box_parts, _box_file),
}
