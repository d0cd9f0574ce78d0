"""Schemas of messages for the OpenAPI description: what :func:`mobilevlm.messages.read_messages`
and :func:`mobilevlm.runtime.server.images.take_images` read."""

from __future__ import annotations

from typing import Any

from mobilevlm.runtime.server.fields import MAX_PARTS
from mobilevlm.tools import MAX_CALLS

_TEXT = {"type": "string"}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def _content(*parts: dict[str, Any]) -> dict[str, Any]:
    """Return text, or a list of such parts."""
    items = {"anyOf": list(parts)} if len(parts) > 1 else parts[0]
    of_parts = {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_PARTS}
    return {"anyOf": [_TEXT, of_parts]}


_TEXT_PART = _object({"type": {"enum": ["text"]}, "text": _TEXT})
_URL = {
    "type": "string",
    "minLength": 1,
    "description": "A data: URI (base64), or base64 alone; http(s) only where the server was "
    "started with --allow-urls.",
}
_DETAIL = {
    "enum": ["auto", "low", "high"],
    "description": "low: in one tile, by models that split images.",
}
_IMAGE_PART = _object(
    {"type": {"enum": ["image_url"]}, "image_url": _object({"url": _URL}, detail=_DETAIL)}
)
_SOUND_PART = _object(
    {
        "type": {"enum": ["input_audio"]},
        "input_audio": _object(
            {
                "data": {"type": "string", "minLength": 1, "description": "A file in base64."},
                "format": {"enum": ["wav", "mp3"]},
            }
        ),
    }
)
_SAID = _content(_TEXT_PART)
_NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"}
_CALL = _object(
    {
        "function": _object(
            {"name": _NAME},
            arguments={"type": "string", "description": "A JSON object, as text."},
        ),
    },
    id=_TEXT,
    type={"enum": ["function"]},
)
_CALLS = {"type": "array", "items": _CALL, "minItems": 1, "maxItems": MAX_CALLS}

MESSAGE: dict[str, Any] = {
    "anyOf": [
        _object(
            {"role": {"enum": ["user"]}, "content": _content(_TEXT_PART, _IMAGE_PART, _SOUND_PART)}
        ),
        _object({"role": {"enum": ["system", "developer"]}, "content": _SAID}),
        _object({"role": {"enum": ["assistant"]}, "content": _SAID}),
        _object(
            {"role": {"enum": ["assistant"]}, "tool_calls": _CALLS},
            content={"anyOf": [*_SAID["anyOf"], {"type": "null"}]},
        ),
        _object({"role": {"enum": ["tool"]}, "content": _SAID}, tool_call_id=_TEXT, name=_TEXT),
    ]
}
"""Turn of a conversation"""
