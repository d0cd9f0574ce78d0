"""Families that hear against the arrays of the official classes: log-mel features, ids, features
and rows of the encoder, logits and greedy answers, of the torch reference and of float32 bundles.

Limits as in test_hub_families.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, SOUND_FIXTURES, BundleOf, Fixture, fixture_named, relative_error
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.audio import prepare_sound
from mobilevlm.conversation import official_ids, render, tokenize
from mobilevlm.messages import Message
from mobilevlm.prompt import Prepared, Sound, expand
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.steps import State
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.sampling import Sampler, SamplingOptions


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=SOUND_FIXTURES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def sound(fixture: Fixture) -> Prepared:
    return prepare_sound(wav_of(fixture), fixture.model.spec.audio)


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model)


@pytest.fixture(scope="module")
def exact(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as vlm:
        yield vlm


def wav_of(fixture: Fixture) -> Path:
    return fixture.folder / "audio.wav"


def said(fixture: Fixture, source: Any = None) -> list[Message]:
    """The messages of the prompt; ``source``: the sound of its part."""
    part = {"type": "audio"} if source is None else {"type": "audio", "audio": source}
    given = fixture.expected["user_prompt"]
    question = (given if isinstance(given, str) else given[0]).replace("<|audio|>", "")
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


def features_of(fixture: Fixture, count: int) -> NDArray[Any]:
    """The official features, of a cut encoder those that are used."""
    features: NDArray[Any] = fixture.arrays["audio_features"]
    return features.reshape(-1, features.shape[-1])[:count]


def prompt_state(fixture: Fixture, reference: ReferenceModel, sound: Prepared) -> State:
    conversation = fixture.model.spec.conversation
    tokens = tokenize(fixture.model.tokenizer, render(conversation, said(fixture)), conversation)
    return reference.prompt(expand(tokens, [sound.pieces]), [reference.see(sound)])


def test_log_mel_features_equal_the_official_ones(fixture: Fixture, sound: Prepared) -> None:
    expected = fixture.arrays["input_features"]
    if fixture.model.spec.audio.mel.windows == "any":
        expected = expected.transpose(0, 2, 1)
    assert len(sound.arrays) == len(expected)
    for arrays, official in zip(sound.arrays, expected, strict=True):
        mel = arrays["mel"]
        assert np.abs(mel - official[:, : mel.shape[1]]).max() <= 1e-4


def test_ids_equal_the_official_ones(fixture: Fixture, sound: Prepared) -> None:
    model = fixture.model
    tokens = tokenize(
        model.tokenizer, render(model.spec.conversation, said(fixture)), model.spec.conversation
    )
    found = official_ids(tokens, model.spec.audio.layout, [sound.pieces])
    assert found == fixture.arrays["input_ids"][0].tolist()


def test_reference_features_and_rows_are_the_official_ones(
    fixture: Fixture, reference: ReferenceModel, sound: Prepared
) -> None:
    features = np.concatenate([reference.run_features(run).numpy() for run in sound.arrays])
    assert relative_error(features, features_of(fixture, len(features))) <= FLOAT32
    rows = reference.image_rows(sound).numpy()
    assert relative_error(rows, fixture.arrays["projector_output"]) <= FLOAT32


def test_reference_logits_and_greedy_answer_are_the_official_ones(
    fixture: Fixture, reference: ReferenceModel, sound: Prepared
) -> None:
    prompt = prompt_state(fixture, reference, sound)
    logits = reference.logits(prompt).numpy()
    assert relative_error(logits, fixture.logits) <= FLOAT32
    assert (logits.argmax(-1) == fixture.logits.argmax(-1)).all()
    assert reference.greedy(prompt, 24) == fixture.generated_ids


def test_fp32_features_and_rows_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    features = exact.audio_features(wav_of(fixture))
    assert relative_error(features, features_of(fixture, len(features))) <= 1e-4
    rows = exact.encode_audio(wav_of(fixture))
    assert relative_error(rows, fixture.arrays["projector_output"]) <= 1e-4


def test_fp32_ids_logits_and_answer_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    messages = said(fixture, wav_of(fixture))
    ids = exact.prompt_ids(messages)
    assert ids == fixture.arrays["input_ids"][0].tolist()
    found = exact.prompt_logits(messages)
    assert relative_error(found, fixture.logits) <= 1e-3
    assert (found.argmax(-1) == fixture.logits.argmax(-1)).all()
    question = messages[0]["content"][1]["text"]  # type: ignore[index]
    answer = exact.generate(
        str(question), audio=[wav_of(fixture)], max_new_tokens=24, ignore_eos=True
    )
    assert answer.token_ids == fixture.generated_ids
    assert answer.text == fixture.text
    assert answer.prompt_tokens == len(ids)
    assert answer.visual_tokens == len(fixture.arrays["projector_output"])


TEXT_ONLY = "What is a good answer to this question?"


def test_products_for_sound_act_where_a_prompt_has_some_and_nowhere_else(
    bundle_of: BundleOf,
) -> None:
    fixture = fixture_named("granite_speech")
    arrays, messages = fixture.arrays, said(fixture, wav_of(fixture))
    without = arrays["text_only_generated_ids"].tolist()
    options: Any = {"max_new_tokens": 24, "ignore_eos": True}
    reference = load_reference(fixture.model)
    ids = arrays["text_only_input_ids"][0].tolist()
    assert reference.greedy(reference.prompt(ids, []), 24) == without
    silent = reference.decoder.start(prompt_state(fixture, reference, prepare_sound(
        wav_of(fixture), fixture.model.spec.audio)).hidden)  # fmt: skip
    found = reference.logits(silent).numpy()
    assert relative_error(found, arrays["logits_no_adapter"][0]) <= FLOAT32
    with mobilevlm.load(bundle_of("granite_speech", "fp32")) as vlm:
        for _ in range(2):  # what one prompt leaves is not for the other
            answer = vlm.generate(TEXT_ONLY, **options)
            assert answer.token_ids == without
            assert vlm.generate(messages, **options).token_ids == fixture.generated_ids
        chat = vlm.chat()
        said_first = chat.ask(TEXT_ONLY, max_new_tokens=4, ignore_eos=True).finish()
        chat.show([Sound(wav_of(fixture))])
        question = messages[0]["content"][1]["text"]  # type: ignore[index]
        second = chat.ask(str(question), max_new_tokens=4, ignore_eos=True).finish()
        turns: list[Message] = [
            {"role": "user", "content": TEXT_ONLY},
            {"role": "assistant", "content": said_first.text},
            *messages,
        ]
        assert vlm.generate(turns, max_new_tokens=4, ignore_eos=True).token_ids == second.token_ids


def test_the_repetition_penalty_over_prompt_and_answer_gives_the_official_tokens(
    fixture: Fixture, reference: ReferenceModel, sound: Prepared
) -> None:
    if "generated_ids_penalty" not in fixture.arrays:
        return
    prompt, tokens = prompt_state(fixture, reference, sound), list[int]()
    sampler = Sampler(SamplingOptions(repetition_penalty=1.1))
    ids = fixture.arrays["input_ids"][0].tolist()
    for _ in range(24):
        logits = reference.answer_logits(prompt, tokens)[-1].numpy()
        tokens.append(sampler(logits, [*ids, *tokens]))
    assert tokens == fixture.arrays["generated_ids_penalty"].tolist()
