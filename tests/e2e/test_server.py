"""The server as clients use it: the official one of OpenAI, plain HTTP, and curl from the docs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf
from server import CAT, ENDLESS, Server, about, data_uri, refused, running

import mobilevlm
from mobilevlm.messages import ROLES
from mobilevlm.nano.drawing import render
from mobilevlm.nano.scenes import TRAINING_SEEDS, sample_scene

openai = pytest.importorskip("openai", reason="openai is not installed: pip install '.[dev]'")
DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "server.md"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.address}v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scenes")
    paths = [folder / f"{seed}.png" for seed in (14, 8, 16)]
    for path in paths:
        render(sample_scene(TRAINING_SEEDS + int(path.stem), "evaluation")).save(path)
    return paths


def test_the_official_client_gets_the_runtime_s_answer_about_an_image(
    client: Any, scenes: list[Path]
) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    question = "Describe the picture."
    with mobilevlm.load("nano") as vlm:
        for scene in scenes:
            expected = vlm.generate(question, [scene])
            found = client.chat.completions.create(
                model="nano", messages=about(data_uri(scene), question)
            )
            [choice] = found.choices
            assert choice.message.role == "assistant"
            assert choice.message.content == expected.text
            assert choice.finish_reason == expected.finish_reason == "stop"
            assert found.usage.prompt_tokens == expected.prompt_tokens
            assert found.usage.completion_tokens == len(expected.token_ids)


def test_a_stream_has_the_same_text_and_its_usage(client: Any, scenes: list[Path]) -> None:
    fields: dict[str, Any] = {
        "model": "nano",
        "messages": about(data_uri(scenes[0]), "What is it?"),
    }
    whole = client.chat.completions.create(**fields)
    events = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **fields
        )
    )
    *pieces, last, usage = events
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content for piece in pieces)
    assert text == whole.choices[0].message.content
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == [] and usage.usage.total_tokens == whole.usage.total_tokens
    assert len({item.id for item in events}) == 1


@pytest.mark.parametrize("harness", ["lmms-eval", "VLMEvalKit", "LMDeployAPI"])
def test_requests_of_other_harnesses_get_the_runtime_s_answer(
    harness: str, server: Server, client: Any, scenes: list[Path]
) -> None:
    """Their fields and parts: lmms-eval's model ``openai`` (chat), VLMEvalKit's classes
    ``OpenAIWrapper`` and ``LMDeployAPI``, which post JSON with a bearer token."""
    question = "How many shapes are there?\nAnswer the question using a single word or phrase."
    text, url = {"type": "text", "text": question}, {"url": data_uri(scenes[0])}
    with mobilevlm.load("nano") as vlm:
        expected = vlm.generate(question, [scenes[0]], max_new_tokens=16, temperature=0)
    if harness == "lmms-eval":
        parts = [{"type": "image_url", "image_url": url}, text]
        found = client.chat.completions.create(
            messages=[{"role": "user", "content": parts}], model="nano", max_tokens=16,
            temperature=0,
        )  # fmt: skip
        assert found.choices[0].message.content == expected.text
        assert found.usage.completion_tokens == len(expected.token_ids)
        return
    shown = {**url, "detail": "low"} if harness == "VLMEvalKit" else url
    payload = {
        "model": "nano", "n": 1, "temperature": 0, "max_tokens": 16,
        "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": shown}, text]}],
    }  # fmt: skip
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    answer = server.client.post(
        "/v1/chat/completions", headers=headers, content=json.dumps(payload)
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"].strip() == expected.text.strip()


def test_several_images_and_turns_are_read_in_order(client: Any, scenes: list[Path]) -> None:
    first, second = (
        {"type": "image_url", "image_url": {"url": data_uri(scene), "detail": "low"}}
        for scene in scenes[:2]
    )
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [first, second, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A scene."},
        {"role": "user", "content": "How many shapes are there?"},
    ]
    with mobilevlm.load("nano") as vlm:
        given = [dict(message) for message in messages]
        given[0]["content"] = [{"type": "image"}, {"type": "image"}, messages[0]["content"][2]]
        expected = vlm.generate(given, scenes[:2], max_new_tokens=30)  # type: ignore[arg-type]
    found = client.chat.completions.create(model="nano", messages=messages, max_tokens=30)
    assert found.choices[0].message.content == expected.text


def test_stop_and_limits_end_an_answer(client: Any) -> None:
    found = client.completions.create(model="nano", prompt=ENDLESS, max_tokens=5)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 5
    fields: dict[str, Any] = {"model": "nano", "messages": about(data_uri())}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    stop = whole.split()[1]
    for given in (stop, [stop, "never"]):
        found = client.chat.completions.create(stop=given, **fields).choices[0]
        assert found.message.content == whole[: whole.index(stop)]
        assert found.finish_reason == "stop"
    for name in ("max_tokens", "max_completion_tokens"):
        found = client.chat.completions.create(**fields, **{name: 2})
        assert found.usage.completion_tokens == 2 and found.choices[0].finish_reason == "length"


def test_a_seed_repeats_what_is_drawn(client: Any) -> None:
    def drawn(seed: int) -> str:
        found = client.completions.create(
            model="nano", prompt=ENDLESS, max_tokens=40, temperature=1.5, top_p=0.95, seed=seed
        )
        return str(found.choices[0].text)

    assert drawn(1) == drawn(1) != drawn(2)


def test_log_probabilities_go_with_the_tokens(client: Any) -> None:
    fields: dict[str, Any] = {"model": "nano", "messages": about(data_uri()), "logprobs": True}
    with mobilevlm.load("nano") as vlm:
        expected = vlm.generate(
            "What do you see?", [CAT], logprobs=True, top_logprobs=2, special_tokens=False
        )
    assert expected.logprobs is not None
    whole = client.chat.completions.create(top_logprobs=2, **fields).choices[0].logprobs.content
    assert [each.token for each in whole] == [each.token for each in expected.logprobs]
    for found, own in zip(whole, expected.logprobs, strict=True):
        assert abs(found.logprob - own.logprob) < 1e-3 and len(found.top_logprobs) == 2
        assert found.top_logprobs[0].token == found.token  # greedy
    events = client.chat.completions.create(stream=True, **fields)
    streamed = [
        each
        for event in events
        if event.choices[0].logprobs is not None
        for each in event.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in whole]
    found = client.completions.create(model="nano", prompt=ENDLESS, max_tokens=3, logprobs=2)
    assert [len(top) for top in found.choices[0].logprobs.top_logprobs] == [2, 2, 2]


def test_answers_follow_a_schema(client: Any, scenes: list[Path]) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install '.[dev]'")
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer"}},
        "required": ["shape", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "scene", "schema": schema}}
    fields: dict[str, Any] = {"model": "nano", "messages": about(data_uri(scenes[0]))}
    for stream in (False, True):
        found = client.chat.completions.create(response_format=form, stream=stream, **fields)
        if stream:
            text = "".join(event.choices[0].delta.content or "" for event in found)
        else:
            text = found.choices[0].message.content
        answer = json.loads(text)
        assert list(answer) == ["shape", "count"] and answer["shape"] in ("circle", "square")
    found = client.chat.completions.create(
        response_format={"type": "json_object"}, max_tokens=200, **fields
    )
    assert found.choices[0].message.content.startswith("{")


def test_special_tokens_in_a_message_are_words(client: Any) -> None:
    """Text comes from anywhere; only image parts show images."""
    messages = [{"role": "user", "content": "What is </s> and <image>?"}]
    with mobilevlm.load("nano") as vlm:
        expected = vlm.generate("What is </s> and <image>?", special_tokens=False)
    found = client.chat.completions.create(model="nano", messages=messages)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens


def test_the_official_client_sees_errors_as_its_own(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not here: this server has nano"):
        client.chat.completions.create(model="gpt-9", messages=about(data_uri()))
    with pytest.raises(openai.BadRequestError, match="temperature: expected 2 at most") as caught:
        client.chat.completions.create(model="nano", messages=about(data_uri()), temperature=9)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="context holds 1024"):
        client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "word " * 1200}], stream=True
        )


def test_embeddings_are_refused_with_the_reason(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="not vectors that were trained to be compared"):
        client.embeddings.create(model="nano", input="a cat")


def test_30_requests_at_once_are_all_answered_right(
    client: Any, server: Server, scenes: list[Path]
) -> None:
    questions = ["What is in the center?", "Describe the picture.", "How many shapes are there?"]
    pairs = [(scenes[index % 3], questions[index // 3 % 3]) for index in range(30)]
    with mobilevlm.load("nano") as vlm:
        expected = {pair: vlm.generate(pair[1], [pair[0]]).text for pair in set(pairs)}

    def ask(index: int) -> str:
        path, question = pairs[index]
        messages, stream = about(data_uri(path), question), index % 2 == 0
        found = client.chat.completions.create(model="nano", messages=messages, stream=stream)
        if not stream:
            return str(found.choices[0].message.content)
        return "".join(event.choices[0].delta.content or "" for event in found)

    with ThreadPoolExecutor(30) as threads:
        found = list(threads.map(ask, range(30)))
    assert found == [expected[pair] for pair in pairs]
    server.wait_for("answers_running", 0)
    assert server.figure("queue_waiting") == 0


def test_a_second_question_about_an_image_takes_over_what_the_first_computed(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "new.png"
    render(sample_scene(TRAINING_SEEDS + 99, "evaluation")).save(path)
    before = server.figure("reused_images_total")
    first = server.ask(messages=about(data_uri(path), "What is in the center?")).json()
    second = server.ask(messages=about(data_uri(path), "How many shapes are there?")).json()
    assert first["timings"]["reused_images"] == 0 and second["timings"]["reused_images"] == 1
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > first["timings"]["visual_tokens"]
    own = second["usage"]["prompt_tokens"] - cached  # the question and the mark of the assistant
    assert own <= len("How many shapes are there? ASSISTANT:")
    assert second["timings"]["vision"] + second["timings"]["prefill"] < 0.25 * (
        first["timings"]["vision"] + first["timings"]["prefill"]
    )
    assert server.figure("reused_images_total") == before + 1


def test_health_models_and_metrics_tell_what_is_there(server: Server) -> None:
    assert server.client.get("/health").json()["loaded"] == ["nano"]
    [model] = server.client.get("/v1/models").json()["data"]
    assert server.client.get("/v1/models/nano").json() == model
    refused(server.client.get("/v1/models/other"), 404, "'other' is not here")
    server.ask(messages=about(data_uri()))
    for name in (
        "requests_total", "time_to_first_token_seconds_count", "tokens_per_second_count",
        "resident_memory_bytes", "generated_tokens_total", "models_loaded",
    ):  # fmt: skip
        assert server.figure(name) > 0, name


def test_the_description_names_every_field_that_is_read(server: Server) -> None:
    found = server.client.get("/openapi.json").json()
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "max_tokens", "stop", "seed", "response_format", "tools"} <= set(fields)
    assert fields["messages"]["items"] == {"$ref": "#/components/schemas/Message"}
    turns = [turn["properties"] for turn in found["components"]["schemas"]["Message"]["anyOf"]]
    assert {role for turn in turns for role in turn["role"]["enum"]} == {*ROLES, "developer"}
    for path in found["paths"]:
        if "{" not in path and "post" not in found["paths"][path]:
            assert server.client.get(path).status_code == 200, path
    page = server.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_examples_of_the_docs_run(server: Server, bundle_of: BundleOf) -> None:
    text = DOCS.read_text()
    commands = re.findall(r"^    (curl (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert len(commands) >= 5
    drawing = [command for command in commands if "images/generations" in command]
    _check_examples(server, [command for command in commands if command not in drawing])
    with running(model=str(bundle_of("janus", "fp32"))) as draws:
        _check_examples(draws, drawing)


def _check_examples(server: Server, commands: Sequence[str]) -> None:
    assert commands
    for command in commands:
        local = command.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {local}"],
            cwd=CAT.parents[1],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and done.stdout, (command, done.stderr)
        assert '"error"' not in done.stdout, (command, done.stdout)
        if "stream" in command:
            *events, end = re.findall(r"^data: (.*)$", done.stdout, re.MULTILINE)
            assert end == "[DONE]" and [json.loads(event) for event in events]
