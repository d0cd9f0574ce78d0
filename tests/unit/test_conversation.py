"""Messages to prompt text to ids, as the reference code of the LLaVA lineage does it."""

from __future__ import annotations

import pytest
from conftest import Fixture, fixture_named

from mobilevlm.conversation import official_ids, render, tokenize, user_message
from mobilevlm.errors import PromptError
from mobilevlm.input_spec import LayoutSpec
from mobilevlm.messages import Message
from mobilevlm.prompt import Mark
from mobilevlm.spec import ConversationSpec

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def conversation() -> ConversationSpec:
    return fixture_named("mobilevlm_v2").model.spec.conversation


def test_prompt_equals_the_official_template(any_fixture: Fixture) -> None:
    message = user_message(any_fixture.prompt, len(any_fixture.images))
    found = render(any_fixture.model.spec.conversation, [message])
    assert found == any_fixture.templated_prompt


def test_stop_string_and_end_id_are_the_official_ones(fixture: Fixture) -> None:
    conversation = fixture.model.spec.conversation
    assert conversation.stop_strings == (fixture.expected["stop_string"],)
    assert conversation.eos_token_ids == (fixture.expected["generation"]["eos_token_id"],)


def test_an_answer_ends_with_the_end_mark_and_the_next_turn_follows_without_a_space(
    conversation: ConversationSpec,
) -> None:
    messages: list[Message] = [
        user_message("Who?", 1),
        {"role": "assistant", "content": "Nobody."},
        user_message("Why?", 0),
    ]
    assert render(conversation, messages) == (
        f"{SYSTEM}USER: <image>\nWho? ASSISTANT: Nobody.</s>USER: Why? ASSISTANT:"
    )


def test_a_system_message_replaces_the_default_one(conversation: ConversationSpec) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}, user_message("Hi", 0)]
    assert render(conversation, messages) == "Be brief. USER: Hi ASSISTANT:"


def test_images_given_as_parts_stand_first_each_on_a_line(conversation: ConversationSpec) -> None:
    text = render(conversation, [user_message("Compare.", 3)])
    assert text == f"{SYSTEM}USER: <image>\n<image>\n<image>\nCompare. ASSISTANT:"


def test_text_parts_keep_their_order_after_the_images(conversation: ConversationSpec) -> None:
    content = [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}]
    text = render(conversation, [{"role": "user", "content": content}])
    assert text == f"{SYSTEM}USER: <image>\nAB ASSISTANT:"


def test_image_marks_in_the_prompt_stay_where_they_stand(conversation: ConversationSpec) -> None:
    text = render(conversation, [user_message("Is <image> like <image>?", 2)])
    assert text == f"{SYSTEM}USER: Is <image> like <image>? ASSISTANT:"


def test_image_marks_are_wrapped_where_the_checkpoint_was_trained_so() -> None:
    conversation = fixture_named("llava_v1_im_start_end").model.spec.conversation
    mark = "<im_start><image><im_end>"
    assert f"USER: {mark}\nA " in render(conversation, [user_message("A", 1)])
    assert f"USER: Is {mark} it? " in render(conversation, [user_message("Is <image> it?", 1)])


@pytest.mark.parametrize(
    ("prompt", "images"),
    [("<image> and <image>", 1), ("<image>", 0), ("<image>", 2), ("<image>" * 5, 4)],
)
def test_a_wrong_number_of_marks_is_refused(prompt: str, images: int) -> None:
    given = {0: "no image was", 1: "one image was"}.get(images, f"{images} images were")
    with pytest.raises(PromptError, match=f"{prompt.count('<image>')} <image> marks?, but {given}"):
        user_message(prompt, images)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        user_message(prompt, 1)


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for %}", "{#", 'it\'s \\ "so"', "<b>&amp;"])
def test_prompt_text_is_never_taken_for_a_template(
    text: str, conversation: ConversationSpec
) -> None:
    assert render(conversation, [user_message(text, 0)]) == f"{SYSTEM}USER: {text} ASSISTANT:"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for x in %}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) | list }}",
        "{{ messages + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_gives_one_line(template: str) -> None:
    with pytest.raises(PromptError) as caught:
        render(ConversationSpec(template, (2,), ()), [user_message("Hi", 0)])
    assert "\n" not in str(caught.value) and "template" in str(caught.value)


def test_text_between_images_is_tokenized_alone_and_begins_text_only_once(
    fixture: Fixture,
) -> None:
    tokenizer = fixture.model.tokenizer
    ids = official_ids(tokenize(tokenizer, "Is <image>\nlike <image><image>?"), LayoutSpec())
    alone = [tokenizer.encode(t, add_special_tokens=False).ids for t in ("Is ", "\nlike ", "", "?")]
    assert ids == [1, *alone[0], -200, *alone[1], -200, *alone[2], -200, *alone[3]]
    assert ids.count(1) == 1


def test_text_that_begins_with_an_image_keeps_the_leading_id(fixture: Fixture) -> None:
    assert tokenize(fixture.model.tokenizer, "<image>a")[:2] == [1, Mark()]


def test_text_without_image_is_tokenized_whole(fixture: Fixture) -> None:
    tokenizer = fixture.model.tokenizer
    assert tokenize(tokenizer, "What is it?") == tokenizer.encode("What is it?").ids
