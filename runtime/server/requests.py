"""Bodies of requests as what the runtime is asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mobilevlm.messages import Message
from mobilevlm.runtime.answer.keywords import about_unknown, unknown_keywords
from mobilevlm.runtime.server.errors import ApiError, refuse
from mobilevlm.runtime.server.fields import CHAT, COMPLETION, read_fields
from mobilevlm.runtime.server.images import ImageRef, take_images

_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
"""Fields that are keywords of ``VLM.stream``, under their own names"""

_MOST_VALUES = 200_000
"""Values of a body: images are one each, and texts with more commas fit into no context"""


@dataclass(frozen=True)
class Asked:
    """A request for an answer."""

    model: str | None
    prompt: str | list[Message]
    """A whole prompt, or messages whose image parts bring no image"""
    images: tuple[ImageRef, ...]
    """Images of the parts, in order"""
    stream: bool
    include_usage: bool
    max_tokens: int | None
    options: dict[str, Any]
    """Keywords of ``VLM.stream``"""

    @property
    def is_chat(self) -> bool:
        """True for a chat completion, False for a completion."""
        return not isinstance(self.prompt, str)


def parse_json(content: bytes) -> Any:
    """Return the value in a body.

    Raises:
        ApiError: it is no JSON, or has so many values that reading them would hold up others.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        told = f"the body has more than {_MOST_VALUES} values (commas, [ and {{ in it)"
        raise ApiError(400, told, code="invalid_json")
    try:
        return json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:120]
        raise ApiError(400, f"the body is not JSON: {told}", code="invalid_json") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_chat(body: Any, allow_urls: bool) -> Asked:
    """Return what the body of a chat completion asks. ``allow_urls``: images may be addresses.

    Raises:
        ApiError: something in it is wrong or unknown.
    """
    found = read_fields(body, CHAT)
    both = found.get("max_completion_tokens"), found.get("max_tokens")
    if None not in both and both[0] != both[1]:
        raise refuse("max_tokens", "max_completion_tokens says another number: give one of both")
    messages, images = take_images(found["messages"], allow_urls)
    # Texts come from anywhere: special tokens in them are words.
    options = {"special_tokens": False, **_logprobs(found), **_format(found)}
    options |= {name: found[name] for name in _TOOLS if name in found}
    return _asked(found, messages, images, options, both[0] or both[1])


def read_completion(body: Any) -> Asked:
    """Return what the body of a completion asks; errors as of :func:`read_chat`."""
    found = read_fields(body, COMPLETION)
    [prompt] = [found["prompt"]] if isinstance(found["prompt"], str) else found["prompt"]
    options: dict[str, Any] = {"raw": True}
    if "logprobs" in found:
        options |= {"logprobs": True, "top_logprobs": found["logprobs"]}
    return _asked(found, prompt, (), options, found.get("max_tokens"))


def _format(found: dict[str, Any]) -> dict[str, Any]:
    """Return the form that an answer must have, as a keyword."""
    said = found.get("response_format", {"type": "text"})
    kind, given = said["type"], said.get("json_schema")
    if (kind == "json_schema") != (given is not None):
        raise refuse("response_format", "a json_schema goes with type json_schema, and needs it")
    if given is not None:
        if unknown := unknown_keywords(given["schema"]):
            raise refuse("response_format", about_unknown(unknown))
        return {"json_schema": given["schema"]}
    return {"json_schema": {"type": "object"}} if kind == "json_object" else {}


def _logprobs(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a chat completion says about log probabilities, as keywords."""
    top, wanted = found.get("top_logprobs", 0), found.get("logprobs", False)
    if top and not wanted:
        raise refuse("top_logprobs", "it goes with logprobs: true only")
    return {"logprobs": True, "top_logprobs": top} if wanted else {}


def _asked(
    found: dict[str, Any],
    prompt: str | list[Message],
    images: tuple[ImageRef, ...],
    options: dict[str, Any],
    max_tokens: int | None,
) -> Asked:
    stream, more = found.get("stream", False), found.get("stream_options")
    if more is not None and not stream:
        raise refuse("stream_options", "it goes with stream: true only")
    options |= {name: found[name] for name in _OPTIONS if name in found}
    usage = bool(more and more.get("include_usage", False))
    return Asked(found.get("model"), prompt, images, stream, usage, max_tokens, options)
