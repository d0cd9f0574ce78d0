"""Fields of a request's body: those that are read, and those of OpenAI's that change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mobilevlm.runtime.server.errors import ApiError, refuse, shown_key
from mobilevlm.runtime.server.schema import Schema, check_value
from mobilevlm.tools import MAX_TOOLS


@dataclass(frozen=True)
class Field:
    """A field of a body. ``null`` is the same as to leave it out, unless it is required."""

    schema: Schema
    required: bool = False
    alone: bool = False
    """True if only values that change nothing are taken"""


def _field(kind: str, description: str, **limits: Any) -> Field:
    return Field({"type": kind, "description": description, **limits})


def _only(kind: str = "", **limits: Any) -> Field:
    """Return a field that the server has nothing for."""
    of_kind = {"type": kind} if kind else {}
    return Field({**of_kind, **limits, "description": _ALONE}, alone=True)


MAX_MESSAGES = 1000
MAX_PARTS = 1000
"""Parts of a message"""
_MOST = 2**31 - 1
"""Tokens"""
_ALONE = "Another value is refused: the server has nothing for it."
_TAG = "For the caller's own records: it changes nothing."

SHARED: dict[str, Field] = {
    "model": _field("string", "Name of a model, as GET /v1/models lists them. It may be left out "
                    "where there is one."),
    "stream": _field("boolean", "Send the answer piece by piece, as server-sent events."),
    "stream_options": Field({
        "type": "object",
        "properties": {
            "include_usage": {"type": "boolean"},
            "include_obfuscation": {"enum": [False]},
        },
        "description": "include_usage: a last event tells the number of tokens.",
    }),
    "max_tokens": _field("integer", "Most tokens of the answer. By default as many as the context "
                         "has room for.", minimum=1, maximum=_MOST),
    "temperature": _field("number", "0, the default, always takes the likeliest token.",
                          minimum=0, maximum=2),
    "top_p": _field("number", "Draw among the likeliest tokens that together reach this "
                    "probability.", exclusiveMinimum=0, maximum=1),
    "top_k": _field("integer", "Draw among so many of the likeliest tokens; 0: among all.",
                    minimum=0, maximum=_MOST),
    "min_p": _field("number", "Least probability of a token, as a share of the likeliest one's.",
                    minimum=0, exclusiveMaximum=1),
    "repetition_penalty": _field("number", "Above 1 makes tokens of the answer less likely to come "
                                 "again.", exclusiveMinimum=0, maximum=1000),
    "seed": _field("integer", "Makes drawing repeatable.", minimum=0, maximum=2**64 - 1),
    "stop": Field({
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
        ],
        "description": "Texts that end the answer; they are no part of it.",
    }),
    "n": _only(enum=[1]),
    "frequency_penalty": _only(enum=[0]),
    "presence_penalty": _only(enum=[0]),
    "logit_bias": _only("object", properties={}),
    "user": _field("string", _TAG),
    "metadata": _field("object", _TAG),
    "safety_identifier": _field("string", _TAG),
    "prompt_cache_key": _field("string", _TAG),
    "service_tier": _only(enum=["auto", "default"]),
    "store": _only(enum=[False]),
}  # fmt: skip
"""Fields of chat completions and of completions"""

_TEXT = {"type": "string"}
_FORMAT = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "description": _TEXT,
                "schema": {"type": "object"},
                "strict": {"type": "boolean"},
            },
            "required": ["name", "schema"],
        },
    },
    "required": ["type"],
    "description": "json_schema: the answer is JSON that fulfils the schema; json_object: any JSON "
    "object. Both need the extra [structured] on the server.",
}

_TOOL = {
    "type": "object",
    "properties": {
        "type": {"enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 64},
                "description": _TEXT,
                "parameters": {"type": "object"},
                "strict": {"type": "boolean"},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_CHOSEN = {
    "type": "object",
    "properties": {
        "type": {"enum": ["function"]},
        "function": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
    },
    "required": ["type", "function"],
}

CHAT: dict[str, Field] = {
    **SHARED,
    "messages": Field(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {"type": "object"},
            "description": "Turns of the conversation: role system, user, assistant or tool, and "
            "content: text, or parts {type: text, text} and {type: image_url, image_url: {url}}. "
            "The url is a data: URI (base64); http(s) only where the server was started with "
            "--allow-urls.",
        },
        required=True,
    ),
    "max_completion_tokens": _field("integer", "The same as max_tokens.", minimum=1, maximum=_MOST),
    "logprobs": _field("boolean", "Give the log probability of each token of the answer."),
    "top_logprobs": _field(
        "integer",
        "Likeliest tokens whose log probabilities go with each; it needs logprobs: true.",
        minimum=0,
        maximum=20,
    ),
    "response_format": Field(_FORMAT),
    "tools": _field(
        "array",
        "Functions that the model may call, where its chat template has them.",
        maxItems=MAX_TOOLS,
        items=_TOOL,
    ),
    "tool_choice": Field(
        {
            "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, _CHOSEN],
            "description": "none: the tools are left out of the prompt; auto: the model decides; "
            "required, or a function: the answer is calls (needs the extra [structured] on the "
            "server).",
        }
    ),
    "functions": _only("array", maxItems=0),
    "function_call": _only(enum=["none", "auto"]),
    "parallel_tool_calls": _field("boolean", "Several calls in an answer; false: one at most."),
    "modalities": _only("array", items={"enum": ["text"]}, minItems=1, maxItems=1),
}

COMPLETION: dict[str, Field] = {
    **SHARED,
    "prompt": Field(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
            ],
            "description": "The whole prompt, special tokens included; no template around it.",
        },
        required=True,
    ),
    "suffix": _only(enum=[""]),
    "echo": _only(enum=[False]),
    "best_of": _only(enum=[1]),
    "logprobs": _field("integer", "Give the log probability of each token of the answer, and of so "
                       "many of the likeliest.", minimum=0, maximum=5),
}  # fmt: skip


IMAGES: dict[str, Field] = {
    "model": SHARED["model"],
    "prompt": Field({"type": "string", "minLength": 1, "maxLength": 32_000,
                     "description": "What the image shows."}, required=True),
    "n": _field("integer", "Images, drawn one after the other.", minimum=1, maximum=10),
    "size": _field("string", "The model's own size, as in 384x384, or auto; another one is "
                   "refused."),
    "response_format": _only(enum=["b64_json"]),
    "guidance": _field("number", "How closely images follow the prompt; 1: without guidance, in "
                       "half the time. By default the model's own scale.", minimum=0, maximum=1e6),
    "temperature": _field("number", "0 takes the likeliest code each time; 1 is the default.",
                          minimum=0, maximum=2),
    "seed": _field("integer", "Makes drawing repeatable; each further image has the next number.",
                   minimum=0, maximum=2**64 - 1),
    "quality": _only(enum=["auto", "standard"]),
    "style": _only(enum=["natural"]),
    "background": _only(enum=["auto", "opaque"]),
    "moderation": _only(enum=["auto", "low"]),
    "output_format": _only(enum=["png"]),
    "output_compression": _only(enum=[100]),
    "stream": _only(enum=[False]),
    "partial_images": _only(enum=[0]),
    "user": _field("string", _TAG),
}  # fmt: skip


def read_fields(body: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the fields of a body that have a value.

    Raises:
        ApiError: a field is unknown, missing, or has a wrong value; it is named.
    """
    if not isinstance(body, dict):
        raise refuse("body", "expected a JSON object")
    for name, value in body.items():
        if name not in fields:
            raise refuse(shown_key(name), "unknown field: leave it out (/docs lists all fields)")
        if value is not None:
            _check(name, value, fields[name])
    for name, field in fields.items():
        if field.required and body.get(name) is None:
            raise refuse(name, "missing")
    return {
        name: int(value) if fields[name].schema.get("type") == "integer" else value
        for name, value in body.items()
        if value is not None
    }


def _check(name: str, value: Any, field: Field) -> None:
    try:
        check_value(name, value, field.schema)
    except ApiError:
        if not field.alone:
            raise
        raise refuse(name, "this server cannot do that: leave it out", "unsupported") from None


def body_schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the schema of a whole body, for the OpenAPI description."""
    properties = {
        name: _closed(field.schema if field.required else _or_null(field.schema))
        for name, field in fields.items()
    }
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name, field in fields.items() if field.required],
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> dict[str, Any]:
    value = {key: item for key, item in schema.items() if key != "description"}
    kinds = [*value["anyOf"]] if "anyOf" in value else [value]
    told = {"description": schema["description"]}
    return {"anyOf": [*kinds, {"type": "null"}], **told}


def _closed(schema: Any) -> Any:
    """Return a copy of a schema that says that its objects have no other keys, as
    :func:`check_value` has it."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    more = {"additionalProperties": False} if "properties" in schema else {}
    return {key: _closed(value) for key, value in schema.items()} | more
