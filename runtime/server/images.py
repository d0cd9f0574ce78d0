"""Images and sounds of messages: data URIs, base64, and addresses of images where they are allowed.
Never a path: what lies on the server's disk is not the client's."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Literal

from mobilevlm.messages import Message
from mobilevlm.runtime.server.errors import refuse, shown_key
from mobilevlm.runtime.server.fields import MAX_PARTS

MAX_IMAGES = 256
"""Images of a request"""
MAX_ADDRESSES = 16
"""Images of a request that are fetched"""
_DATA = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ImageRef:
    """An image or a sound of a request: its bytes, or where they are."""

    place: str
    """In the request, for messages"""
    content: bytes
    """Empty where there is an address"""
    url: str = ""
    detail: Literal["auto", "low", "high"] = "auto"
    """``low``: in one tile, by models that split images"""
    kind: Literal["image", "audio"] = "image"


def take_images(
    messages: list[dict[str, Any]], allow_urls: bool
) -> tuple[list[Message], tuple[ImageRef, ...]]:
    """Return the messages with parts that bring no image and no sound, and these in order.
    Everything else in the messages is left to :func:`mobilevlm.messages.read_messages`.

    Raises:
        ApiError: such a part is wrong.
    """
    images: list[ImageRef] = []
    found: list[Message] = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            if len(content) > MAX_PARTS:
                told = f"expected {MAX_PARTS} parts at most, found {len(content)}"
                raise refuse(f"messages[{number}].content", told)
            parts = [
                _taken(f"messages[{number}].content[{index}]", part, allow_urls, images)
                for index, part in enumerate(content)
            ]
            message = {**message, "content": parts}
        found.append(message)  # type: ignore[arg-type]
    return found, tuple(images)


def _taken(place: str, part: Any, allow_urls: bool, images: list[ImageRef]) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        raise refuse(place, "images are parts of type image_url, with a data: URI")
    if kind in ("video", "video_url"):
        raise refuse(place, "videos are not taken here: send frames as parts of type image_url")
    if kind in ("audio", "audio_url"):
        raise refuse(place, "sounds are parts of type input_audio, with data in base64")
    if kind not in ("image_url", "input_audio"):
        return part
    if len(images) == MAX_IMAGES:
        raise refuse(place, f"more than {MAX_IMAGES} images or sounds in a request")
    if kind == "input_audio":
        images.append(_read_sound(f"{place}.input_audio", part))
        return {"type": "audio"}
    unknown = [key for key in part if key not in ("type", "image_url")]
    if unknown:
        raise refuse(f"{place}.{shown_key(unknown[0])}", "unknown field, expected image_url")
    images.append(_read_image_url(f"{place}.image_url", part.get("image_url"), allow_urls))
    if images[-1].url and sum(bool(image.url) for image in images) > MAX_ADDRESSES:
        raise refuse(place, f"more than {MAX_ADDRESSES} addresses in a request: send data: URIs")
    return {"type": "image"}


def _read_sound(place: str, part: dict[str, Any]) -> ImageRef:
    unknown = [key for key in part if key not in ("type", "input_audio")]
    if unknown:
        told = "unknown field, expected input_audio"
        raise refuse(f"{place.removesuffix('.input_audio')}.{shown_key(unknown[0])}", told)
    value = part.get("input_audio")
    if not isinstance(value, dict):
        raise refuse(place, "expected data in base64, and its format: wav or mp3")
    unknown = [key for key in value if key not in ("data", "format")]
    if unknown:
        told = "unknown field, expected data and format"
        raise refuse(f"{place}.{shown_key(unknown[0])}", told)
    if value.get("format") not in ("wav", "mp3"):
        raise refuse(f"{place}.format", f"expected wav or mp3, found {value.get('format')!r:.60}")
    data = value.get("data")
    if not isinstance(data, str) or not data:
        raise refuse(f"{place}.data", "no sound in it: expected a file in base64")
    return ImageRef(place, _decoded(f"{place}.data", data, "audio/wav"), kind="audio")


def _read_image_url(place: str, value: Any, allow_urls: bool) -> ImageRef:
    detail: Any = "auto"
    if isinstance(value, dict):
        unknown = [key for key in value if key not in ("url", "detail")]
        if unknown:
            raise refuse(
                f"{place}.{shown_key(unknown[0])}", "unknown field, expected url and detail"
            )
        detail = value.get("detail") or "auto"
        if detail not in ("auto", "low", "high"):
            raise refuse(f"{place}.detail", f"expected auto, low or high, found {detail!r:.60}")
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise refuse(place, "no url in it: expected a data: URI")
    if value[:8].lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise refuse(
                place,
                "this server fetches no images: send a data: URI (the server's --allow-urls "
                "changes that)",
                "url_not_allowed",
            )
        return ImageRef(place, b"", value, detail)
    return ImageRef(place, _decoded(place, value), "", detail)


def _decoded(place: str, value: str, kind: str = "image/png") -> bytes:
    """Return the content of a data URI, or of base64 alone."""
    head = _DATA.match(value)
    if head is None and (value[:5].lower() == "data:" or "://" in value[:20]):
        raise refuse(place, f"expected data:{kind};base64,… found {value[:40]!r}")
    text = "".join(value[head.end() if head else 0 :].split()).rstrip("=")
    text = text.replace("-", "+").replace("_", "/")  # the alphabet for addresses
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise refuse(place, f"damaged base64: expected data:{kind};base64,…") from None
    if not content:
        what = "an image" if kind == "image/png" else "a sound"
        raise refuse(place, f"{what} without content")
    return content
