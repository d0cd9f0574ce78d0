"""A conversation: what is sent in each turn, and what is kept when something goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BundleOf, fixture_named

import mobilevlm
from mobilevlm.conversation import official_ids
from mobilevlm.errors import ImageError, MobileVLMError, PromptError
from mobilevlm.prompt import Arrays, Rows, Token
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.chat import Chat

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
IMAGE = fixture_named("llava_v1").image


def asked(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every prompt from now on."""
    sent: list[list[int]] = []
    original = vlm._prompts._tokenized

    def note(text: str, images: int) -> list[Token]:
        tokens = original(text, images)
        sent.append(official_ids(tokens, vlm.spec.image.layout))
        return tokens

    monkeypatch.setattr(vlm._prompts, "_tokenized", note)
    return sent


def test_each_turn_sends_exactly_the_text_of_the_template(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, chat = asked(vlm, monkeypatch), Chat(vlm, [IMAGE])
    first = chat.ask("Who?", max_new_tokens=4).finish().text
    second = chat.ask("Why?", max_new_tokens=4).finish().text
    chat.ask("When?", max_new_tokens=4).finish()
    start = f"{SYSTEM}USER: <image>\nWho? ASSISTANT:"
    then = f"{start} {first}</s>USER: Why? ASSISTANT:"
    last = f"{then} {second}</s>USER: When? ASSISTANT:"
    monkeypatch.undo()
    assert sent == [vlm.prompt_ids(text, 1, raw=True) for text in (start, then, last)]


def test_a_turn_answers_as_a_single_question_with_the_whole_text_does(vlm: VLM) -> None:
    chat = Chat(vlm, [IMAGE])
    first = chat.ask("Who?", max_new_tokens=6).finish().text
    second = chat.ask("Why?", max_new_tokens=6).finish()
    text = f"{SYSTEM}USER: <image>\nWho? ASSISTANT: {first}</s>USER: Why? ASSISTANT:"
    assert vlm.generate(text, [IMAGE], max_new_tokens=6, raw=True).token_ids == second.token_ids


def test_images_are_encoded_once_in_a_conversation(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.clear_caches()
    vision, _ = vlm._engines()
    count, original = list[int](), vision.encode

    def counted(arrays: Arrays) -> Rows:
        count.append(1)
        return original(arrays)

    monkeypatch.setattr(vision, "encode", counted)
    chat = Chat(vlm, [IMAGE])
    for question in ("Who?", "Why?", "When?"):
        chat.ask(question, max_new_tokens=3).finish()
    assert len(count) == 1
    chat.begin([np.zeros((20, 30, 3), np.uint8)])
    chat.ask("Who?", max_new_tokens=3).finish()
    assert len(count) == 2


def test_stopping_a_stream_midway_keeps_what_was_said(vlm: VLM) -> None:
    chat = Chat(vlm, [IMAGE])
    stream = chat.ask("Who?", max_new_tokens=50, ignore_eos=True)
    said = next(stream) + next(stream)
    stream.close()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == said
    with pytest.raises(MobileVLMError, match="not finished"):
        stream.generation  # noqa: B018
    answer = chat.ask("Why?", max_new_tokens=4).finish()
    text = f"{SYSTEM}USER: <image>\nWho? ASSISTANT: {said}</s>USER: Why? ASSISTANT:"
    assert vlm.generate(text, [IMAGE], max_new_tokens=4, raw=True).token_ids == answer.token_ids


def test_a_stream_that_never_began_leaves_no_turn(vlm: VLM) -> None:
    chat = Chat(vlm)
    chat.ask("Who?").close()
    assert chat.messages == []


def test_an_image_that_fails_leaves_the_conversation_as_it_was(vlm: VLM, tmp_path: Path) -> None:
    chat = Chat(vlm, [IMAGE])
    chat.ask("Who?", max_new_tokens=3).finish()
    messages, images = list(chat.messages), list(chat.images)
    broken = tmp_path / "broken.png"
    broken.write_bytes(IMAGE.read_bytes()[:200])
    for picture in (tmp_path / "none.png", broken):
        with pytest.raises(ImageError, match=picture.name):
            chat.begin([picture])
    assert chat.messages == messages and chat.images == images
    assert chat.ask("Why?", max_new_tokens=3).finish().visual_tokens == 144


def test_a_question_that_fails_leaves_the_conversation_as_it_was(vlm: VLM) -> None:
    chat = Chat(vlm)
    chat.ask("Who?", max_new_tokens=3).finish()
    messages = list(chat.messages)
    for question in ("", "too long" + " a" * 2048, "an <image> that is not there"):
        with pytest.raises(PromptError):
            chat.ask(question).finish()
    assert chat.messages == messages
    assert chat.ask("Why?", max_new_tokens=3).finish().token_ids


def test_an_answer_that_says_image_does_not_ask_for_an_image(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Says:
        """Makes the tokens read as text of their own."""

        def __init__(self, tokenizer: object, keeps_space: bool = False) -> None:
            self.left = iter(["an <ima", "ge> mark"])

        def add(self, token: int) -> str:
            return next(self.left)

        def finish(self) -> str:
            return ""

    chat = Chat(vlm, [IMAGE])
    with monkeypatch.context() as patch:
        patch.setattr("mobilevlm.runtime.answer.generation.Detokenizer", Says)
        answer = chat.ask("Who?", max_new_tokens=2, ignore_eos=True).finish()
    assert answer.text == "an <image> mark"
    assert chat.ask("Why?", max_new_tokens=2).finish().visual_tokens == 144


def test_images_with_marks_stand_where_the_first_question_places_them(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, chat = asked(vlm, monkeypatch), Chat(vlm, [IMAGE, IMAGE])
    chat.ask("Is <image> like <image>?", max_new_tokens=2).finish()
    monkeypatch.undo()
    text = f"{SYSTEM}USER: Is <image> like <image>? ASSISTANT:"
    assert sent == [vlm.prompt_ids(text, 2, raw=True)]


def test_after_closing_a_conversation_says_so(bundle_of: BundleOf) -> None:
    vlm = mobilevlm.load(bundle_of("tiny", "fp32"))
    chat = Chat(vlm, [IMAGE])
    stream = chat.ask("Who?", max_new_tokens=50, ignore_eos=True)
    next(stream)
    vlm.close()
    for action in (stream.finish, lambda: chat.ask("Why?").finish()):
        with pytest.raises(MobileVLMError, match="closed: load it again"):
            action()


def test_further_images_are_shown_with_the_next_question(vlm: VLM) -> None:
    other = np.zeros((20, 30, 3), np.uint8)
    chat = Chat(vlm, [IMAGE])
    first = chat.ask("Who?", max_new_tokens=3).finish()
    with pytest.raises(ImageError, match=r"none.png"):
        chat.show([other, "none.png"])
    chat.show([other])
    with pytest.raises(PromptError, match="empty"):
        chat.ask("")
    second = chat.ask("Why?", max_new_tokens=3).finish()
    assert (first.visual_tokens, second.visual_tokens) == (144, 288)
    third = chat.ask("When?", max_new_tokens=3).finish()
    turns = [*chat.messages[:5]]
    again = vlm.generate(turns, [IMAGE, other], max_new_tokens=3)
    assert again.token_ids == third.token_ids
    assert [len(message["content"]) for message in turns if message["role"] == "user"] == [2, 2, 1]


def test_a_conversation_begun_again_takes_further_images_of_any_resolution(
    bundle_of: BundleOf,
) -> None:
    with mobilevlm.load(bundle_of("llava_next", "fp32")) as vlm:
        chat = Chat(vlm, [IMAGE])
        first = chat.ask("Who?", max_new_tokens=2).finish()
        chat.reset()
        assert chat.messages == []
        assert chat.ask("Who?", max_new_tokens=2).finish().token_ids == first.token_ids
        chat.reset()
        chat.show([np.zeros((20, 30, 3), np.uint8)])
        assert len(chat.images) == 2
        assert chat.ask("Who?", max_new_tokens=2).finish().visual_tokens > 0


def test_a_system_message_that_no_question_could_have_is_refused_when_it_is_set(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(vlm, system="Be brief.")
    wrong: Any = 3
    for text in ("word " * 3000, wrong):
        with pytest.raises(PromptError):
            chat.system = text
    assert chat.system == "Be brief."
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    monkeypatch.setitem(vlm.spec.conversation.__dict__, "chat_template", template)
    with pytest.raises(PromptError, match="has no place for a system message"):
        Chat(vlm, system="Be brief.")
    plain = Chat(vlm)
    with pytest.raises(PromptError, match="has no place for a system message"):
        plain.system = "Be brief."
    assert plain.ask("Who?", max_new_tokens=2).finish().token_ids
    chat.system = None
    assert chat.ask("Who?", max_new_tokens=2).finish().token_ids
