"""Requests made up from the OpenAPI description: right, wrong and odd ones (schemathesis)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server import data_uri, running
from tools import nano_with_tools

_MISSING = "schemathesis is not installed: pip install '.[dev]'"
schemathesis = pytest.importorskip("schemathesis", reason=_MISSING)
hypothesis = pytest.importorskip("hypothesis", reason=_MISSING)
described = pytest.importorskip("schemathesis.specs.openapi.checks", reason=_MISSING)

REQUESTS = 12
"""Requests to each operation, of either kind."""
LONGEST = 2
"""Tokens of an answer, which may otherwise be as long as the context."""
IMAGE = data_uri()
repeatable = hypothesis.settings(
    max_examples=REQUESTS,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    bundle = nano_with_tools(tmp_path_factory.mktemp("tools") / "nano")
    with running(model=str(bundle)) as server:
        yield schemathesis.openapi.from_url(f"{server.address}openapi.json")


def make_answerable(body: Any) -> None:
    """Name the server's model where a request names another; make its answer short."""
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = "nano"
        names = [name for name in ("max_completion_tokens", "max_tokens") if name in body]
        for name in names or ["max_tokens"]:
            most = body.get(name)
            if most is None or (isinstance(most, int | float) and most > LONGEST):
                body[name] = LONGEST


def make_consistent(body: Any) -> None:
    """Give a request that is right what a description cannot say: images in base64, arguments in
    JSON, results of no other call, and a question at the end."""
    if not isinstance(body, dict) or "messages" not in body:
        return
    if not body.get("stream"):
        body.pop("stream_options", None)
    for message in body["messages"]:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = '{"count": 2}'
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else []:
            if part["type"] == "image_url":
                part["image_url"]["url"] = IMAGE
    body["messages"].append({"role": "user", "content": "What is it?"})


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_no_request_finds_a_bug_and_every_response_is_as_described(api: Any, kind: str) -> None:
    statuses: dict[str, set[int]] = {}
    for found in api.get_all_operations():
        operation = found.ok()
        if kind == "negative" and not operation.body:
            continue  # any text is a right name of a model
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(kind))

        def ask(case: Any) -> None:
            make_answerable(case.body)
            if kind == "positive":
                make_consistent(case.body)
            response = case.call(timeout=300)
            statuses.setdefault(case.operation.label, set()).add(response.status_code)
            assert response.status_code < 500, (case.body, response.text)
            case.validate_response(
                response,
                checks=[
                    described.status_code_conformance,
                    described.content_type_conformance,
                    described.response_schema_conformance,
                ],
            )

        repeatable(hypothesis.given(case=cases)(ask))()
    for label in ("POST /v1/chat/completions", "POST /v1/completions"):
        assert (200 if kind == "positive" else 400) in statuses[label]
