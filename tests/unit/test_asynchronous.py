"""Answers in an event loop, and many prompts in one call."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from conftest import fixture_named

import mobilevlm
from mobilevlm.errors import ImageError, MobileVLMError, PromptError
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.chat import Chat

IMAGE = fixture_named("llava_v1").image
ENDLESS: dict[str, Any] = {"max_new_tokens": 1500, "ignore_eos": True}


def test_an_awaited_answer_is_that_of_the_model(vlm: VLM) -> None:
    expected = vlm.generate("Who?", [IMAGE], max_new_tokens=6)

    async def asked() -> None:
        model = mobilevlm.AsyncVLM(vlm)
        stream = model.stream("Who?", [IMAGE], max_new_tokens=6)
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == expected.text
        assert stream.generation.token_ids == expected.token_ids
        both = await asyncio.gather(
            model.generate("Who?", [IMAGE], max_new_tokens=6),
            model.generate("Why?", max_new_tokens=6),
        )
        assert both[0].token_ids == expected.token_ids

    asyncio.run(asked())


def test_wrong_input_of_an_awaited_answer_is_named(vlm: VLM) -> None:
    async def asked() -> None:
        with pytest.raises(PromptError, match="the prompt is empty"):
            await mobilevlm.AsyncVLM(vlm).generate("")

    asyncio.run(asked())


@pytest.mark.parametrize("way", ["task", "cancel", "aclose"])
def test_an_awaited_answer_can_be_ended(way: str, vlm: VLM) -> None:
    async def asked() -> None:
        stream = mobilevlm.AsyncVLM(vlm).stream("Tell me", **ENDLESS)
        await anext(stream)
        if way == "task":
            task = asyncio.create_task(stream.finish())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "aclose":
            await stream.aclose()
            assert [piece async for piece in stream] == []
            return
        else:
            stream.cancel()
        answer = await stream.finish()
        assert answer.finish_reason == "cancelled" and len(answer.token_ids) < 1500

    start = time.perf_counter()
    asyncio.run(asked())
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.3])
def test_a_cancelled_answer_leaves_its_session_to_the_next_question(wait: float, vlm: VLM) -> None:
    async def asked() -> None:
        model, session = mobilevlm.AsyncVLM(vlm), vlm.new_session()
        task = asyncio.create_task(model.generate("Tell me", session=session, **ENDLESS))
        await asyncio.sleep(wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await model.generate("Who?", session=session, max_new_tokens=2)).token_ids

    asyncio.run(asked())


def test_an_answer_cancelled_twice_leaves_its_session_all_the_same(vlm: VLM) -> None:
    async def asked() -> None:
        model, session = mobilevlm.AsyncVLM(vlm), vlm.new_session()
        task = asyncio.create_task(model.generate("Tell me", session=session, **ENDLESS))
        await asyncio.sleep(0.1)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(1)
        assert (await model.generate("Who?", session=session, max_new_tokens=2)).token_ids

    asyncio.run(asked())


def test_a_batch_answers_each_prompt_as_alone(vlm: VLM) -> None:
    prompts: list[Any] = ["Who?", [{"role": "user", "content": "Why?"}], "Is it <image>?"]
    images: list[Any] = [[IMAGE], [], [IMAGE]]
    found = list(vlm.generate_batch(prompts, images, max_new_tokens=5))
    alone = [
        vlm.generate(prompt, shown, max_new_tokens=5)
        for prompt, shown in zip(prompts, images, strict=True)
    ]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]
    assert found[2].reused.images == 1
    assert list(vlm.generate_batch([])) == []


def test_a_wrong_prompt_of_a_batch_is_named_and_the_ones_before_are_answered(vlm: VLM) -> None:
    answers = vlm.generate_batch(["Who?", "Why?"], [[], ["none.png"]], max_new_tokens=2)
    assert next(answers).token_ids
    with pytest.raises(ImageError, match=r"^prompts\[1\]: none.png: no such image file"):
        next(answers)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ("Who?", None, "expected a list of prompts"),
        (3, None, "expected a list of prompts"),
        (["Who?"], [], "prompts: 1, but images= has lists for 0"),
    ],
)
def test_what_is_no_batch_is_refused(prompts: Any, images: Any, message: str, vlm: VLM) -> None:
    with pytest.raises(MobileVLMError, match=message):
        vlm.generate_batch(prompts, images)


def test_a_chat_has_a_system_message_that_may_change(vlm: VLM) -> None:
    chat = vlm.chat([IMAGE], system="Be brief.")
    assert isinstance(chat, Chat)
    whole = chat.room
    first = chat.ask("Who?", max_new_tokens=3).finish()
    expected = vlm.generate("Who?", [IMAGE], system="Be brief.", max_new_tokens=3)
    assert first.token_ids == expected.token_ids
    assert chat.room == whole - first.prompt_tokens - len(first.token_ids) + 1
    chat.system = "Be long."
    second = chat.ask("Why?", max_new_tokens=3).finish()
    turns: Any = [*chat.messages[:2], {"role": "user", "content": "Why?"}]
    changed = vlm.generate(turns, [IMAGE], system="Be long.", max_new_tokens=3)
    assert second.token_ids == changed.token_ids
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
