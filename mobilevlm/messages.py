"""Chat messages of a person: checked, their images taken out, in the form that templates read.

Parts follow OpenAI (``image_url``) and Transformers (``image``). Nothing in a message is dropped:
what the model cannot read is an error that names its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypedDict
from urllib.parse import urlsplit

from mobilevlm.errors import PromptError
from mobilevlm.image import ImageInput
from mobilevlm.spec import IMAGE_PLACEHOLDER

ROLES = ("system", "user", "assistant")
_OTHER_ROLES = {"developer": "system"}
"""Names that OpenAI has for the same."""
_SOURCES = ("image", "path", "url", "base64")
"""Keys of an image part under which its image may be; without one it is the next of ``images``."""
_UNREAD = {
    "input_audio": "audio", "audio": "audio", "audio_url": "audio", "file": "files",
    "video": "video: give its frames as images", "video_url": "video: give its frames as images",
}  # fmt: skip


class Message(TypedDict):
    """One turn. ``content`` is text (``<image>`` marks images where they stand) or a list of
    parts: ``{"type": "text", "text": …}``, ``{"type": "image", "image": …}`` or
    ``{"type": "image_url", "image_url": {"url": …}}``."""

    role: str
    content: str | list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """Checked messages."""

    messages: list[Message]
    """Each image part is ``{"type": "image"}`` and nothing else."""
    images: list[ImageInput]
    """Of the parts and marks, in the order in which the prompt has them."""

    @property
    def characters(self) -> int:
        """Length of all texts."""
        return sum(len(text) for message in self.messages for text in _texts(message["content"]))


def read_messages(
    messages: Sequence[Message], images: Sequence[ImageInput], marks_in_text: bool = True
) -> Conversation:
    """Return the messages of a chat with all their images.

    ``images``: of image parts that bring none, in order, or of ``<image>`` in the user's texts
    (without ``marks_in_text`` those are words). Where there is neither, they go before the text of
    the user's last message.

    Raises:
        PromptError: something in them is unknown, missing, or not for these images.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"messages: expected a text or a list, found {_kind(messages)}")
    if not messages:
        raise PromptError("messages: the list is empty: give at least a user's message")
    found: list[Message] = []
    sources: list[ImageInput | None] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role, content = _read_message(place, message)
        parts: str | list[dict[str, Any]] = content
        before = len(sources)
        if not isinstance(content, str):
            parts = [
                _read_part(f"{place}.content[{index}]", part, role, sources)
                for index, part in enumerate(content)
            ]
        if role != "user":  # which templates take as a text
            parts = "".join(_texts(parts))
        marks = _marks(parts) if role == "user" and marks_in_text else 0
        if marks and len(sources) > before:
            raise PromptError(
                f"{place}: images stand as parts and as {IMAGE_PLACEHOLDER} in the text: use one "
                f"of both in a message"
            )
        sources += [None] * marks
        found.append({"role": role, "content": parts})
    if not any(message["role"] == "user" for message in found):
        raise PromptError("messages: none is the user's: there is nothing to answer")
    check_images(images)
    if images and None not in sources:
        sources = _shown_last(found, sources, len(images))
    _check_last(found)
    return Conversation(found, _placed(sources, images))


def _shown_last(
    messages: list[Message], sources: list[ImageInput | None], count: int
) -> list[ImageInput | None]:
    """Put so many image parts before what the last message, the user's, says and shows; return
    ``sources`` with them."""
    last = messages[-1]
    content = last["content"]
    if last["role"] != "user":
        return sources
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    own = sum(part["type"] == "image" for part in parts)
    messages[-1] = {"role": "user", "content": [*[{"type": "image"}] * count, *parts]}
    place = len(sources) - own
    return [*sources[:place], *[None] * count, *sources[place:]]


def with_system(system: str, messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages that begin with a system message.

    Raises:
        PromptError: ``system`` is no text, or they have one.
    """
    if not isinstance(system, str):
        raise PromptError(f"system is {_kind(system)}, expected a text")
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        return messages  # refused when they are read
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") in ("system", "developer"):
            raise PromptError("system= and a system message in the messages: give one of both")
    return [{"role": "system", "content": system}, *messages]


def _read_message(place: str, message: Any) -> tuple[str, Any]:
    """Return role and content of a message."""
    if not isinstance(message, Mapping):
        raise PromptError(f"{place}: expected role and content, found {_kind(message)}")
    known = ("role", "content")
    unknown = [key for key, value in message.items() if key not in known and not _is_empty(value)]
    if unknown:
        raise PromptError(f"{place}: {unknown[0]!r:.60} is not known: expected role and content")
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str):
        role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        raise PromptError(f"{place}: role is {role!r:.60}, expected {', '.join(ROLES)}")
    if content is None or content == []:
        raise PromptError(f"{place}: it has no content: give text, or parts of text and images")
    if not isinstance(content, (str, list, tuple)):
        raise PromptError(f"{place}: content is {_kind(content)}, expected text or a list of parts")
    return str(role), content


def _read_part(
    place: str, part: Any, role: str, sources: list[ImageInput | None]
) -> dict[str, Any]:
    """Return a part as templates read it; the image that it brings is appended to ``sources``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _UNREAD:
        raise PromptError(f"{place}: this model reads text and images, no {_UNREAD[kind]}")
    if kind == "text":
        _check_keys(place, part, ("text",))
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{place}: text is {_kind(part.get('text'))}, expected a text")
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        shown = repr(kind)[:60] if isinstance(part, Mapping) else _kind(part)
        raise PromptError(f"{place}: type is {shown}, expected text, image or image_url")
    if role != "user":
        raise PromptError(f"{place}: an image in a message of the {role}: only the user shows some")
    if kind == "image_url":
        _check_keys(place, part, ("image_url",))
        source: Any = _read_url(place, part.get("image_url"))
    else:
        _check_keys(place, part, _SOURCES)
        given = [part[key] for key in _SOURCES if key in part]
        if len(given) > 1 or None in [value if value is None else 0 for value in given]:
            raise PromptError(f"{place}: expected one image, under {', '.join(_SOURCES)}")
        source = given[0] if given else None
        if "base64" in part:
            source = _read_base64(place, source)
    sources.append(_local(place, source) if isinstance(source, str) else source)
    return {"type": "image"}


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


def _read_base64(place: str, value: Any) -> str:
    """Return the content of an image file in base64 as a data URI."""
    if not isinstance(value, str) or not value:
        raise PromptError(f"{place}: base64 is {_kind(value)}, expected an image file in base64")
    return value if value.startswith("data:") else f"data:;base64,{value}"


def _local(place: str, source: str) -> str:
    """Return an image's address as ``open_image`` takes it: a path or a data URI."""
    scheme = source.partition(":")[0].lower() if ":" in source[:16] else ""
    if scheme in ("http", "https", "ftp"):
        raise PromptError(
            f"{place}: {source[:100]}: nothing is downloaded: save the image and give its file"
        )
    if scheme == "file":
        address = urlsplit(source)
        if address.netloc not in ("", "localhost"):
            raise PromptError(f"{place}: {source[:100]}: a file of another machine: copy it first")
        from urllib.request import url2pathname  # brings http and ssl

        return url2pathname(address.path)
    return source


def check_images(images: object) -> None:
    """Raise PromptError unless ``images`` is a list of images; a single one is not."""
    single = (str, bytes, bytearray, memoryview, PathLike)
    if isinstance(images, single) or not isinstance(images, Sequence):
        raise PromptError(
            f"images: expected a list of images, found {type(images).__name__}: put a single one "
            f"into a list, leave the argument out for none"
        )


def _placed(sources: list[ImageInput | None], images: Sequence[ImageInput]) -> list[ImageInput]:
    """Return all images in the order of the prompt."""
    bare = sum(source is None for source in sources)
    if bare != len(images):
        raise PromptError(
            f"messages: they have {bare} {IMAGE_PLACEHOLDER} marks and image parts without an "
            f"image, but images= has {len(images)}: give one for each"
        )
    rest = iter(images)
    return [next(rest) if source is None else source for source in sources]


def _check_last(messages: list[Message]) -> None:
    last = messages[-1]
    if last["role"] != "user":
        raise PromptError("messages: the last one is not the user's: there is nothing to answer")
    content = last["content"]
    texts = _texts(content)
    shows = not isinstance(content, str) and any(part["type"] == "image" for part in content)
    if not shows and not "".join(texts).strip():
        raise PromptError("the prompt is empty: ask a question")


def check_continued(told: Sequence[Message], messages: Sequence[Message]) -> None:
    """Refuse messages for a session that leave out what it was ``told`` before: a session keeps
    no text, so every prompt has the whole conversation.

    Raises:
        PromptError: they do not begin with it.
    """
    if list(messages[: len(told)]) != list(told):
        raise PromptError(
            f"this session was told {len(told)} messages, which the new ones do not begin with: "
            f"give all messages from the first on, or use another session (new_session())"
        )


def _texts(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _marks(content: str | list[dict[str, Any]]) -> int:
    return sum(text.count(IMAGE_PLACEHOLDER) for text in _texts(content))


def _check_keys(place: str, part: Mapping[str, Any], expected: Sequence[str]) -> None:
    unknown = [key for key in part if key != "type" and key not in expected]
    if unknown:
        raise PromptError(
            f"{place}: {unknown[0]!r:.60} is not known: expected type and {', '.join(expected)}"
        )


def _is_empty(value: object) -> bool:
    """Return True for what clients send with an answer that has nothing of a kind: no value, or an
    empty list."""
    return value is None or value == []


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
