"""Images that the server draws: OpenAI's form, the model's own size, one line where it cannot."""

# ruff: noqa: E402  (some packages may be missing)

from __future__ import annotations

import asyncio
import base64
import io
import time
from pathlib import Path
from typing import Any

import pytest

for _name in ("starlette", "prometheus_client", "httpx"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: pip install '.[dev]'")

import httpx
from conftest import DATA, BundleOf
from PIL import Image

from mobilevlm.runtime.server import app
from mobilevlm.runtime.server.models import Loading, Models
from mobilevlm.runtime.server.settings import Settings

PROMPT = "A small red house near a river, with a road sign."
PATH = "/v1/images/generations"


async def _asked(models: Models, *bodies: dict[str, Any]) -> list[httpx.Response]:
    transport = httpx.ASGITransport(app.make_app(Settings(), models), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        try:
            found = [await client.post(PATH, json=body) for body in bodies]
            return [*found, await client.get("/v1/models"), await client.get("/metrics")]
        finally:
            await models.close()


def asked(bundle: Path | str, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Answers of a server of one model, then its list of models and its figures."""
    models = Models({"model": Path(bundle)}, Loading(threads=1, plan="none"))
    return asyncio.run(_asked(models, *bodies))


def images_of(answer: httpx.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    stored = [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]
    return [Image.open(io.BytesIO(content)) for content in stored]


def test_images_come_as_openai_has_them(bundle_of: BundleOf) -> None:
    greedy = {"prompt": PROMPT, "size": "16x16", "guidance": 5, "temperature": 0}
    two = {"prompt": PROMPT, "n": 2, "seed": 3, "response_format": "b64_json", "quality": "auto"}
    one, several, models, figures = asked(bundle_of("janus", "fp32"), greedy, two)
    [drawn] = images_of(one)
    with Image.open(DATA / "janus" / "generated.png") as official:
        assert drawn.tobytes() == official.tobytes()
    said = one.json()
    assert (said["size"], said["output_format"]) == ("16x16", "png")
    assert said["usage"] == {"input_tokens": 24, "output_tokens": 16, "total_tokens": 40}
    assert abs(said["created"] - time.time()) < 600
    first, second = images_of(several)
    assert first.tobytes() != second.tobytes()
    assert models.json()["data"][0]["draws"] is True
    assert 'mobilevlm_drawn_images_total{model="model"} 3.0' in figures.text


def test_what_cannot_be_drawn_is_refused_in_one_line(bundle_of: BundleOf) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"size": "1024x1024"}, "size: '1024x1024': this model draws 16x16 only"),
        ({"n": 11}, "n: expected 10 at most, found 11"),
        ({"response_format": "url"}, "response_format: this server cannot do that: leave it out"),
        ({"prompt": ""}, "prompt: expected 1 characters or more"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"strange": 1}, "strange: unknown field"),
    ]
    answers = asked(bundle_of("janus", "fp32"), *({"prompt": PROMPT} | body for body, _ in wrong))
    for answer, (_, told) in zip(answers, wrong, strict=False):
        assert answer.status_code == 400
        assert told in answer.json()["error"]["message"]
    other, models, _ = asked("nano", {"prompt": PROMPT})
    assert other.status_code == 400
    assert "this model cannot draw" in other.json()["error"]["message"]
    assert models.json()["data"][0]["draws"] is False
