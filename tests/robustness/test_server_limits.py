"""Requests at the limits of the server, asked in this process: sizes, numbers, bugs, failures."""

# ruff: noqa: E402  (some packages may be missing)

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

for _name in ("starlette", "prometheus_client", "httpx"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: pip install '.[dev]'")

import httpx

from mobilevlm.errors import BundleError
from mobilevlm.runtime.server import app
from mobilevlm.runtime.server.models import Loading, Models
from mobilevlm.runtime.server.settings import Settings
from mobilevlm.runtime.vlm import VLM

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGA"
    "hKmMIQAAAABJRU5ErkJggg=="
)
ANSWERS = "/v1/chat/completions"


async def _sent(path: str, content: bytes | None, settings: Settings, **headers: str) -> Any:
    models = Models({"nano": Path("nano")}, Loading(threads=1, plan="none"))
    served = app.make_app(settings, models)
    transport = httpx.ASGITransport(served, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        try:
            if content is None:
                found = await client.get(path, headers=headers)
            else:
                kind = {"Content-Type": "application/json"}
                found = await client.post(path, content=content, headers={**kind, **headers})
            return found, (await client.get("/metrics")).text
        finally:
            await models.close()


def asked(body: dict[str, Any], path: str = ANSWERS) -> httpx.Response:
    """The answer to one request of a server of its own."""
    found: httpx.Response = asyncio.run(_sent(path, json.dumps(body).encode(), Settings()))[0]
    return found


def images(count: int) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": PIXEL}}] * count


def test_images_that_do_not_fit_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(VLM, "prepare_image", lambda *given: decoded.append(given))
    found = asked({"messages": [{"role": "user", "content": images(200)}]})
    assert found.status_code == 400 and "context holds 1024" in found.json()["error"]["message"]
    assert decoded == []


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{}] * 1_000_000, "the body has more than 200000 values"),
        ([{}] * 90_000, "messages: expected 1000 entries at most, found 90000"),
        (
            [{"role": "user", "content": [{"type": "text", "text": ""}] * 60_000}],
            "messages[0].content: expected 1000 parts at most, found 60000",
        ),
        ([{"role": "user", "content": images(257)}], "more than 256 images or sounds in a request"),
        (
            [{"role": "user", "content": images(200)}] * 2,
            "more than 256 images or sounds in a request",
        ),
    ],
    ids=["values", "messages", "parts", "images", "images of several messages"],
)
def test_lists_without_end_are_refused_before_their_items_are_read(
    messages: list[Any], told: str
) -> None:
    start = time.monotonic()
    found = asked({"messages": messages})
    assert found.status_code == 400 and told in found.json()["error"]["message"]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 10**400),
        ("repetition_penalty", 10**400),
        ("repetition_penalty", 1e308),
        ("repetition_penalty", 5e-324),
        ("top_p", 10**400),
        ("max_tokens", 10**400),
        ("max_completion_tokens", 2**31),
        ("top_k", 10**30),
        ("top_k", 2**31 - 1),
        ("seed", 2**64 - 1),
        ("temperature", 5e-324),
        ("min_p", 5e-324),
    ],
)
def test_no_number_of_a_client_is_a_bug_of_the_server(field: str, value: float) -> None:
    messages = [{"role": "user", "content": "What is it?"}]
    fields = {"temperature": 1, "max_tokens": 2} | {field: value}
    found = asked({"messages": messages, **fields})
    assert found.status_code in (200, 400), found.text
    if found.status_code == 400:
        assert found.json()["error"]["message"].startswith(field), found.text


def test_a_bug_is_counted_and_told_to_pages_of_other_origins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(VLM, "check_fits", broken)
    body = json.dumps({"messages": [{"role": "user", "content": "What is it?"}]}).encode()
    settings = Settings(cors=("https://good.example",))
    found, figures = asyncio.run(_sent(ANSWERS, body, settings, Origin="https://good.example"))
    assert found.status_code == 500
    assert found.json()["error"]["message"] == "internal error: the server's log tells more"
    assert found.headers["Access-Control-Allow-Origin"] == "https://good.example"
    assert f'mobilevlm_requests_total{{route="{ANSWERS}",status="500"}} 1.0' in figures
    assert 'status="499"' not in figures


def test_a_damaged_bundle_is_told_without_its_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise BundleError("/home/someone/secret/manifest.json: damaged: export it again")

    monkeypatch.setattr(VLM, "check_fits", damaged)
    found = asked({"messages": [{"role": "user", "content": "What is it?"}]})
    assert found.status_code == 500 and found.json()["error"]["code"] == "bundle_error"
    assert "secret" not in found.text and "log" in found.json()["error"]["message"]
    assert "/home/someone/secret/manifest.json: damaged" in caplog.text
