"""Parts of a chat message: checked, the image, video or sound of each taken out.

They follow OpenAI (``image_url``, ``input_audio``) and Transformers (``image``, ``audio``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from mobilevlm.errors import PromptError
from mobilevlm.image import ImageInput
from mobilevlm.prompt import Clip, Sound

_SOURCES = ("image", "path", "url", "base64")
"""Keys of an image part under which its image may be; without one it is the next of ``images``."""
_VIDEO_SOURCES = ("video", "path", "url")
_SOUND_SOURCES = ("audio", "path", "url", "base64")
_SOUND_FORMATS = ("wav", "mp3")
"""Formats of ``input_audio``."""
_UNREAD = {
    "file": "files",
    "video_url": "addresses of videos: give the file in a part of type video",
}


@dataclass(frozen=True)
class VideoFile:
    """The video of a part, which no model has taken yet."""

    path: str | PathLike[str]


Shown: TypeAlias = "ImageInput | Clip | VideoFile | Sound"
"""Image, clip, video or sound of a message part."""


def read_part(place: str, part: Any, role: str, sources: list[Shown | None]) -> dict[str, Any]:
    """Return a part as templates read it; the image that it brings is appended to ``sources``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _UNREAD:
        raise PromptError(f"{place}: this model reads text and images, no {_UNREAD[kind]}")
    if kind == "text":
        _check_keys(place, part, ("text",))
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{place}: text is {kind_of(part.get('text'))}, expected a text")
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url", "video", "audio", "input_audio"):
        shown = repr(kind)[:60] if isinstance(part, Mapping) else kind_of(part)
        raise PromptError(
            f"{place}: type is {shown}, expected text, image, image_url, video, audio or "
            f"input_audio"
        )
    if role != "user":
        what = "a sound" if kind in ("audio", "input_audio") else "an image"
        raise PromptError(f"{place}: {what} in a message of the {role}: only the user shows some")
    if kind in ("audio", "input_audio"):
        sources.append(_read_sound(place, part))
        return {"type": "audio"}
    if kind == "video":
        sources.append(_read_video(place, part))
        return {"type": "image"}
    if kind == "image_url":
        _check_keys(place, part, ("image_url",))
        source: Any = _read_url(place, part.get("image_url"))
    else:
        source = _only_source(place, part, "image", _SOURCES)
        if "base64" in part:
            source = _read_base64(place, source)
    sources.append(_local(place, source) if isinstance(source, str) else source)
    return {"type": "image"}


def _read_sound(place: str, part: Mapping[str, Any]) -> Sound | None:
    """Return the sound of a part; none where it brings none."""
    if part["type"] == "audio":
        source = _only_source(place, part, "sound", _SOUND_SOURCES)
        if source is None or isinstance(source, Sound):
            return source
        if "base64" in part:
            source = _read_base64(place, source, "a sound file")
        return Sound(_local(place, source, "sound") if isinstance(source, str) else source)
    _check_keys(place, part, ("input_audio",))
    said = part.get("input_audio")
    if not isinstance(said, Mapping) or not isinstance(said.get("data"), str) or not said["data"]:
        raise PromptError(f"{place}: input_audio has no data: expected a sound file in base64")
    unknown = [key for key in said if key not in ("data", "format")]
    form = said.get("format", _SOUND_FORMATS[0])
    if unknown or form not in _SOUND_FORMATS:
        name = repr(unknown[0])[:60] if unknown else f"format {form!r:.60}"
        raise PromptError(
            f"{place}: {name} is not known: expected data and a format of "
            f"{' or '.join(_SOUND_FORMATS)}"
        )
    return Sound(_read_base64(place, said["data"], "a sound file"))


def _read_video(place: str, part: Mapping[str, Any]) -> VideoFile | Clip:
    _check_keys(place, part, _VIDEO_SOURCES)
    given = [part[key] for key in _VIDEO_SOURCES if key in part]
    if len(given) != 1 or not isinstance(given[0], (str, PathLike, Clip)):
        told = f"expected the file of one video, under {', '.join(_VIDEO_SOURCES)}"
        raise PromptError(f"{place}: {told}, or what prepare_video() gave")
    if isinstance(given[0], Clip):
        return given[0]
    return VideoFile(_local(place, given[0], "video") if isinstance(given[0], str) else given[0])


def _only_source(place: str, part: Mapping[str, Any], what: str, names: Sequence[str]) -> Any:
    """Return the image or sound that a part brings under one of these names; none without any."""
    _check_keys(place, part, names)
    given = [part[name] for name in names if name in part]
    if len(given) > 1 or any(value is None for value in given):
        raise PromptError(f"{place}: expected one {what}, under {', '.join(names)}")
    return given[0] if given else None


def _read_url(place: str, value: Any) -> str:
    if isinstance(value, Mapping):
        detail = value.get("detail", "auto")
        unknown = [key for key in value if key not in ("url", "detail")]
        if unknown or detail != "auto":
            name = repr(unknown[0])[:60] if unknown else f"detail {detail!r:.60}"
            raise PromptError(f"{place}: {name} has no meaning here: leave it out")
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise PromptError(f"{place}: image_url has no url: expected a file or a data: URI")
    return value


def _read_base64(place: str, value: Any, what: str = "an image file") -> str:
    """Return the content of a file in base64 as a data URI."""
    if not isinstance(value, str) or not value:
        raise PromptError(f"{place}: base64 is {kind_of(value)}, expected {what} in base64")
    return value if value.startswith("data:") else f"data:;base64,{value}"


def _local(place: str, source: str, kind: str = "image") -> str:
    """Return the address of an image, video or sound as a path, or a data URI as it is."""
    scheme = source.partition(":")[0].lower() if ":" in source[:16] else ""
    if scheme in ("http", "https", "ftp"):
        raise PromptError(
            f"{place}: {source[:100]}: nothing is downloaded: save the {kind} and give its file"
        )
    if scheme == "file":
        address = urlsplit(source)
        if address.netloc not in ("", "localhost"):
            raise PromptError(f"{place}: {source[:100]}: a file of another machine: copy it first")
        from urllib.request import url2pathname  # brings http and ssl

        return url2pathname(address.path)
    return source


def _check_keys(place: str, part: Mapping[str, Any], expected: Sequence[str]) -> None:
    unknown = [key for key in part if key != "type" and key not in expected]
    if unknown:
        raise PromptError(
            f"{place}: {unknown[0]!r:.60} is not known: expected type and {', '.join(expected)}"
        )


def kind_of(value: object) -> str:
    """Return the name of a value's type, for a message."""
    return "nothing" if value is None else type(value).__name__
