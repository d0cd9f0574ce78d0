"""Special tokens in people's text: control tokens as in the official code, or plain pieces."""

from __future__ import annotations

import time
from typing import Any

import pytest
from conftest import BundleOf, Fixture, fixture_named, run_program, token_id

from mobilevlm.conversation import render, tokenize, user_message
from mobilevlm.errors import PromptError
from mobilevlm.messages import Message, read_messages
from mobilevlm.prompt import Mark, Token
from mobilevlm.runtime import VLM
from mobilevlm.spec import IMAGE_PLACEHOLDER
from mobilevlm.templates.plain_text import _special_names, protect

IMAGE = fixture_named("llava_v1").image


def ids_of(fixture: Fixture, text: str, special_tokens: bool) -> list[Token]:
    conversation, tokenizer = fixture.model.spec.conversation, fixture.model.tokenizer
    said = read_messages([user_message(text, 0, special_tokens)], [], special_tokens)
    messages = protect(said.messages, tokenizer, special_tokens)
    return tokenize(tokenizer, render(conversation, messages), conversation)


def test_plain_text_without_special_tokens_has_the_same_ids_either_way(
    any_fixture: Fixture,
) -> None:
    for text in ("What is  in the image?", "a < b\n\n<c", "日本語 🙂 [x]", "|<|", " <"):
        assert ids_of(any_fixture, text, False) == ids_of(any_fixture, text, True)


def test_special_tokens_in_plain_text_become_pieces_that_say_the_same(any_fixture: Fixture) -> None:
    tokenizer = any_fixture.model.tokenizer
    for name in _special_names(tokenizer)[:20]:
        if name == IMAGE_PLACEHOLDER:  # as a token it needs an image; it has a test of its own
            continue
        as_token, as_text = (ids_of(any_fixture, f"Say {name} now", way) for way in (True, False))
        index = token_id(tokenizer, name)
        assert as_token.count(index) > as_text.count(index)
        assert as_token != as_text


def test_the_end_mark_is_two_in_the_official_ids_and_pieces_in_plain_text() -> None:
    fixture = fixture_named("llava_v1")
    tokenizer = fixture.model.tokenizer
    assert ids_of(fixture, "a </s> b", True).count(2) == 1
    plain = [token for token in ids_of(fixture, "a </s> b", False) if not isinstance(token, Mark)]
    assert plain.count(2) == 0
    assert "a </s> b" in tokenizer.decode(plain)


def test_the_templates_own_special_tokens_stay(vlm: VLM) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "Who </s> is it?"},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": "Why?"},
    ]
    assert vlm.prompt_ids(messages).count(2) == 2
    assert vlm.prompt_ids(messages, special_tokens=False).count(2) == 1


def test_the_word_image_is_plain_text_where_that_is_asked_for(vlm: VLM) -> None:
    with pytest.raises(PromptError, match="1 <image> mark, but no image"):
        vlm.prompt_ids("Is <image> a word?")
    assert -200 not in vlm.prompt_ids("Is <image> a word?", special_tokens=False)
    ids = vlm.prompt_ids("Is <image> a word?", 1, special_tokens=False)
    assert ids.count(-200) == 1
    answer = vlm.generate("Is <image> it?", [IMAGE], max_new_tokens=2, special_tokens=False)
    assert answer.visual_tokens == 144


def test_text_split_over_parts_makes_no_special_token(vlm: VLM) -> None:
    parts = [{"type": "text", "text": "</"}, {"type": "text", "text": "s>"}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    assert vlm.prompt_ids(messages, special_tokens=False).count(2) == 0


def test_a_raw_prompt_has_its_special_tokens(vlm: VLM) -> None:
    with pytest.raises(PromptError, match="special_tokens=False"):
        vlm.generate("Hi", raw=True, special_tokens=False)
    with pytest.raises(PromptError, match="messages"):
        vlm.generate([{"role": "user", "content": "Hi"}], raw=True)


def test_noncharacters_are_refused(vlm: VLM) -> None:
    with pytest.raises(PromptError, match=r"U\+FDD0"):
        vlm.prompt_ids("a\ufdd0b")
    with pytest.raises(PromptError, match=r"U\+FDD1"):
        vlm.prompt_ids("a\ufdd1b", raw=True)


def test_plain_text_has_a_switch(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny", "fp32")
    asked = ("run", bundle, "--prompt", "What is <image>?", "--max-new-tokens", 2)
    assert run_program(*asked).returncode == 2
    assert run_program(*asked, "--plain-text").returncode == 0
    refused = run_program(*asked, "--plain-text", "--raw")
    assert refused.returncode == 2 and "--plain-text does not go with --raw" in refused.stderr
    done = run_program("chat", bundle, "--plain-text", "--max-new-tokens", 2, stdin=b"<image>?\n")
    assert done.returncode == 0 and "error" not in done.stderr


def test_a_prompt_of_ten_megabytes_is_refused_before_it_is_tokenized(vlm: VLM) -> None:
    long = "word " * 2_000_000
    prompts: tuple[str | list[Message], ...] = (long, [{"role": "user", "content": long}])
    for prompt in prompts:
        start = time.perf_counter()
        with pytest.raises(PromptError, match="characters"):
            vlm.generate(prompt)
        assert time.perf_counter() - start < 1
    with pytest.raises(PromptError, match="characters"):
        vlm.generate(long, raw=True)
