"""The loaded model: its inputs, several threads, streams, closing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import BundleOf, fixture_named
from PIL import Image

import mobilevlm
from mobilevlm.errors import MobileVLMError
from mobilevlm.image import ImageInput
from mobilevlm.preparation import prepare
from mobilevlm.runtime import VLM, Generation
from mobilevlm.runtime.answer.chat import Chat
from mobilevlm.runtime.sequence import prompts

IMAGE = fixture_named("llava_v1").image
QUESTIONS = [
    ("What is it?", 1),
    ("Who are they, and where?", 0),
    ("Is <image> like <image>?", 2),
    ("Describe the colours of the picture in a few words.", 1),
]


def ask(vlm: VLM, question: str, count: int) -> Generation:
    return vlm.generate(question, [IMAGE] * count, max_new_tokens=30, ignore_eos=True)


def test_four_threads_answer_as_one_after_another(vlm: VLM) -> None:
    alone = [ask(vlm, *question).token_ids for question in QUESTIONS]
    assert len({tuple(ids) for ids in alone}) == len(QUESTIONS)
    together = threading.Barrier(len(QUESTIONS))

    def run(question: tuple[str, int]) -> list[list[int]]:
        together.wait()
        return [ask(vlm, *question).token_ids for _ in range(5)]

    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        for expected, answers in zip(alone, threads.map(run, QUESTIONS), strict=True):
            assert answers == [expected] * 5


def test_a_picture_is_the_same_from_a_path_bytes_pillow_and_an_array(vlm: VLM) -> None:
    expected = vlm.encode_image(IMAGE)
    with Image.open(IMAGE) as opened:
        opened.load()
        forms: list[Any] = [str(IMAGE), IMAGE.read_bytes(), opened, np.asarray(opened)]
        for form in forms:
            assert np.array_equal(vlm.encode_image(form), expected), type(form)
    assert vlm.generate("a", [IMAGE], max_new_tokens=5).token_ids == (
        vlm.generate("a", [IMAGE.read_bytes()], max_new_tokens=5).token_ids
    )


@pytest.mark.parametrize(
    "single",
    [
        str(IMAGE),
        IMAGE,
        IMAGE.read_bytes(),
        np.zeros((4, 4, 3), np.uint8),
        Image.new("RGB", (4, 4)),
        None,
        iter([IMAGE]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_of_images_is_refused(single: Any, vlm: VLM) -> None:
    with pytest.raises(MobileVLMError, match="images: expected a list of images, found "):
        vlm.stream("What is it?", single)


def test_a_stream_not_read_to_its_end_has_no_generation(vlm: VLM) -> None:
    stream = vlm.stream("What is it?", max_new_tokens=20, ignore_eos=True)
    first = next(stream)
    with pytest.raises(MobileVLMError, match="read the stream to its end first"):
        stream.generation  # noqa: B018
    answer = stream.finish()
    assert stream.generation is answer
    assert answer.text.startswith(first) and len(answer.token_ids) == 20
    assert list(stream) == []


def test_a_closed_stream_gives_nothing_more_and_the_next_one_is_not_disturbed(vlm: VLM) -> None:
    expected = ask(vlm, *QUESTIONS[1]).token_ids
    stream = vlm.stream("What is it?", max_new_tokens=20, ignore_eos=True)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert ask(vlm, *QUESTIONS[1]).token_ids == expected


def test_sampling_with_a_seed_is_repeatable_and_greedy_is_the_default(vlm: VLM) -> None:
    def drawn(**options: Any) -> list[int]:
        answer = vlm.generate("Tell me", max_new_tokens=20, ignore_eos=True, **options)
        return answer.token_ids

    assert drawn(temperature=1.0, seed=3) == drawn(temperature=1.0, seed=3)
    assert drawn(temperature=1.0, seed=3) != drawn(temperature=1.0, seed=4)
    assert drawn() == drawn(temperature=0.0, seed=4) == drawn(temperature=1.0, top_k=1)


def test_an_answer_ends_at_a_stop_string_and_at_the_end_token(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = vlm.generate("Tell me", max_new_tokens=40, ignore_eos=True)
    middle = whole.text[20:24]
    stopped = vlm.generate("Tell me", max_new_tokens=40, stop=[middle])
    assert stopped.text == whole.text[: whole.text.index(middle)]
    assert stopped.finish_reason == "stop"
    token = whole.token_ids[10]
    # The random model never says </s> by itself: another token stands in for it.
    conversation = vlm.spec.conversation
    with monkeypatch.context() as patch:
        patch.setitem(conversation.__dict__, "eos_token_ids", (token,))
        ended = vlm.generate("Tell me", max_new_tokens=40)
        ignored = vlm.generate("Tell me", max_new_tokens=40, ignore_eos=True)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token)]
    assert ignored.token_ids == whole.token_ids


def test_timings_add_up(vlm: VLM) -> None:
    answer = ask(vlm, *QUESTIONS[0])
    times = answer.timings
    assert times.ttft == times.preprocess + times.vision + times.prefill
    assert min(times.load, times.preprocess, times.vision, times.prefill, times.decode) > 0
    assert len(answer.token_seconds) == len(answer.token_ids) - 1
    assert times.decode == pytest.approx(sum(answer.token_seconds))
    assert times.tokens_per_second == pytest.approx(len(answer.token_seconds) / times.decode)


def test_seconds_of_each_stage_are_counted_where_they_pass(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only the stages move: preparing an image takes 1 s, encoding it 10 s, the
    prompt 100 s and each further token 1000 s."""
    now = 0.0

    def taking(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*arguments, **named)

        return timed

    vlm.clear_caches()
    vision, decoder = vlm._engines()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(prompts, "prepare", taking(1, prepare))
    monkeypatch.setattr(vision, "encode", taking(10, vision.encode))
    monkeypatch.setattr(decoder, "prefill", taking(100, decoder.prefill))
    monkeypatch.setattr(decoder, "step", taking(1000, decoder.step))
    images: list[ImageInput] = [IMAGE, np.zeros((20, 30, 3), np.uint8)]
    question = "Is <image> like <image>?"
    times = vlm.generate(question, images, max_new_tokens=4, ignore_eos=True).timings
    assert (times.preprocess, times.vision, times.prefill, times.decode) == (2, 20, 100, 3000)
    assert times.ttft == 122 and times.tokens_per_second == pytest.approx(1e-3)


def test_messages_may_be_given_in_place_of_a_question(vlm: VLM) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert vlm.prompt_ids([{"role": "user", "content": parts}], 1) == (
        vlm.prompt_ids("What is it?", 1)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "\udcff"}, "not text: give it in UTF-8"),
        ({"prompt": "\udcff", "raw": True}, "not text: give it in UTF-8"),
        ({"prompt": "<image>"}, "has 1 <image> mark, but no image was given"),
        ({"prompt": "<image>", "raw": True}, "has 1 <image> mark, but no image was given"),
        ({"images": [b""]}, "not an image"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_before_any_work(
    options: dict[str, Any], message: str, vlm: VLM
) -> None:
    with pytest.raises(MobileVLMError, match=message):
        vlm.stream(**{"prompt": "Who?", **options})


@pytest.mark.parametrize("ask", ["stream", "generate", "chat"])
def test_a_keyword_that_is_no_option_is_named(ask: str, vlm: VLM) -> None:
    call: Any = Chat(vlm).ask if ask == "chat" else getattr(vlm, ask)
    with pytest.raises(
        TypeError, match=r"'temprature': expected audio, draft_tokens, .*, temperature, t"
    ):
        call("Hi", temprature=1.0)


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match="engine 'gpu' is not known: expected auto, onnx"):
        mobilevlm.load(tmp_path, engine="gpu")


def test_closing_frees_weights_and_buffers_and_later_use_says_so(bundle_of: BundleOf) -> None:
    vlm = mobilevlm.load(bundle_of("tiny", "fp32"))
    ask(vlm, *QUESTIONS[0])
    vision, decoder = cast(tuple[Any, Any], vlm._engines())
    [session] = vlm._idle
    held: dict[str, Any] = {
        "vision weights": vision._stage._sessions,
        "decoder weights": decoder._stage._sessions.answers,
        "embedding table": decoder._table,
        "KV buffers": session._state,
    }
    watched = {name: weakref.ref(part) for name, part in held.items()}
    assert all(reference() is not None for reference in watched.values())
    del held, session
    vlm.close()
    gc.collect()
    assert [name for name, reference in watched.items() if reference() is not None] == []
    for action in (
        lambda: vlm.generate("Who?"),
        lambda: vlm.stream("Who?"),
        lambda: vlm.encode_image(IMAGE),
        lambda: vlm.prompt_logits("Who?"),
        vlm.new_session,
    ):
        with pytest.raises(MobileVLMError, match="this model was closed: load it again"):
            action()
    vlm.close()  # twice is no error


def test_leaving_the_block_closes(bundle_of: BundleOf) -> None:
    with mobilevlm.load(bundle_of("tiny", "fp32")) as vlm:
        pass
    with pytest.raises(MobileVLMError, match="closed"):
        vlm.encode_image(IMAGE)
