"""The server as programs in JavaScript use it: OpenAI's npm package in Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import install_or_skip
from server import CAT, Server, data_uri, running

import mobilevlm

pytest.importorskip("llguidance", reason="pip install '.[structured]'")
PACKAGE = "openai@6"
SCRIPT = """
import OpenAI from "openai";
const [baseURL, image] = [process.argv[2], process.env.IMAGE];
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const content = [
  { type: "image_url", image_url: { url: image } },
  { type: "text", text: "What do you see?" },
];
const asked = { model: "nano", messages: [{ role: "user", content }], max_tokens: 30 };
const create = (more) => client.chat.completions.create({ ...asked, ...more });
const found = {};
found.answer = await create({});
found.pieces = [];
for await (const chunk of await create({ stream: true, stream_options: { include_usage: true } })) {
  found.pieces.push(chunk);
}
const word = found.answer.choices[0].message.content.trim().split(" ")[1];
found.word = word;
found.stopped = await create({ stop: [word] });
const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] }, count: { enum: [1, 2] } },
  required: ["colour", "count"],
  additionalProperties: false,
};
const format = { type: "json_schema", json_schema: { name: "scene", schema, strict: true } };
found.structured = await create({ response_format: format });
found.weighed = await create({ logprobs: true, top_logprobs: 2 });
const refusal = async (kind, more) => {
  try {
    await create(more);
  } catch (error) {
    return [error instanceof kind, error.status, error.param, error.message];
  }
};
found.errors = [
  await refusal(OpenAI.BadRequestError, { temperature: 9 }),
  await refusal(OpenAI.BadRequestError, { temperature: 9, stream: true }),
  await refusal(OpenAI.NotFoundError, { model: "gpt-9" }),
];
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def found(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers that the client got."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("npm is not installed: its client is not tested (apt-get install npm)")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text('{"private": true, "type": "module"}', encoding="utf-8")
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
    install_or_skip(PACKAGE, command, folder)
    (folder / "ask.js").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [node, "ask.js", f"{server.address}v1"],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env={"PATH": str(Path(node).parent), "IMAGE": data_uri()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def test_an_answer_about_an_image_is_the_runtime_s(found: dict[str, Any]) -> None:
    with mobilevlm.load("nano") as vlm:
        expected = vlm.generate("What do you see?", [CAT], max_new_tokens=30)
    [choice] = found["answer"]["choices"]
    assert choice["message"]["content"] == expected.text
    assert found["answer"]["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_a_stream_is_the_same_text(found: dict[str, Any]) -> None:
    choices = [choice for chunk in found["pieces"] for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text == found["answer"]["choices"][0]["message"]["content"]
    assert found["pieces"][-1]["usage"] == found["answer"]["usage"] | {
        "prompt_tokens_details": found["pieces"][-1]["usage"]["prompt_tokens_details"]
    }


def test_a_stop_string_ends_an_answer(found: dict[str, Any]) -> None:
    whole = found["answer"]["choices"][0]["message"]["content"]
    [choice] = found["stopped"]["choices"]
    assert choice["message"]["content"] == whole[: whole.index(found["word"])]
    assert choice["finish_reason"] == "stop"


def test_an_answer_follows_a_schema(found: dict[str, Any]) -> None:
    answer = json.loads(found["structured"]["choices"][0]["message"]["content"])
    assert answer["colour"] in ("red", "green") and answer["count"] in (1, 2)


def test_log_probabilities_go_with_the_tokens(found: dict[str, Any]) -> None:
    [choice] = found["weighed"]["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == found["weighed"]["usage"]["completion_tokens"]
    text = choice["message"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode().strip() == text
    for token in tokens:
        assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["token"] == token["token"]  # greedy


def test_errors_are_the_client_s_own(found: dict[str, Any]) -> None:
    temperature, streamed, model = found["errors"]
    assert temperature[:3] == [True, 400, "temperature"] and streamed == temperature
    assert "temperature: expected 2 at most" in temperature[3]
    assert model[:3] == [True, 404, "model"] and "this server has nano" in model[3]
