"""Bad clients beside good ones, limits, keys, and the end of a server."""

from __future__ import annotations

import io
import json
import signal
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import refusal
from server import ENDLESS, Server, about, data_uri, refused, running

MB = 1_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(autouse=True)
def still_well(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, a good client is answered afterwards."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        assert server.ask(messages=about(data_uri())).status_code == 200
        server.wait_for("answers_running", 0)


def png(width: int, height: int) -> bytes:
    """A PNG file whose header promises a size, with next to no content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe{}", "the body is not JSON"),
        (b'{"messages": NaN}', "NaN is no number of JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[]", "body: expected a JSON object"),
        (b"{}", "messages: missing"),
        (b'{"messages": []}', "messages: expected 1 entries or more"),
        (b'{"messages": [1]}', "messages[0]: expected an object"),
    ],
)
def test_a_body_that_is_wrong_is_refused_by_name(server: Server, body: bytes, told: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused(server.client.post("/v1/chat/completions", content=body, headers=headers), 400, told)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("temprature", 1, "temprature: unknown field"),
        ("", 1, '"": unknown field'),
        ("a\nb", 1, '"a\\nb": unknown field'),
        ("stream_options", {"\u202e": 1}, 'stream_options."\\u202e": unknown field'),
        ("temperature", "warm", "temperature: expected a number"),
        ("temperature", True, "temperature: expected a number"),
        ("max_tokens", 0, "max_tokens: expected 1 or more"),
        ("max_tokens", 1.5, "max_tokens: expected a whole number, found 1.5"),
        ("top_p", 0, "top_p: expected a number above 0, found 0"),
        ("min_p", 1.0, "min_p: expected a number below 1, found 1.0"),
        ("stop", [""], "stop[0]: expected 1 characters or more"),
        ("seed", -1, "seed: expected 0 or more"),
        ("n", 2, "n: this server cannot do that"),
        ("n", True, "n: this server cannot do that"),
        ("logit_bias", {"5": 1}, "logit_bias: this server cannot do that"),
        ("tools", [{"type": "function"}], "tools[0].function: missing"),
        ("tools", [{"type": "web_search"}], "tools[0].type: expected"),
        ("stream_options", {"include_usage": True}, "stream_options: it goes with stream"),
        ("response_format", {"type": "xml"}, "response_format.type: expected"),
        ("response_format", {"type": "json_schema"}, "response_format: a json_schema goes with"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}},
            "thing",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"minimun": 1}}},
            "'minimun' (is 'minimum' meant?) is no keyword of JSON Schema",
        ),
        ("top_logprobs", 3, "top_logprobs: it goes with logprobs: true only"),
        ("model", 3, "model: expected a string"),
    ],
)
def test_a_field_that_is_wrong_is_refused_by_name(
    server: Server, field: str, value: object, told: str
) -> None:
    error = refused(server.ask(messages=about(data_uri()), **{field: value}), 400, told)
    assert error["param"] is None or error["param"].strip('"').startswith(field.split("\n")[0])


def test_values_that_change_nothing_are_taken(server: Server) -> None:
    """As clients send them who fill in every field."""
    fields = {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": None, "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me", "stop": None,
        "store": False, "metadata": {"a": "b"}, "seed": None, "modalities": ["text"],
    }  # fmt: skip
    assert server.ask(messages=about(data_uri()), **fields).status_code == 200


def test_whole_numbers_may_have_a_point(server: Server) -> None:
    """As languages write them that have one kind of number; JSON Schema calls 2.0 an integer."""
    found = server.complete(prompt=ENDLESS, max_tokens=2.0, seed=1e3, n=1.0, logprobs=1.0)
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("file:///etc/passwd", "expected data:image/png;base64"),
        ("/etc/passwd", "8 bytes: not an image in a format"),
        ("../../secret.png", "damaged base64"),
        ("http://127.0.0.1/x.png", "this server fetches no images"),
        ("data:image/png,abc", "expected data:image/png;base64"),
        ("data:image/png;base64,", "an image without content"),
        ("data:image/png;base64,####", "damaged base64"),
        ("data:text/plain;base64,aGVsbG8=", "not an image in a format"),
        ("", "no url in it"),
    ],
)
def test_an_image_that_is_wrong_is_refused_where_it_stands(
    server: Server, url: str, told: str
) -> None:
    error = refused(server.ask(messages=about(url)), 400, told)
    assert error["param"] == "messages[0].content[0].image_url"


def test_a_file_of_the_server_is_never_read(server: Server) -> None:
    for shown in ({"type": "image", "image": "/etc/hostname"}, {"type": "image", "path": "x.png"}):
        error = refused(server.ask(messages=[{"role": "user", "content": [shown]}]), 400)
        assert "images are parts of type image_url" in error["message"]
    parts: list[dict[str, object]] = [
        {"type": "video", "video": "/etc/hostname"},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    ]
    for part in parts:
        error = refused(server.ask(messages=[{"role": "user", "content": [part]}]), 400)
        assert (
            "videos are not taken here: send frames as parts of type image_url" in error["message"]
        )


def test_an_image_bomb_is_refused_before_it_is_decoded(server: Server) -> None:
    import base64

    before = server.figure("resident_memory_bytes")
    bomb = base64.b64encode(png(60_000, 60_000)).decode()
    refused(server.ask(messages=about(bomb)), 400, "60000 × 60000 is more than")
    assert server.figure("resident_memory_bytes") < before + 50 * MB


@pytest.mark.parametrize("told", [True, False], ids=["Content-Length", "chunked"])
def test_a_body_beyond_the_limit_is_refused(server: Server, told: bool) -> None:
    before = server.figure("resident_memory_bytes")

    def parts() -> Iterator[bytes]:
        yield b'{"messages": "'
        for _ in range(100):
            yield b"a" * MB

    headers = {"Content-Type": "application/json"}
    if told:
        headers["Content-Length"] = str(100 * MB + 14)
    found = server.client.post("/v1/chat/completions", content=parts(), headers=headers)
    refused(found, 413, "larger than 20 MB")
    assert server.figure("resident_memory_bytes") < before + 60 * MB


def head(server: Server, length: int) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{server.port}",
        "Content-Type: application/json", f"Content-Length: {length}", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode()


def test_slow_bodies_hold_nobody_up(server: Server) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    try:
        for each in slow:
            each.sendall(head(server, 1000) + b"{")
        start = time.monotonic()
        assert server.ask(messages=about(data_uri())).status_code == 200
        assert time.monotonic() - start < 20
    finally:
        for each in slow:
            each.close()


def test_a_client_that_goes_away_stops_its_answer(server: Server) -> None:
    endless, before = server.endless(), server.figure("abandoned_total")
    for field in ({"stream": True}, {}):
        body = json.dumps({"prompt": endless, **field}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            request = head(server, len(body)).replace(b"chat/", b"") + body
            gone.sendall(request)
            server.wait_for("answers_running", 1)
        server.wait_for("answers_running", 0)
    assert server.figure("abandoned_total") == before + 2


def test_requests_beyond_the_queue_are_told_when_to_come_back() -> None:
    with running("--parallel", "1", "--queue", "1") as server:
        endless = server.endless()
        with ThreadPoolExecutor(12) as threads:
            found = list(threads.map(lambda _: server.complete(prompt=endless), range(12)))
        answered = [response for response in found if response.status_code == 200]
        assert len(answered) >= 2
        assert len({response.json()["choices"][0]["text"] for response in answered}) == 1
        busy = [response for response in found if response.status_code != 200]
        assert busy
        for response in busy:
            refused(response, 429, "requests wait already")
            assert 1 <= int(response.headers["Retry-After"]) <= 60


def test_answers_end_after_sigterm_and_no_new_ones_begin() -> None:
    with running() as server:
        endless = server.endless()
        whole = server.complete(prompt=endless).json()["choices"][0]["text"]
        with server.client.stream(
            "POST", "/v1/completions", json={"prompt": endless, "stream": True}
        ) as response:
            lines = response.iter_lines()
            events = [next(lines)]
            server.process.send_signal(signal.SIGTERM)
            events += list(lines)
        found = [line.removeprefix("data: ") for line in events if line]
        assert found.pop() == "[DONE]"
        assert "".join(json.loads(line)["choices"][0]["text"] for line in found) == whole
        assert server.stop() == (0, "")
        with pytest.raises(httpx.ConnectError):
            server.ask(messages=about(data_uri()))


def test_answers_that_take_longer_than_the_drain_are_stopped() -> None:
    with running("--drain", "0", "--parallel", "1") as server, ThreadPoolExecutor(8) as threads:
        endless = server.endless()
        asked = [threads.submit(server.complete, prompt=endless) for _ in range(8)]
        server.wait_for("answers_running", 1)
        start = time.monotonic()
        code, _ = server.stop()
        assert code == 0 and time.monotonic() - start < 20
        assert any(each.exception() is not None or each.result().is_error for each in asked)


def test_only_those_with_a_key_are_answered() -> None:
    with running("--api-key", "secret", "--api-key", "other") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            for path in ("/v1/models", "/metrics"):
                found = server.client.get(path, headers=headers)
                refused(found, 401, "no valid API key")
                assert found.headers["WWW-Authenticate"] == "Bearer"
        for key in ("secret", "other"):
            headers = {"Authorization": f"Bearer {key}"}
            assert server.client.get("/v1/models", headers=headers).status_code == 200
        assert server.client.get("/health").status_code == 200


def test_a_page_elsewhere_cannot_use_a_local_server(server: Server) -> None:
    """Neither by a request that browsers send without asking, nor by a name that leads here."""
    plain = {"Content-Type": "text/plain"}
    body = json.dumps({"messages": about(data_uri())})
    found = server.client.post("/v1/chat/completions", content=body, headers=plain)
    refused(found, 415, "Content-Type: application/json")
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        refused(server.client.get("/v1/models", headers={"Host": host}), 403, "Host header")
    for host in ("localhost", "[::1]:8080", "127.0.0.1:1"):
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200
    found = server.client.options("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in found.headers


def test_pages_of_an_origin_that_is_named_may_ask() -> None:
    with running("--cors", "https://good.example", "--api-key", "k") as server:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            headers = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            }
            found = server.client.options("/v1/chat/completions", headers=headers)
            assert (found.headers.get("access-control-allow-origin") == origin) is allowed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nano", "--host", "0.0.0.0"), "give --api-key KEY, or --no-auth"),
        (("nano", "--api-key", "k", "--no-auth"), "do not go together"),
        (("nano", "nano"), "another model is called 'nano': say NAME=nano"),
        (("nowhere",), "nowhere"),
        (("model.gguf",), "--mmproj FILE"),
        (("nano", "--host", "256.1.1.1", "--no-auth"), "no such address"),
        (("nano", "--max-memory", "20MB"), "of the limit 7 MB are for other models"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert told in refusal(capsys, "serve", *arguments)


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str], server: Server) -> None:
    assert f"port {server.port}: " in refusal(capsys, "serve", "nano", "--port", server.port)


def test_requests_that_are_no_http_are_answered_and_forgotten(server: Server) -> None:
    for content in (b"\x16\x03\x01\x02\x00" + bytes(100), b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 99):
        with socket.create_connection(("127.0.0.1", server.port)) as each:
            each.sendall(content)
            each.settimeout(5)
            with io.BytesIO() as answer, pytest.raises((TimeoutError, StopIteration)):
                while part := each.recv(1000):
                    answer.write(part)
                raise StopIteration
    refused(server.client.delete("/v1/models"), 405, "DELETE /v1/models")
    refused(server.client.get("/nowhere"), 404, "no such address")
