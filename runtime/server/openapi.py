"""The OpenAPI description, made of the tables that requests are checked by."""

from __future__ import annotations

from typing import Any

from mobilevlm._version import __version__
from mobilevlm.runtime.server.fields import CHAT, COMPLETION, IMAGES, body_schema
from mobilevlm.runtime.server.message_schema import MESSAGE

_TEXT: dict[str, Any] = {"type": "string"}
_WHOLE: dict[str, Any] = {"type": "integer"}
_USAGE = {
    "type": "object",
    "properties": {
        "prompt_tokens": _WHOLE,
        "completion_tokens": _WHOLE,
        "total_tokens": _WHOLE,
        "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": _WHOLE}},
    },
}
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_MESSAGE = {
    "type": "object",
    "properties": {
        "content": {"type": ["string", "null"]},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
    },
}
_EVENT = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "description": "Piece of the answer, or an error, in JSON; [DONE] in the last event.",
        }
    },
    "required": ["data"],
}
_ERRORS = {
    "400": "Something in the request is wrong; it is named",
    "401": "No valid API key",
    "403": "The Host header is not of this machine",
    "404": "No such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "429": "Too many requests wait; Retry-After says when to try again",
    "500": "Internal error",
    "503": "Not enough memory",
}


def describe() -> dict[str, Any]:
    """Return the description."""
    chat = _choice({"message": _MESSAGE})
    asked = body_schema(CHAT)
    asked["properties"]["messages"]["items"] = _ref("Message")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mobilevlm",
            "version": __version__,
            "description": "Vision-language models for clients of OpenAI's API.",
        },
        "components": {
            "schemas": {
                "ChatRequest": asked,
                "CompletionRequest": body_schema(COMPLETION),
                "ImageRequest": body_schema(IMAGES),
                "Images": _images(),
                "Message": MESSAGE,
                "ChatCompletion": _answer(chat),
                "Completion": _answer(_choice({"text": _TEXT})),
                "Model": _model(),
                "Error": _error(),
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": _post("Answer a conversation", "Chat", "ChatCompletion"),
            "/v1/completions": _post("Continue a text", "Completion", "Completion"),
            "/v1/images/generations": _post("Draw images", "Image", "Images", streams=False),
            "/v1/models": {"get": _get("List the models", _list(_ref("Model")), "401", "403")},
            "/v1/models/{model}": {
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": _TEXT}],
                "get": _get("Describe a model", _ref("Model"), "401", "403", "404"),
            },
            "/health": {"get": _get("Tell that the server is there", {"type": "object"}, "403")},
            "/metrics": {"get": _get_text("Figures for Prometheus")},
        },
    }


def _answer(choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "id": _TEXT,
            "object": _TEXT,
            "created": _WHOLE,
            "model": _TEXT,
            "choices": {"type": "array", "items": choice},
            "usage": _USAGE,
            "timings": {
                "type": "object",
                "description": "Seconds, without the time in the queue; tokens per second",
                "additionalProperties": {"type": "number"},
            },
        },
        "required": ["id", "object", "created", "model", "choices", "usage"],
    }


def _choice(content: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"index": _WHOLE, "finish_reason": _FINISH, **content}}


def _images() -> dict[str, Any]:
    image = {"type": "object", "properties": {"b64_json": _TEXT}, "required": ["b64_json"]}
    counts = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), _WHOLE)
    fields = {
        "created": _WHOLE,
        "data": {"type": "array", "items": image},
        "size": _TEXT,
        "output_format": {"enum": ["png"]},
        "usage": {"type": "object", "properties": counts},
    }
    return {"type": "object", "properties": fields, "required": list(fields)}


def _model() -> dict[str, Any]:
    fields = {"id": _TEXT, "object": {"enum": ["model"]}, "created": _WHOLE, "owned_by": _TEXT}
    draws = {"type": "boolean", "description": "It makes images (/v1/images/generations)"}
    properties = {**fields, "draws": draws}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _error() -> dict[str, Any]:
    maybe = {"type": ["string", "null"]}
    fields = {"message": _TEXT, "type": _TEXT, "param": maybe, "code": maybe}
    inner = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    fields = {"object": {"enum": ["list"]}, "data": {"type": "array", "items": items}}
    return {"type": "object", "properties": fields, "required": list(fields)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _responses(*statuses: str) -> dict[str, Any]:
    error = _json(_ref("Error"))
    return {status: {"description": _ERRORS[status], "content": error} for status in statuses}


def _get(summary: str, schema: dict[str, Any], *statuses: str) -> dict[str, Any]:
    done = {"200": {"description": "Done", "content": _json(schema)}}
    return {"summary": summary, "responses": done | _responses(*statuses)}


def _get_text(summary: str) -> dict[str, Any]:
    done = {"200": {"description": "Done", "content": {"text/plain": {"schema": _TEXT}}}}
    return {"summary": summary, "responses": done | _responses("401", "403")}


def _post(summary: str, asked: str, answered: str, streams: bool = True) -> dict[str, Any]:
    events = {"text/event-stream": {"schema": _EVENT}} if streams else {}
    done = {"200": {"description": "Done", "content": _json(_ref(answered)) | events}}
    body = {"required": True, "content": _json(_ref(f"{asked}Request"))}
    return {
        "post": {
            "summary": summary,
            "requestBody": body,
            "responses": done | _responses(*_ERRORS),
        }
    }
