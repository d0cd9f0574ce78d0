"""Errors in the form that clients of OpenAI's API read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mobilevlm.console.terminal import plain
from mobilevlm.errors import BundleError, MemoryLimitError, MobileVLMError

_log = logging.getLogger(__name__)
_WORD = re.compile(r"[\w.$-]+")
BUSY_TYPE, SERVER_TYPE = "rate_limit_error", "server_error"


@dataclass
class ApiError(Exception):
    """A request that is answered with an error."""

    status: int
    """HTTP status"""
    message: str
    """One line: what is wrong, where, what to do"""
    param: str | None = None
    """The field that is wrong"""
    code: str | None = None
    """A name for programs"""
    kind: str = "invalid_request_error"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        said = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": said}


def refuse(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the error of a field with a wrong value."""
    return ApiError(400, f"{param}: {message}", param, code)


def shown_key(name: str) -> str:
    """Return a key of a body as messages show it: as JSON unless it is letters and digits."""
    return f"{name:.60}" if _WORD.fullmatch(name) else json.dumps(name[:60])


def api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error on the way to its answer. Those of a person's making
    say what to do; what is wrong with a bundle (and where it lies) is in the server's log, as the
    traceback of any other error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryLimitError | MemoryError):
        told = str(error) or "not enough memory for this request"
        return ApiError(503, plain(told), code="memory_limit", kind=SERVER_TYPE)
    if isinstance(error, BundleError):
        _log.error("%s", plain(error))
        told = "the model's bundle cannot be used: the server's log tells more"
        return ApiError(500, told, code="bundle_error", kind=SERVER_TYPE)
    if isinstance(error, MobileVLMError):
        return ApiError(400, plain(error))
    return ApiError(500, "internal error: the server's log tells more", kind=SERVER_TYPE)
