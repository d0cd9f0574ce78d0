"""Chat messages of a person: checked, their images and sounds taken out, in the form that templates
read.

Nothing in a message is dropped: what the model cannot read is an error that names its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypedDict

from mobilevlm.errors import PromptError
from mobilevlm.message_parts import Shown, kind_of, read_part
from mobilevlm.prompt import Clip, Sound
from mobilevlm.spec import IMAGE_PLACEHOLDER

ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {"developer": "system"}
"""Names that OpenAI has for the same."""
_OF_TOOLS = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
"""Further keys of messages by their role."""
_SHOWN = ("image", "audio")
"""Types of parts beside texts, when they are read."""


class _Turn(TypedDict):
    role: str
    content: str | list[dict[str, Any]]


class Message(_Turn, total=False):
    """One turn. ``content`` is text (``<image>`` marks images where they stand) or a list of
    parts: ``{"type": "text", "text": …}``, ``{"type": "image", "image": …}``,
    ``{"type": "image_url", "image_url": {"url": …}}``, ``{"type": "video", "video": …}``,
    ``{"type": "audio", "audio": …}`` or ``{"type": "input_audio", "input_audio": {"data": …,
    "format": "wav"}}``."""

    tool_calls: list[dict[str, Any]]
    """Calls of tools by the assistant, in OpenAI's form"""
    tool_call_id: str
    """Id of the call whose result a message of the role ``tool`` has"""
    name: str
    """Name of the tool, in a message of the role ``tool``"""


@dataclass(frozen=True)
class Conversation:
    """Checked messages."""

    messages: list[Message]
    """Each image part is ``{"type": "image"}`` and nothing else, and so is each video part; each
    part with a sound is ``{"type": "audio"}``."""
    images: list[Any]
    """:data:`Shown` of the parts and marks, in the order in which the prompt has them."""

    @property
    def characters(self) -> int:
        """Length of all texts."""
        said = (text for message in self.messages for text in _texts(message["content"]))
        calls = (str(message.get("tool_calls", "")) for message in self.messages)
        return sum(map(len, said)) + sum(map(len, calls))


def read_messages(
    messages: Sequence[Message], images: Sequence[Shown], marks_in_text: bool = True
) -> Conversation:
    """Return the messages of a chat with all their images.

    ``images``: of image parts that bring none, in order, or of ``<image>`` in the user's texts
    (without ``marks_in_text`` those are words). Where there is neither, they go before the text of
    the user's last message.

    Raises:
        PromptError: something in them is unknown, missing, or not for these images.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"messages: expected a text or a list, found {kind_of(messages)}")
    if not messages:
        raise PromptError("messages: the list is empty: give at least a user's message")
    found: list[Message] = []
    sources: list[Shown | None] = []
    calls: set[str] = set()
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role, content, more = _read_message(place, message, calls)
        parts: str | list[dict[str, Any]] = content
        before = len(sources)
        if not isinstance(content, str):
            parts = [
                read_part(f"{place}.content[{index}]", part, role, sources)
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
        found.append({"role": role, "content": parts, **more})  # type: ignore[typeddict-item]
    if not any(message["role"] == "user" for message in found):
        raise PromptError("messages: none is the user's: there is nothing to answer")
    check_images(images)
    if images and None not in sources:
        sources = _shown_last(found, sources, images)
    _check_last(found)
    return Conversation(found, _placed(sources, images))


def _shown_last(
    messages: list[Message], sources: list[Shown | None], shown: Sequence[Shown]
) -> list[Shown | None]:
    """Put a part for each of these before what the last message, the user's, says and shows; return
    ``sources`` with them."""
    last = messages[-1]
    content = last["content"]
    if last["role"] != "user":
        return sources
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    own = sum(part["type"] in _SHOWN for part in parts)
    added = [{"type": "audio" if isinstance(item, Sound) else "image"} for item in shown]
    messages[-1] = {"role": "user", "content": [*added, *parts]}
    place = len(sources) - own
    return [*sources[:place], *[None] * len(added), *sources[place:]]


def with_clips(said: Conversation, marks_in_text: bool = True) -> Conversation:
    """Return a conversation in which texts and images stand in the places of clips."""
    if not any(isinstance(source, Clip) for source in said.images):
        return said
    left = iter(said.images)
    images: list[Any] = []

    def taken() -> list[Any]:
        source = next(left)
        parts = source.parts if isinstance(source, Clip) else (source,)
        images.extend(part for part in parts if not isinstance(part, str))
        return [part if isinstance(part, str) else None for part in parts]

    def read(text: str) -> str:
        first, *others = text.split(IMAGE_PLACEHOLDER)
        shown = ("".join(part or IMAGE_PLACEHOLDER for part in taken()) for _ in others)
        return first + "".join(mark + rest for mark, rest in zip(shown, others, strict=True))

    found: list[Message] = []
    for message in said.messages:
        content = message["content"]
        if message["role"] != "user":
            found.append(message)
        elif isinstance(content, str):
            found.append({"role": "user", "content": read(content) if marks_in_text else content})
        else:
            parts: list[dict[str, Any]] = []
            for part in content:
                if part["type"] in _SHOWN:
                    parts += [
                        {"type": part["type"]} if text is None else {"type": "text", "text": text}
                        for text in taken()
                    ]
                else:
                    text = read(part["text"]) if marks_in_text else part["text"]
                    parts.append({"type": "text", "text": text})
            found.append({"role": "user", "content": parts})
    return Conversation(found, images)


def with_system(system: str, messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages that begin with a system message.

    Raises:
        PromptError: ``system`` is no text, or they have one.
    """
    if not isinstance(system, str):
        raise PromptError(f"system is {kind_of(system)}, expected a text")
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        return messages  # refused when they are read
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") in ("system", "developer"):
            raise PromptError("system= and a system message in the messages: give one of both")
    return [{"role": "system", "content": system}, *messages]


def _read_message(place: str, message: Any, calls: set[str]) -> tuple[str, Any, dict[str, Any]]:
    """Return role and content of a message, and what it has of tools; ids of calls are added to
    ``calls``."""
    if not isinstance(message, Mapping):
        raise PromptError(f"{place}: expected role and content, found {kind_of(message)}")
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str):
        role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        raise PromptError(f"{place}: role is {role!r:.60}, expected {', '.join(ROLES)}")
    known = ("role", "content", *_OF_TOOLS.get(role, ()))
    given = {key: value for key, value in message.items() if not _is_empty(value)}
    if unknown := [key for key in given if key not in known]:
        raise PromptError(f"{place}: {unknown[0]!r:.60} is not known: expected {', '.join(known)}")
    more = {key: given[key] for key in _OF_TOOLS.get(role, ()) if key in given}
    if "tool_calls" in more:
        from mobilevlm.tools import read_calls

        more["tool_calls"] = read_calls(f"{place}.tool_calls", more["tool_calls"])
        calls |= {call["id"] for call in more["tool_calls"] if "id" in call}
        content = "" if content is None or content == [] else content
    for key in ("tool_call_id", "name"):
        if not isinstance(more.get(key, ""), str):
            raise PromptError(f"{place}: {key} is {kind_of(more[key])}, expected a text")
    if more.get("tool_call_id") is not None and more["tool_call_id"] not in calls:
        told = f"tool_call_id {more['tool_call_id']!r:.80} is of no call before it"
        raise PromptError(f"{place}: {told}")
    if content is None or content == []:
        raise PromptError(f"{place}: it has no content: give text, or parts of text and images")
    if not isinstance(content, (str, list, tuple)):
        raise PromptError(
            f"{place}: content is {kind_of(content)}, expected text or a list of parts"
        )
    return str(role), content, more


def check_images(images: object) -> None:
    """Raise PromptError unless ``images`` is a list of images; a single one is not."""
    single = (str, bytes, bytearray, memoryview, PathLike)
    if isinstance(images, single) or not isinstance(images, Sequence):
        raise PromptError(
            f"images: expected a list of images, found {type(images).__name__}: put a single one "
            f"into a list, leave the argument out for none"
        )


def _placed(sources: list[Shown | None], images: Sequence[Shown]) -> list[Shown]:
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
    if last["role"] == "tool":
        return
    if last["role"] != "user":
        raise PromptError("messages: the last one is not the user's: there is nothing to answer")
    content = last["content"]
    texts = _texts(content)
    shows = not isinstance(content, str) and any(part["type"] in _SHOWN for part in content)
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


def _is_empty(value: object) -> bool:
    """Return True for what clients send with an answer that has nothing of a kind: no value, or an
    empty list."""
    return value is None or value == []
