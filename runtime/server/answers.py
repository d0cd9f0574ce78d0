"""Answers as OpenAI's API has them: whole, or as events."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from mobilevlm.runtime.answer.generation import Generation
from mobilevlm.runtime.answer.logprobs import TokenLogprob
from mobilevlm.runtime.answer.tool_calls import ToolCall
from mobilevlm.runtime.server.turns import Piece

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Shape:
    """The form of one answer."""

    identity: str
    created: int
    model: str
    is_chat: bool
    include_usage: bool

    def whole(self, answer: Generation) -> dict[str, Any]:
        """Return the answer as one object."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": _finish_reason(answer)}
        choice["logprobs"] = self._logprobs(answer.logprobs)
        if self.is_chat:
            calls = [_call(call) for call in answer.tool_calls]
            content = answer.text or (None if calls else "")
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
            choice["message"] |= {"tool_calls": calls} if calls else {}
        else:
            choice["text"] = answer.text
        ending = {"usage": usage(answer), "timings": timings(answer)}
        return self._object("", [choice]) | ending

    def first(self) -> bytes:
        """Return the event before the first piece; empty for a completion."""
        if not self.is_chat:
            return b""
        return self._event(self._delta({"role": "assistant", "content": ""}))

    def piece(self, piece: Piece) -> bytes:
        """Return the event of a piece of an answer."""
        choice = self._delta(_delta(piece)) if self.is_chat else self._text(piece.text)
        choice["logprobs"] = self._logprobs(piece.logprobs or None)
        return self._event(choice)

    def last(self, answer: Generation) -> bytes:
        """Return the events after the last piece."""
        finish = _finish_reason(answer)
        choice = self._delta({}, finish) if self.is_chat else self._text("", finish)
        found = self._event(choice, {"timings": timings(answer)})
        if self.include_usage:
            found += self._event(None, {"usage": usage(answer)})
        return found + DONE

    def _logprobs(self, found: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        if self.is_chat:
            content = [{**_logprob(one), "top_logprobs": _top(one)} for one in found]
            return {"content": content, "refusal": None}
        return {
            "tokens": [one.token for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{item.token: item.logprob for item in one.top} for one in found],
        }

    def _delta(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _text(self, text: str, finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    def _event(self, choice: dict[str, Any] | None, more: dict[str, Any] | None = None) -> bytes:
        chunk = self._object(".chunk" if self.is_chat else "", [] if choice is None else [choice])
        if self.include_usage:
            chunk["usage"] = None
        return event(chunk | (more or {}))

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def new_shape(model: str, is_chat: bool, include_usage: bool) -> Shape:
    """Return the form of a new answer, with an id of its own."""
    identity = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
    return Shape(identity, int(time.time()), model, is_chat, include_usage)


def json_bytes(data: Any) -> bytes:
    """Return JSON in UTF-8, "?" for halves of characters that a client sent."""
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")


def event(data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": one.bytes}


def _top(one: TokenLogprob) -> list[dict[str, Any]]:
    return [_logprob(item) for item in one.top]


def _finish_reason(answer: Generation) -> str:
    return "tool_calls" if answer.tool_calls else answer.finish_reason


def _delta(piece: Piece) -> dict[str, Any]:
    if not piece.calls:
        return {"content": piece.text}
    first = piece.first_call
    calls = [{"index": first + n, **_call(call)} for n, call in enumerate(piece.calls)]
    return ({"content": piece.text} if piece.text else {}) | {"tool_calls": calls}


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def usage(answer: Generation) -> dict[str, Any]:
    """Return the number of tokens. Those of the prompt are positions, images expanded."""
    produced = len(answer.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": produced,
        "total_tokens": answer.prompt_tokens + produced,
        "prompt_tokens_details": {"cached_tokens": answer.reused.tokens},
    }


def timings(answer: Generation) -> dict[str, Any]:
    """Return what was measured, in seconds, without the time in the queue."""
    times = answer.timings
    return {
        "preprocess": round(times.preprocess, 6),
        "vision": round(times.vision, 6),
        "prefill": round(times.prefill, 6),
        "ttft": round(times.ttft, 6),
        "decode": round(times.decode, 6),
        "tokens_per_second": round(times.tokens_per_second, 2),
        "visual_tokens": answer.visual_tokens,
        "reused_tokens": answer.reused.tokens,
        "reused_images": answer.reused.images,
    }
