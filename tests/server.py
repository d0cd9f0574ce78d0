"""A running server of the built-in model, and what its tests send to it."""

from __future__ import annotations

import base64
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

for _name in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: pip install '.[dev]'")

import httpx  # noqa: E402  (one of those that may be missing)

CAT = Path(__file__).parents[1] / "examples" / "cat.jpg"
ENDLESS = "Hello"
"""A whole prompt that nano goes on with for some tokens at least."""
_ENDLESS = (ENDLESS, "user", "tell", "ASSISTANT:", "USER: hello", "USER:", "why", "queen")
"""Prompts of which nano goes on with one until its context is full; with which differs between
processors."""


class Server:
    """One process."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address
        self.client = httpx.Client(base_url=address, timeout=120)

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rpartition(":")[2])

    def ask(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=fields)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=fields)

    def endless(self) -> str:
        """Return a whole prompt that is gone on with until the context is full."""
        for prompt in _ENDLESS:
            found = self.complete(prompt=prompt, max_tokens=2000).json()
            if found["usage"]["completion_tokens"] > 900:
                return prompt
        raise AssertionError(f"nano ends all of {_ENDLESS}")

    def figure(self, name: str) -> float:
        """Sum of the figures of this name in /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        found = [line for line in lines if re.match(rf"mobilevlm_{name}(\{{.*\}})? ", line)]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def wait_for(self, name: str, value: float) -> None:
        """Waits until a figure has this value."""
        end = time.monotonic() + 30
        while self.figure(name) != value:
            assert time.monotonic() < end, (name, self.figure(name))
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ends it; its exit code and what it wrote on stderr after the first line."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@contextmanager
def running(*arguments: str, model: str = "nano") -> Iterator[Server]:
    """A server of its own."""
    program = [sys.executable, "-m", "mobilevlm", "serve", model, "--port", "0", *arguments]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.fullmatch(r"serving .* at (http://\S+) \(Ctrl-C stops\)\n", line)
            assert found is not None, line
            server = Server(process, found[1])
            with server.client:
                yield server
        finally:
            process.kill()


def data_uri(path: Path = CAT) -> str:
    kind = "jpeg" if path.suffix == ".jpg" else path.suffix.lstrip(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def about(image: str, question: str = "What do you see?") -> list[dict[str, Any]]:
    """Messages that ask about an image."""
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": parts}]


def refused(response: httpx.Response, status: int, *told: str) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's form and this status."""
    assert response.status_code == status, (response.status_code, response.text[:300])
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert "\n" not in error["message"] and len(error["message"]) < 600
    for text in told:
        assert text in error["message"], error
    return error
