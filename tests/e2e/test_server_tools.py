"""Tools over HTTP, by OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from server import Server, refused, running
from tools import TOOLS, calling, nano_with_tools, result

pytest.importorskip("llguidance", reason="pip install '.[structured]'")
openai = pytest.importorskip("openai", reason="openai is not installed: pip install '.[dev]'")
QUESTION = {"role": "user", "content": "How many birds?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of nano, with a template that has tools."""
    bundle = nano_with_tools(tmp_path_factory.mktemp("tools") / "nano")
    with running(model=str(bundle)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.address}v1", api_key="none", max_retries=0)


def check_call(call: Any) -> None:
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name in ("count_birds", "count_boats")
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"place", "count"}


def test_a_call_is_asked_for_and_its_result_read(client: Any) -> None:
    asked = {"model": "nano", "tools": TOOLS, "max_tokens": 120}
    messages: list[Any] = [QUESTION]
    answer = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **asked
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    check_call(call)
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Two birds."}]
    told = client.chat.completions.create(messages=messages, **asked)
    assert told.choices[0].message.tool_calls is None
    assert told.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_stream_brings_whole_calls(client: Any) -> None:
    events = client.chat.completions.create(
        model="nano", messages=[QUESTION], tools=TOOLS, max_tokens=300, stream=True,
        tool_choice="required", parallel_tool_calls=True, temperature=1.5, seed=5,
    )  # fmt: skip
    found = [event.choices[0] for event in events]
    calls = [call for one in found for call in one.delta.tool_calls or []]
    assert [call.index for call in calls] == list(range(len(calls))) and calls
    for call in calls:
        check_call(call)
    assert found[-1].finish_reason == "tool_calls"


def test_an_answer_without_calls_is_text(client: Any) -> None:
    answer = client.chat.completions.create(
        model="nano", messages=[QUESTION], tools=TOOLS, max_tokens=5
    ).choices[0]
    assert answer.message.content and answer.message.tool_calls is None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, 'expected "none", "auto", "required"'),
        ({"tools": [{"type": "web_search"}]}, 'tools[0].type: expected "function"'),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name: missing"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "do not go together"),
        ({"messages": [QUESTION, calling("f", "no"), QUESTION]}, "the arguments are not JSON"),
        ({"messages": [QUESTION, result("3", "x")]}, "'x' is of no call before it"),
    ],
)
def test_tools_that_are_wrong_are_refused(
    server: Server, fields: dict[str, Any], told: str
) -> None:
    refused(server.ask(**{"messages": [QUESTION], **fields}), 400, told)


def test_a_model_without_tools_says_so() -> None:
    with running() as nano:
        refused(nano.ask(messages=[QUESTION], tools=TOOLS), 400, "no place for them")
        refused(nano.ask(messages=[QUESTION, {"role": "tool", "content": "3"}]), 400, "role tool")
        answer = nano.ask(messages=[QUESTION], tools=TOOLS, tool_choice="none", max_tokens=3)
        assert answer.status_code == 200
