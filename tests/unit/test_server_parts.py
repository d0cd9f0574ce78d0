"""Parts of the server by themselves: bodies, models within a limit, failing streams."""

# ruff: noqa: E402  (some packages may be missing)

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

for _name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: pip install '.[dev]'")

from mobilevlm.bundle import open_bundle
from mobilevlm.errors import MobileVLMError
from mobilevlm.plan import Plan
from mobilevlm.runtime.builtin_bundle import bundle_path
from mobilevlm.runtime.loading import load
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.server import app
from mobilevlm.runtime.server import models as models_module
from mobilevlm.runtime.server.answers import new_shape
from mobilevlm.runtime.server.errors import ApiError
from mobilevlm.runtime.server.guard import Bodies
from mobilevlm.runtime.server.models import Loading, Models, named_models
from mobilevlm.runtime.server.serving import serve
from mobilevlm.runtime.server.settings import Settings
from mobilevlm.runtime.server.streams import EventStream, Job
from mobilevlm.runtime.server.turns import Piece, Turns
from mobilevlm.runtime.vlm import VLM

# Bodies.


def received(*parts: bytes, waits: bool = False) -> Callable[[], Any]:
    """A client's body, part by part."""
    left = list(parts)

    async def receive() -> dict[str, Any]:
        if waits and not left:
            await asyncio.sleep(60)
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": waits or bool(left)}

    return receive


def test_bodies_that_are_held_together_have_a_limit() -> None:
    async def read() -> None:
        bodies = Bodies(10, 15, 5.0)
        first, second = bytearray(), bytearray()
        await bodies.read({}, received(b"12345", b"67890"), first)
        assert bytes(first) == b"1234567890" and bodies.held == 10
        with pytest.raises(ApiError) as caught:
            await bodies.read({}, received(b"12345", b"6"), second)
        assert caught.value.status == 429 and caught.value.headers["Retry-After"]
        bodies.release(second)
        bodies.release(first)
        assert bodies.held == 0

    asyncio.run(read())


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    sent: list[Any] = []

    async def ask() -> None:
        served = app.make_app(Settings(), Models({"nano": Path("nano")}, Loading()))
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": headers,
            "query_string": b"", "root_path": "", "scheme": "http",
        }  # fmt: skip

        async def send(message: Any) -> None:
            sent.append(message)

        await served(scope, received(b"{", waits=True), send)

    asyncio.run(ask())
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "timeout"


# Models.


def test_models_are_named_after_their_folders_or_as_a_person_says() -> None:
    assert named_models(["a/b/", "x=c/d", "e.gguf"]) == {
        "b": Path("a/b"),
        "x": Path("c/d"),
        "e": Path("e.gguf"),
    }
    for given in (["a/b", "c/b"], ["x=a", "x=b"]):
        with pytest.raises(MobileVLMError, match="say NAME="):
            named_models(given)
    for wrong in ("=a", "x=", "="):
        with pytest.raises(MobileVLMError, match=f"{wrong}: expected NAME=BUNDLE"):
            named_models([wrong])


def one_model_limit() -> float:
    """Megabytes that hold nano, but not twice."""
    manifest = open_bundle(bundle_path(Path("nano"))).manifest
    return estimate(manifest, Plan("onnx")).peak / 1e6 + 1


@asynccontextmanager
async def two_models(max_memory_mb: float | None) -> AsyncIterator[Models]:
    paths = {"a": Path("nano"), "b": Path("nano")}
    models = Models(paths, Loading(threads=1, plan="none", max_memory_mb=max_memory_mb))
    yield models
    await models.close()
    assert models.loaded == {}


def test_models_stay_loaded_where_there_is_room() -> None:
    async def use() -> None:
        async with two_models(None) as models:
            for name in ("a", "b"):
                async with models.use(name) as vlm:
                    assert models.loaded[name] is vlm
            assert set(models.loaded) == {"a", "b"}

    asyncio.run(use())


def test_a_model_is_closed_for_another_one_when_nobody_uses_it() -> None:
    async def use() -> None:
        order: list[str] = []
        ends = asyncio.Event()

        async def ask(models: Models, name: str) -> None:
            async with models.use(name) as vlm:
                order.append(name)
                await ends.wait()
                assert models.loaded == {name: vlm}

        async def until(is_so: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not is_so():
                    await asyncio.sleep(0.01)

        async with two_models(one_model_limit()) as models, asyncio.TaskGroup() as tasks:
            tasks.create_task(ask(models, "a"))
            await until(lambda: order == ["a"])
            tasks.create_task(ask(models, "b"))
            await until(lambda: models._is_waiting)
            tasks.create_task(ask(models, "a"))  # behind b, or b might never come
            await asyncio.sleep(0.05)
            ends.set()
        assert order == ["a", "b", "a"]

    asyncio.run(use())


def test_a_model_whose_client_goes_away_while_it_is_loaded_is_loaded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[Path] = []
    goes_on = threading.Event()

    def slow_load(path: Path, **keywords: Any) -> VLM:
        begun.append(path)
        goes_on.wait(30)
        return load(path, **keywords)

    monkeypatch.setattr(models_module, "load", slow_load)

    async def ask(models: Models) -> VLM:
        async with models.use("a") as vlm:
            return vlm

    async def use() -> None:
        async with two_models(None) as models:
            for _ in range(3):
                gone = asyncio.create_task(ask(models))
                async with asyncio.timeout(30):
                    while not begun:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
                gone.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await gone
            goes_on.set()
            assert await ask(models) is models.loaded["a"]
            assert len(begun) == 1

    asyncio.run(use())


def test_a_model_that_was_loaded_for_nobody_counts_and_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    loaded: list[VLM] = []
    closed: list[VLM] = []
    close = VLM.close

    def slow_load(path: Path, **keywords: Any) -> VLM:
        begun.set()
        goes_on.wait(30)
        loaded.append(load(path, **keywords))
        return loaded[-1]

    def noted_close(vlm: VLM) -> None:
        closed.append(vlm)
        close(vlm)

    monkeypatch.setattr(models_module, "load", slow_load)
    monkeypatch.setattr(VLM, "close", noted_close)

    async def ask(models: Models) -> None:
        async with models.use("a"):
            pass

    async def use() -> None:
        async with two_models(one_model_limit()) as models:
            gone = asyncio.create_task(ask(models))
            await asyncio.to_thread(begun.wait, 30)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            goes_on.set()
            async with models.use("b") as vlm:  # no room beside "a"
                assert models.loaded == {"b": vlm}
                assert closed == loaded[:1]
        assert closed == loaded

    asyncio.run(use())


def test_a_model_that_is_being_closed_keeps_its_memory_when_the_client_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    begun, goes_on = threading.Event(), threading.Event()
    close = VLM.close

    def noted_load(path: Path, **keywords: Any) -> VLM:
        order.append("load")
        return load(path, **keywords)

    def slow_close(vlm: VLM) -> None:
        begun.set()
        goes_on.wait(30)
        close(vlm)
        order.append("closed")

    monkeypatch.setattr(models_module, "load", noted_load)
    monkeypatch.setattr(VLM, "close", slow_close)

    async def ask(models: Models, name: str) -> None:
        async with models.use(name):
            pass

    async def use() -> None:
        async with two_models(one_model_limit()) as models:
            await ask(models, "a")
            gone = asyncio.create_task(ask(models, "b"))
            await asyncio.to_thread(begun.wait, 30)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            again = asyncio.create_task(ask(models, "b"))
            await asyncio.sleep(0.3)
            assert order == ["load"]
            goes_on.set()
            await again
            assert order == ["load", "closed", "load"]

    asyncio.run(use())


def test_a_model_is_held_while_a_prompt_is_read_though_the_client_goes_away() -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def begin() -> Any:
        begun.set()
        goes_on.wait(30)

    async def answer() -> None:
        turns = Turns(1, 1)
        gone = asyncio.create_task(turns.answer(begin, lambda _: None))
        waits = asyncio.create_task(turns.answer(begin, lambda _: None))
        await asyncio.to_thread(begun.wait, 30)
        gone.cancel()
        waits.cancel()
        await asyncio.sleep(0.1)
        assert not gone.done() and waits.done()  # the second one had not begun
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await gone
        turns.close()

    asyncio.run(answer())


def test_sigterm_while_a_model_is_loaded_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_and_stop(path: Path, **keywords: Any) -> VLM:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(path, **keywords)

    def ready(_: str) -> None:
        raise AssertionError("the server began to serve")

    monkeypatch.setattr(models_module, "load", load_and_stop)
    models = Models({"nano": Path("nano")}, Loading(threads=1, plan="none"))
    before = signal.getsignal(signal.SIGTERM)
    serve(Settings(port=0), models, ready)
    assert models.loaded == {} and signal.getsignal(signal.SIGTERM) is before


def test_a_model_larger_than_the_limit_is_refused() -> None:
    async def use() -> None:
        async with two_models(30) as models, models.use("a"):
            pass

    with pytest.raises(MobileVLMError, match="the limit is 30 MB"):
        asyncio.run(use())


# Streams.


@pytest.mark.parametrize(
    ("error", "told"),
    [(MobileVLMError("the model was replaced"), "the model was replaced"),
     (ZeroDivisionError("x"), "internal error")],
)  # fmt: skip
def test_what_goes_wrong_in_a_stream_is_its_last_event(error: Exception, told: str) -> None:
    sent: list[bytes] = []

    async def work(give: Callable[[Piece], None]) -> Any:
        give(Piece("One"))
        await asyncio.sleep(0)
        raise error

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def stream() -> None:
        job = Job(work, received(waits=True))
        first = await job.piece()
        await EventStream(job, new_shape("m", True, False), first)({}, received(waits=True), send)

    if isinstance(error, MobileVLMError):
        asyncio.run(stream())
    else:  # a bug of ours is in the log too
        with pytest.raises(ZeroDivisionError):
            asyncio.run(stream())
    *_, piece, last = sent
    assert b'"content": "One"' in piece
    assert told in json.loads(last.removeprefix(b"data: "))["error"]["message"]
    assert not any(b"[DONE]" in body for body in sent)
