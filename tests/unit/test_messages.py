"""Chat messages: what is in them is read, or named in one line; nothing is dropped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fixture_named

from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.messages import read_messages
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.chat import Chat

IMAGE = fixture_named("llava_v1").image
OTHER = np.zeros((20, 30, 3), np.uint8)


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": IMAGE},
        {"type": "image", "image": str(IMAGE)},
        {"type": "image", "path": str(IMAGE)},
        {"type": "image", "url": IMAGE.as_uri()},
        {"type": "image", "image": IMAGE.read_bytes()},
        {"type": "image", "base64": base64.b64encode(IMAGE.read_bytes()).decode()},
        {"type": "image_url", "image_url": {"url": str(IMAGE)}},
        {"type": "image_url", "image_url": {"url": IMAGE.as_uri(), "detail": "auto"}},
        {"type": "image_url", "image_url": IMAGE.as_uri().replace("file:///", "file://localhost/")},
    ],
    ids=lambda part: str(part)[:50],
)
def test_an_image_in_a_part_is_seen(part: dict[str, Any], vlm: VLM) -> None:
    expected = vlm.generate("Who?", [IMAGE], max_new_tokens=4)
    found = vlm.generate(user(part, text("Who?")), max_new_tokens=4)
    assert (found.token_ids, found.visual_tokens) == (expected.token_ids, 144)


def test_images_fill_the_parts_that_bring_none_in_order() -> None:
    parts = [{"type": "image"}, {"type": "image", "image": "b"}, {"type": "image"}, text("?")]
    assert read_messages(user(*parts), ["a", "c"]).images == ["a", "b", "c"]
    marked: list[Any] = [{"role": "user", "content": "Is <image> like <image>?"}]
    assert read_messages(marked, ["a", "b"]).images == ["a", "b"]
    answered = [*marked, {"role": "assistant", "content": "No."}]
    both = read_messages([*answered, *user(*parts)], ["d", "e", "a", "c"])
    assert both.images == ["d", "e", "a", "b", "c"]


def test_images_without_a_place_go_before_the_text_of_the_last_message() -> None:
    first = [*user({"type": "image", "image": "a"}, text("Who?"))]
    turns: list[Any] = [*first, {"role": "assistant", "content": "He."}]
    last: list[Any] = [{"role": "user", "content": "Why?"}]
    found = read_messages([*turns, *last], ["b", "c"])
    assert found.images == ["a", "b", "c"]
    assert found.messages[-1:] == user({"type": "image"}, {"type": "image"}, text("Why?"))
    also = read_messages([*turns, *user({"type": "image", "image": "d"}, text("Why?"))], ["b"])
    assert also.images == ["a", "b", "d"]
    assert also.messages[-1:] == user({"type": "image"}, {"type": "image"}, text("Why?"))


def test_images_given_beside_messages_are_seen_as_those_of_a_question(vlm: VLM) -> None:
    messages: Any = [{"role": "user", "content": "Who?"}]
    assert vlm.prompt_ids(messages, 1) == vlm.prompt_ids("Who?", 1)


def test_a_system_message_is_the_same_as_text_as_parts_and_as_an_option(vlm: VLM) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *user(text("Who?"))]
    ids = vlm.prompt_ids(messages)
    assert "Be brief." in vlm.tokenizer.decode(ids)
    parts = [{"role": "system", "content": [text("Be "), text("brief.")]}, *user(text("Who?"))]
    developer = [{"role": "developer", "content": "Be brief."}, *user(text("Who?"))]
    assert vlm.prompt_ids(parts) == vlm.prompt_ids(developer) == ids
    assert vlm.prompt_ids("Who?", system="Be brief.") == ids
    expected = vlm.generate(messages, max_new_tokens=3).token_ids
    assert vlm.generate("Who?", system="Be brief.", max_new_tokens=3).token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("Who?", {"system": 3}, "system is int, expected a text"),
        ("Who?", {"system": "a", "raw": True}, "raw: .* system does not go with it"),
        ([{"role": "system", "content": "a"}, *user(text("b"))], {"system": "c"}, "one of both"),
    ],
)
def test_a_system_message_that_cannot_be_said_is_refused(
    prompt: Any, options: dict[str, Any], expected: str, vlm: VLM
) -> None:
    with pytest.raises(PromptError, match=expected):
        vlm.stream(prompt, **options)


def test_a_system_message_that_the_template_leaves_out_is_refused(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    monkeypatch.setitem(vlm.spec.conversation.__dict__, "chat_template", template)
    with pytest.raises(PromptError, match="has no place for a system message"):
        vlm.stream("Who?", system="Be brief.")


def test_empty_fields_that_clients_send_back_with_an_answer_are_no_error() -> None:
    answer: Any = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": []}
    found = read_messages([*user(text("a")), answer, *user(text("c"))], [])
    assert found.messages[1] == {"role": "assistant", "content": "b"}


def test_templates_see_image_parts_without_what_they_bring() -> None:
    found = read_messages(user({"type": "image_url", "image_url": {"url": "a"}}, text("b")), [])
    assert found.messages == user({"type": "image"}, text("b"))
    assert found.characters == 1


WRONG: list[tuple[Any, Any, str]] = [
    ([], [], "empty"),
    ({}, [], "expected a text or a list"),
    (None, [], "expected a text or a list"),
    (["Who?"], [], r"messages\[0\]: expected role and content, found str"),
    ([{"content": "Who?"}], [], r"messages\[0\]: role is None"),
    ([{"role": "critic", "content": "Who?"}], [], "'critic', expected system, user, assistant,"),
    ([{"role": "user"}], [], r"messages\[0\]: it has no content"),
    ([{"role": "user", "content": None}], [], "no content"),
    ([{"role": "user", "content": []}], [], "no content"),
    ([{"role": "user", "content": 3}], [], "content is int"),
    ([{"role": "user", "content": " "}], [], "the prompt is empty"),
    ([{"role": "user", "content": "a", "tool_calls": [{}]}], [], "'tool_calls' is not known"),
    ([{"role": "system", "content": "a"}], [], "none is the user's"),
    ([*user(text("a")), {"role": "assistant", "content": "b"}], [], "nothing to answer"),
    (user("Who?"), [], r"messages\[0\]\.content\[0\]: type is str"),
    (user({"text": "Who?"}), [], "type is None"),
    (user({"type": "text"}), [], "text is nothing"),
    (user({"type": "text", "text": "a", "lang": "en"}), [], "'lang' is not known"),
    (user({"type": ["text"]}), [], r"type is \['text'\], expected text, image, image_url, video"),
    ([{"role": ["user"], "content": "a"}], [], r"role is \['user'\], expected"),
    (user({"type": "picture"}), [], "type is 'picture', expected text, image, image_url, video"),
    (user({"type": "input_audio", "input_audio": {}}), [], "input_audio has no data"),
    (user({"type": "input_audio", "input_audio": {"data": "a", "format": "ogg"}}), [], "'ogg'"),
    (user({"type": "input_audio", "input_audio": {"data": "a", "rate": 1}}), [], "'rate'"),
    (user({"type": "audio", "audio": "a.wav", "path": "b.wav"}), [], "expected one sound"),
    (user({"type": "audio", "audio": "http://a/b.wav"}), [], "save the sound and give its file"),
    (user({"type": "audio", "samples": [0]}), [], "'samples' is not known"),
    (user({"type": "audio", "base64": 3}), [], "expected a sound file in base64"),
    (user({"type": "video", "video": b"a"}), [], "expected the file of one video, under video"),
    (user({"type": "video", "video": "a", "path": "b"}), [], "expected the file of one video"),
    (user({"type": "video", "video": "https://a.b/c.mp4"}), [], "nothing is downloaded"),
    (user({"type": "video", "video": "a.mp4", "fps": 1}), [], "'fps' is not known"),
    (user({"type": "video_url", "video_url": {"url": "a"}}), [], "no addresses of videos"),
    ([{"role": "system", "content": [{"type": "video", "video": "a"}]}], [], "only the user"),
    (user({"type": "image", "image": None}), [], "expected one image"),
    (user({"type": "image", "image": "a", "url": "b"}), [], "expected one image"),
    (user({"type": "image", "size": 3}), [], "'size' is not known"),
    (user({"type": "image_url"}), [], "no url"),
    (user({"type": "image_url", "image_url": {"url": ""}}), [], "no url"),
    (user({"type": "image_url", "image_url": {"url": "a", "detail": "high"}}), [], "detail 'high'"),
    (user({"type": "image_url", "image_url": {"url": "http://x/a.png"}}), [], "downloaded"),
    (user({"type": "image", "url": "HTTPS://x/a.png"}), [], "nothing is downloaded"),
    (user({"type": "image", "image": "file://server/a.png"}), [], "another machine"),
    ([{"role": "system", "content": [{"type": "image"}]}, *user(text("a"))], [OTHER], "system"),
    ([*user(text("a")), {"role": "assistant", "content": "b"}], [OTHER], "nothing to answer"),
    (user({"type": "image", "base64": ""}), [], "expected an image file in base64"),
    (user({"type": "image"}, text("a")), [], "have 1 .* but images= has 0"),
    (user({"type": "image", "image": "a"}, {"type": "image"}), [OTHER, OTHER], "images= has 2"),
    (user({"type": "image"}, text("<image>")), [OTHER], "use one of both"),
    (user(text("<image>")), [], "have 1 <image> marks .* but images= has 0"),
    (user(text("a")), "a.png", "a single one"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "images", "expected"), WRONG, ids=lambda v: str(v)[:40])
def test_what_is_wrong_in_messages_is_named_in_one_line(
    messages: Any, images: Any, expected: str, vlm: VLM
) -> None:
    with pytest.raises(PromptError, match=expected) as caught:
        read_messages(messages, images)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(MobileVLMError):
        vlm.generate(messages, images)


def test_an_answer_or_system_prompt_that_says_image_asks_for_no_image(vlm: VLM) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "An <image> is a word."},
        *user({"type": "image", "image": IMAGE}, text("Who?")),
        {"role": "assistant", "content": "<image> and <image>"},
        *user(text("Why?")),
    ]
    assert vlm.generate(messages, max_new_tokens=2).visual_tokens == 144
    ids = vlm.prompt_ids(messages)
    assert ids.count(-200) == 1
    said = vlm.tokenizer.decode([token for token in ids if token >= 0])
    assert "<image> and <image>" in said and "An <image> is a word." in said


def test_a_session_refuses_messages_that_leave_out_earlier_turns(vlm: VLM) -> None:
    session = vlm.new_session()
    first: list[Any] = user({"type": "image", "image": IMAGE}, text("Who?"))
    answer = vlm.generate(first, max_new_tokens=3, session=session)
    with pytest.raises(PromptError, match="give all messages from the first on"):
        vlm.generate(user(text("Why?")), max_new_tokens=3, session=session)
    turns: list[Any] = [*first, {"role": "assistant", "content": answer.text}, *user(text("Why?"))]
    again = vlm.generate(turns, max_new_tokens=3, session=session)
    assert again.reused.tokens > 144
    assert again.token_ids == vlm.generate(turns, max_new_tokens=3).token_ids
    assert vlm.generate(user(text("Why?")), max_new_tokens=3, session=vlm.new_session()).token_ids


def test_a_question_that_failed_is_not_part_of_what_a_session_was_told(vlm: VLM) -> None:
    session = vlm.new_session()
    with pytest.raises(PromptError):
        vlm.generate(user(text("a " * 3000)), session=session)
    assert vlm.generate(user(text("Who?")), max_new_tokens=2, session=session).token_ids


def test_a_chat_goes_on_after_an_answer_that_says_image(vlm: VLM, tmp_path: Path) -> None:
    chat = Chat(vlm, [IMAGE])
    chat.ask("Who?", max_new_tokens=2).finish()
    chat.messages[-1] = {"role": "assistant", "content": "an <image> mark"}
    chat._session.told = []
    assert chat.ask("Why?", max_new_tokens=2).finish().visual_tokens == 144
