"""Answers that are cancelled, and log probabilities of their tokens."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from conftest import fixture_named, token_id

from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.chat import Chat
from mobilevlm.runtime.answer.logprobs import LEAST, LogprobReader
from mobilevlm.runtime.answer.text import Detokenizer
from mobilevlm.tokenizers.pieces import AnswerBytes

IMAGE = fixture_named("llava_v1").image


def endless(vlm: VLM) -> Any:
    return vlm.stream("Tell me", max_new_tokens=1500, ignore_eos=True)


def test_a_cancelled_stream_ends_with_what_there_is(vlm: VLM) -> None:
    stream = endless(vlm)
    said = next(stream) + next(stream)
    stream.cancel()
    answer = stream.finish()
    assert (answer.finish_reason, answer.text) == ("cancelled", said)
    assert 0 < len(answer.token_ids) < 20
    assert vlm.generate("Tell me", max_new_tokens=3, ignore_eos=True).finish_reason == "length"


def test_a_stream_that_is_cancelled_before_it_began_computes_nothing(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = endless(vlm)
    _, decoder = vlm._engines()
    monkeypatch.delattr(type(decoder), "prefill")
    stream.cancel()
    answer = stream.finish()
    assert (answer.finish_reason, answer.token_ids, answer.text) == ("cancelled", [], "")


def test_a_cancelled_stream_encodes_no_further_image(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [np.full((20, 30, 3), value, np.uint8) for value in (1, 2)]
    stream = vlm.stream("Is <image> like <image>?", images, max_new_tokens=3)
    vision, decoder = vlm._engines()
    encoded, original = list[int](), vision.encode

    def cancelling(arrays: Any) -> Any:
        encoded.append(1)
        stream.cancel()
        return original(arrays)

    with monkeypatch.context() as patch:
        patch.setattr(vision, "encode", cancelling)
        patch.delattr(type(decoder), "prefill")
        answer = stream.finish()
    assert (answer.finish_reason, answer.text, len(encoded)) == ("cancelled", "", 1)
    assert answer.prompt_tokens > 288
    again = vlm.generate("Is <image> like <image>?", images, max_new_tokens=3)
    vlm.clear_caches()
    fresh = vlm.generate("Is <image> like <image>?", images, max_new_tokens=3)
    assert again.token_ids == fresh.token_ids


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_another_thread_ends_an_answer_at_its_next_token(way: str, vlm: VLM) -> None:
    stream, begun = endless(vlm), threading.Event()
    pieces: list[str] = []

    def read() -> None:
        for piece in stream:
            pieces.append(piece)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    start = time.perf_counter()
    getattr(stream, way)()
    reader.join(20)
    assert not reader.is_alive() and time.perf_counter() - start < 5
    assert len(pieces) < 1400


def test_a_turn_that_is_cancelled_before_it_began_leaves_no_turn(vlm: VLM) -> None:
    chat = Chat(vlm)
    stream = chat.ask("Who?", max_new_tokens=50, ignore_eos=True)
    stream.cancel()
    assert stream.finish().finish_reason == "cancelled"
    assert chat.messages == []
    stream = chat.ask("Who?", max_new_tokens=50, ignore_eos=True)
    said = next(stream)
    stream.cancel()
    stream.finish()
    assert chat.messages[1] == {"role": "assistant", "content": said}


def test_log_probabilities_are_those_of_the_models_logits(vlm: VLM) -> None:
    answer = vlm.generate(
        "Who?", [IMAGE], max_new_tokens=5, ignore_eos=True, logprobs=True, top_logprobs=3
    )
    logits = vlm.prompt_logits("Who?", [IMAGE])[-1].astype(np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert answer.logprobs is not None and len(answer.logprobs) == 5
    first = answer.logprobs[0]
    assert [one.token_id for one in answer.logprobs] == answer.token_ids
    assert first.logprob == pytest.approx(expected[first.token_id], abs=1e-5)
    assert [one.token_id for one in first.top] == np.argsort(-expected)[:3].tolist()
    assert [one.logprob for one in first.top] == pytest.approx(
        np.sort(expected)[::-1][:3], abs=1e-5
    )
    assert first.top[0].token_id == first.token_id and not first.top[0].top


def test_log_probabilities_do_not_depend_on_how_a_token_is_chosen(vlm: VLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 1, "ignore_eos": True, "logprobs": True}
    drawn = vlm.generate(
        "Who?", temperature=5.0, seed=1, repetition_penalty=3.0, top_logprobs=1, **options
    ).logprobs
    greedy = vlm.generate("Who?", top_logprobs=1, **options).logprobs
    assert drawn is not None and greedy is not None
    assert drawn[0].top == greedy[0].top


def test_log_probabilities_come_with_the_pieces_and_with_drafts(vlm: VLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True, "logprobs": True}
    stream = vlm.stream("a b a b a b", **options)
    next(stream)
    assert 0 < len(stream.logprobs) < 30
    alone = stream.finish()
    drafted = vlm.generate("a b a b a b", draft_tokens=3, **options)
    assert drafted.token_ids == alone.token_ids and drafted.logprobs == alone.logprobs
    assert vlm.generate("a", max_new_tokens=2).logprobs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 5}, "logprobs is 5, expected True or False"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21, expected 0 to 20"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs is True"),
        ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
    ],
)
def test_wrong_log_probabilities_are_refused(
    options: dict[str, Any], message: str, vlm: VLM
) -> None:
    with pytest.raises(MobileVLMError, match=message):
        vlm.stream("Who?", **options)


def test_a_probability_of_zero_is_a_number(vlm: VLM) -> None:
    logits = np.array([0.0, -np.inf], np.float32)
    found = LogprobReader(vlm.tokenizer, 2)(logits, 0)
    assert (found.logprob, found.top[1].logprob) == (0.0, LEAST)


TEXT = 'It is 3 o\'clock, caf\u00e9 \u4f60\u597d \U0001f642 {"a": [1,\n2]}'


@pytest.mark.parametrize(
    "name",
    ["mobilevlm_v2", "moe_llava_qwen", "moe_llava_phi2", "smolvlm2", "internvl3", "llava_hf"],
)
def test_bytes_of_tokens_are_those_of_the_answers_text(name: str) -> None:
    tokenizer = fixture_named(name).model.tokenizer
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    table, detokenizer = AnswerBytes(tokenizer), Detokenizer(tokenizer)
    text = "".join(detokenizer.add(token) for token in ids) + detokenizer.finish()
    assert b"".join(map(table, ids)).decode().removeprefix(" ") == text == TEXT


def test_special_and_unknown_tokens_add_no_bytes() -> None:
    tokenizer = fixture_named("mobilevlm_v2").model.tokenizer
    table = AnswerBytes(tokenizer)
    end = token_id(tokenizer, "</s>")
    assert table(end) == table(10**6) == b""
    assert table.name(end) == "</s>"
