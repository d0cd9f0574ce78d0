"""The torch reference against the arrays that the models' official code gave.

Two correct float32 implementations differ here by a relative error of 1e-6 to 3e-6; the smallest
wrong choice known (LDP's norms with eps 1e-6 instead of 1e-5) makes 4.7e-5 in the visual tokens.
``FLOAT32`` lies between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import FLOAT32, Fixture, relative_error

from mobilevlm.conversation import render, tokenize, user_message
from mobilevlm.image import normalize, open_image, preprocess
from mobilevlm.reference import ReferenceModel, load_reference


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model)


@pytest.fixture(scope="module")
def pixels(fixture: Fixture) -> np.ndarray:
    return preprocess(open_image(fixture.image), fixture.model.spec.image)


def embed_prompt(fixture: Fixture, reference: ReferenceModel, pixels: np.ndarray) -> torch.Tensor:
    return reference.embed(
        fixture.arrays["input_ids"][0].tolist(), [reference.visual_tokens(pixels)]
    )


def test_pixel_values_equal_the_official_preprocessing(
    fixture: Fixture, pixels: np.ndarray
) -> None:
    found = normalize(pixels, fixture.model.spec.image)
    # One 8-bit step is 1 / 255 / std = 0.014: the limit allows float rounding, not one wrong pixel.
    assert np.abs(found - fixture.arrays["pixel_values"][0]).max() <= 1e-5


def test_prompt_text_and_ids_equal_the_official_ones(fixture: Fixture) -> None:
    model = fixture.model
    text = render(model.spec.conversation, [user_message(fixture.expected["user_prompt"], 1)])
    assert text == fixture.expected["templated_prompt"]
    assert tokenize(model.tokenizer, text) == fixture.arrays["input_ids"][0].tolist()


def test_features_are_those_of_the_official_tower(
    fixture: Fixture, reference: ReferenceModel, pixels: np.ndarray
) -> None:
    features = reference.features(pixels).numpy()
    assert relative_error(features, fixture.arrays["vision_features"][0]) <= FLOAT32


def test_visual_tokens_are_those_of_the_official_projector(
    fixture: Fixture, reference: ReferenceModel, pixels: np.ndarray
) -> None:
    tokens = reference.visual_tokens(pixels).numpy()
    assert relative_error(tokens, fixture.arrays["projector_output"][0]) <= FLOAT32


def test_logits_of_every_prompt_position_are_the_official_ones(
    fixture: Fixture, reference: ReferenceModel, pixels: np.ndarray
) -> None:
    logits = reference.logits(embed_prompt(fixture, reference, pixels)).numpy()
    expected = fixture.arrays["logits"][0]
    assert relative_error(logits, expected) <= FLOAT32
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_greedy_answer_is_the_official_one(
    fixture: Fixture, reference: ReferenceModel, pixels: np.ndarray
) -> None:
    embeds = embed_prompt(fixture, reference, pixels)
    expected = fixture.arrays["generated_ids"].tolist()
    assert len(expected) == 24
    assert reference.greedy(embeds, len(expected)) == expected
    assert fixture.model.tokenizer.decode(expected) == fixture.expected["decoded_text"]


def test_streamed_reference_equals_the_resident_one_bit_for_bit(
    fixture: Fixture, reference: ReferenceModel, pixels: np.ndarray
) -> None:
    streamed = load_reference(fixture.model, streamed=True)
    assert torch.equal(streamed.features(pixels), reference.features(pixels))
    embeds = embed_prompt(fixture, streamed, pixels)
    assert torch.equal(embeds, embed_prompt(fixture, reference, pixels))
    assert torch.equal(streamed.logits(embeds), reference.logits(embeds))
    # Weights are dropped after use: that is what streaming is for.
    assert all(parameter.is_meta for parameter in streamed.decoder.layers.parameters())
